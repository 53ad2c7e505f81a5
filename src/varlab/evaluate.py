"""`varlab evaluate`: scores of a tokenizer on a packed set."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Writes evaluation.json (scores with their protocol), by_scale.png and reconstructions.png into `out`."""
    import torch
    from hydra.utils import instantiate

    from varlab import __version__, pictures
    from varlab.checkpoints import load_tokenizer, tokenizer_fingerprint
    from varlab.data.imagenet import Crop, ImageDataset, to_tensor
    from varlab.data.order import Draw
    from varlab.data.shards import ShardReader, fingerprint
    from varlab.files import save_json
    from varlab.metrics.plot import curve_by_scale
    from varlab.metrics.reconstruction import evenly, reconstruction_distance, reconstruction_scores

    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    features = instantiate(cfg.features)
    perceptual = instantiate(cfg.perceptual)
    tokenizer = load_tokenizer(cfg.checkpoint, cfg.patch_nums).to(device).eval()
    side, storage = tokenizer.image_size[0], instantiate(cfg.storage)

    class Batches:
        """Center crops of a split, spread over it, batch by batch; can be gone through again."""

        def __init__(self, split: str, num: int | None) -> None:
            reader = ShardReader(cfg.shards, split, storage)
            self.images = ImageDataset(reader, side, cfg.resize_ratio, random_crop=False, random_flip=False)
            self.samples = evenly(len(reader), num)

        def __len__(self) -> int:
            return -(-len(self.samples) // cfg.batch_size)

        def __iter__(self) -> Iterator[torch.Tensor]:
            for first in range(0, len(self.samples), cfg.batch_size):
                yield self.read(self.samples[first : first + cfg.batch_size])

        def read(self, samples: list[int]) -> torch.Tensor:
            """These images in [-1, 1], (B, 3, H, W)."""
            self.images.reader.prepare(samples)
            return to_tensor([self.images.readable(Draw(i, 0, True), Crop())[0] for i in samples]).to(device)

    batches = Batches(cfg.split, cfg.num_images)
    distances = {} if perceptual is None else {name_of(cfg.perceptual): perceptual.to(device)}
    result = reconstruction_scores(tokenizer, batches, distances, cfg.curve_images)
    if features is not None:
        others = Batches("train" if cfg.split != "train" else "val", result["num_images"])
        found = reconstruction_distance(tokenizer, features.to(device), batches, others)
        name = "rfid" if name_of(cfg.features) == "inception" else f"frechet_distance/{name_of(cfg.features)}"
        result |= {name: found["distance"], f"{name}/real_against_real": found["real_against_real"]}
        result |= {f"{name}/num_images": found["num_images"], f"{name}/num_other": found["num_other"]}
    protocol = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint(batches.images.reader.manifest),
        "split": cfg.split,
        "resolution": side,
        "resize_ratio": cfg.resize_ratio,
        "crop": "center",
        "varlab": __version__,
    }
    out = Path(cfg.out)
    save_json(out / "evaluation.json", {**result, "protocol": protocol})
    labels = [str(pn) for pn in tokenizer.patch_nums]
    curve_by_scale(result["by_scale"], labels, out / "by_scale.png")
    with torch.no_grad():
        shown = batches.read(batches.samples[:: max(1, len(batches.samples) // 8)][:8])
        strip = tokenizer.filmstrip(tokenizer.encode(shown))
    rows = pictures.columns_of(shown / 2 + 0.5, *(strip / 2 + 0.5))
    pictures.save(pictures.grid(rows, columns=1 + len(strip)), out / "reconstructions.png")
    for name, value in result.items():
        if isinstance(value, float | int):
            print(f"{name:48} {value:10.4g}")
    print(f"{out}: evaluation.json, by_scale.png, reconstructions.png")


def name_of(node: DictConfig) -> str:
    """What a network's scores are called."""
    target: str = (node.get("network") or node)["_target_"].rpartition(".")[2]
    return {"EfficientNetLite0": "efficientnet_lite0"}.get(target, target.lower())


main = verb("evaluate")(run)

if __name__ == "__main__":
    main()

"""`varlab evaluate`: scores of a tokenizer on a packed set."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Writes evaluation.json (scores with their protocol), by_scale.png and reconstructions.png into `out`."""
    import torch
    from hydra.utils import instantiate

    from varlab import __version__, pictures
    from varlab.checkpoints import load_tokenizer, tokenizer_fingerprint
    from varlab.data.imagenet import CenterCrops
    from varlab.data.shards import ShardReader, fingerprint
    from varlab.files import save_json
    from varlab.metrics.plot import curve_by_scale
    from varlab.metrics.reconstruction import reconstruction_distance, reconstruction_scores

    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    features, perceptual, storage = (instantiate(cfg[name]) for name in ("features", "perceptual", "storage"))
    tokenizer = load_tokenizer(cfg.checkpoint, cfg.patch_nums).to(device).eval()
    side, out = tokenizer.image_size[0], Path(cfg.out)

    def crops(split: str, num_images: int | None) -> CenterCrops:
        reader = ShardReader(cfg.shards, split, storage)
        return CenterCrops(reader, side, cfg.resize_ratio, num_images, cfg.batch_size, device)

    images = crops(cfg.split, cfg.num_images)
    distances = {} if perceptual is None else {name_of(cfg.perceptual): perceptual.to(device)}
    result = reconstruction_scores(tokenizer, images, distances, cfg.curve_images)
    if features is not None:
        others = crops("train" if cfg.split != "train" else "val", result["num_images"])
        found = reconstruction_distance(tokenizer, features.to(device), images, others)
        name = "rfid" if name_of(cfg.features) == "inception" else f"frechet_distance/{name_of(cfg.features)}"
        result |= {name: found.pop("distance"), **{f"{name}/{what}": value for what, value in found.items()}}
    result["protocol"] = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint(images.images.reader.manifest),
        "split": cfg.split,
        "resolution": side,
        "resize_ratio": cfg.resize_ratio,
        "crop": "center",
        "varlab": __version__,
    }
    save_json(out / "evaluation.json", result)
    curve_by_scale(result["by_scale"], [str(pn) for pn in tokenizer.patch_nums], out / "by_scale.png")
    shown = images.few(8)
    strip = tokenizer.filmstrip(tokenizer.encode(shown)).detach()
    rows = pictures.columns_of(shown, *strip) / 2 + 0.5
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

"""`varlab evaluate`: scores of a tokenizer, of a VAR's predictions, or of samples."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb
from varlab.evaluation.samples import name_of, print_scores


def run(cfg: DictConfig) -> None:
    """Samples where `samples` is given, else what the checkpoint holds: a VAR's likelihood, or a tokenizer's reconstructions."""
    from varlab.checkpoints.load import contains_var
    from varlab.evaluation.samples import evaluate_grid, evaluate_samples

    if cfg.samples is not None:
        return evaluate_samples(cfg)
    if cfg.checkpoint is not None and cfg.reference is not None:
        return evaluate_grid(cfg)
    if cfg.checkpoint is None or cfg.shards is None:
        raise ValueError(
            "give checkpoint=FILE shards=FOLDER (a tokenizer or a VAR), samples=FOLDER reference=FOLDER_OR_NPZ, or, for a grid of"
            " sampling settings, checkpoint=FILE reference=FOLDER_OR_NPZ"
        )
    if contains_var(cfg.checkpoint):
        return evaluate_likelihood(cfg)
    return evaluate_tokenizer(cfg)


def evaluate_tokenizer(cfg: DictConfig) -> None:
    """Writes evaluation.json (scores with their protocol), by_scale.png and reconstructions.png into `out`."""
    import torch
    from hydra.utils import instantiate

    from varlab import __version__, image_grid
    from varlab.checkpoints.load import load_tokenizer, tokenizer_fingerprint
    from varlab.data.images import CenterCrops
    from varlab.data.shards import ShardReader, fingerprint
    from varlab.distributed import default_device
    from varlab.evaluation.plots import curve_by_scale
    from varlab.evaluation.reconstruction import reconstruction_distance, reconstruction_scores
    from varlab.files import save_json

    device = torch.device(default_device(cfg.device))
    features, perceptual, storage = (instantiate(cfg[name]) for name in ("features", "perceptual", "storage"))
    tokenizer = load_tokenizer(cfg.checkpoint, cfg.patch_nums).to(device).eval()
    side, out = tokenizer.image_size[0], Path(cfg.out)

    def crops(split: str, num_images: int | None) -> CenterCrops:
        reader = ShardReader(cfg.shards, split, storage)
        return CenterCrops(reader, side, cfg.resize_ratio, num_images, cfg.batch_size, device)

    split = cfg.split or "val"
    images = crops(split, cfg.num_images)
    distances = {} if perceptual is None else {name_of(cfg.perceptual): perceptual.to(device)}
    result = reconstruction_scores(tokenizer, images, distances, cfg.curve_images)
    if features is not None:
        others = crops("train" if split != "train" else "val", result["num_images"])
        found = reconstruction_distance(tokenizer, features.to(device), images, others)
        name = "rfid" if name_of(cfg.features) == "inception" else f"frechet_distance/{name_of(cfg.features)}"
        result |= {name: found.pop("distance"), **{f"{name}/{what}": value for what, value in found.items()}}
    result["protocol"] = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint(images.images.reader.manifest),
        "split": split,
        "resolution": side,
        "resize_ratio": cfg.resize_ratio,
        "crop": "center",
        "varlab": __version__,
    }
    save_json(out / "evaluation.json", result)
    curve_by_scale(result["by_scale"], [str(pn) for pn in tokenizer.patch_nums], out / "by_scale.png")
    shown = images.sample_images(8)
    strip = tokenizer.filmstrip(tokenizer.encode(shown)).detach()
    rows = image_grid.columns_of(shown, *strip) / 2 + 0.5
    image_grid.save(image_grid.grid(rows, columns=1 + len(strip)), out / "reconstructions.png")
    print_scores(result)
    print(f"{out}: evaluation.json, by_scale.png, reconstructions.png")


def evaluate_likelihood(cfg: DictConfig) -> None:
    """Writes likelihood.json and likelihood.png into `out`: loss, error, calibration by scale of a VAR over images or cached tokens."""
    import torch
    from hydra.utils import instantiate

    from varlab import __version__
    from varlab.checkpoints.export_folder import tokenizer_fingerprint
    from varlab.checkpoints.load import load
    from varlab.data.images import CenterCrops
    from varlab.data.shards import ShardReader
    from varlab.data.token_cache import TokenDataModule
    from varlab.distributed import default_device
    from varlab.evaluation.likelihood import likelihood_scores
    from varlab.evaluation.plots import curve_by_scale
    from varlab.files import save_json
    from varlab.models import scales

    device = torch.device(default_device(cfg.device))
    tokenizer, var, _ = load(cfg.checkpoint)
    tokenizer, var = tokenizer.to(device), var.to(device)

    def from_tokens():
        data = TokenDataModule(str(cfg.shards), global_batch_size=cfg.batch_size)
        data.setup()
        if data.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"{cfg.shards} was made by tokenizer {data.manifest['tokenizer']}, not by that of {cfg.checkpoint}"
            )
        for batch in data.val_dataloader():
            real = batch.weight > 0
            yield batch.sequence[real].to(device), batch.labels[real].to(device)

    def from_images():
        reader = ShardReader(cfg.shards, cfg.split or "val", instantiate(cfg.storage))
        crops = CenterCrops(reader, tokenizer.image_size[0], cfg.resize_ratio, cfg.num_images, cfg.batch_size, device)
        labels = torch.from_numpy(reader.labels)[crops.samples].to(device)
        for images, some in zip(crops, labels.split(cfg.batch_size), strict=True):
            yield torch.cat(tokenizer.encode(images), dim=1), some

    is_cache = (Path(cfg.shards) / "val.tokens.npy").is_file()
    result = likelihood_scores(var, tokenizer.quantizer, from_tokens() if is_cache else from_images())
    protocol = {"data": str(cfg.shards), "split": "val" if is_cache else cfg.split or "val", "varlab": __version__}
    out = Path(cfg.out)
    save_json(out / "likelihood.json", {**result, "protocol": {**protocol, "checkpoint": str(cfg.checkpoint)}})
    shown = {name: result["by_scale"][name] for name in ("loss", "unconditional_loss", "error", "calibration_error")}
    labels = [f"{h}x{w}" for h, w in scales.sides(var.patch_nums)]
    curve_by_scale(shown, labels, out / "likelihood.png")
    print_scores(result)
    print(f"{out}: likelihood.json, likelihood.png")


main = verb("evaluate")(run)

if __name__ == "__main__":
    main()

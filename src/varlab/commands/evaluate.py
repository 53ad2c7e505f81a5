"""`varlab evaluate`: scores of a tokenizer, of a VAR's predictions, or of samples."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from varlab.config import hydra_command


def run(cfg: DictConfig) -> None:
    """Scores samples if `samples` is given, otherwise the checkpoint: a VAR's likelihood, or a tokenizer's
    reconstructions."""
    import torch
    from hydra.utils import instantiate

    from varlab.checkpoints.load import contains_var, load, load_tokenizer
    from varlab.distributed import default_device, use_exact_fp32
    from varlab.evaluation.image_sets import score_name
    from varlab.evaluation.tokenizer import evaluate_tokenizer
    from varlab.evaluation.var import evaluate_likelihood

    use_exact_fp32()
    if cfg.samples is not None or (cfg.checkpoint is not None and cfg.reference is not None):
        return samples_or_grid(cfg)
    if cfg.checkpoint is None or cfg.shards is None:
        raise ValueError(
            "give checkpoint=FILE shards=FOLDER (a tokenizer or a VAR), samples=FOLDER reference=FOLDER_OR_NPZ, or, for a grid of"
            " sampling settings, checkpoint=FILE reference=FOLDER_OR_NPZ"
        )
    shared: dict[str, Any] = {
        "split": cfg.split or "val",
        "num_images": cfg.num_images,
        "resize_ratio": cfg.resize_ratio,
        "batch_size": cfg.batch_size,
        "device": torch.device(default_device(cfg.device)),
        "storage": instantiate(cfg.storage),
    }
    if contains_var(cfg.checkpoint):
        tokenizer, var, _ = load(cfg.checkpoint, trust_code=cfg.trust_code)
        result = evaluate_likelihood(
            tokenizer,
            var,
            str(cfg.shards),
            Path(cfg.out),
            checkpoint=str(cfg.checkpoint),
            retrieval=cfg.retrieval,
            **shared,
        )
        each = ", and a folder with both for each shape" if "by_shape" in result else ", likelihood.png"
        print_scores(result, f"{cfg.out}: likelihood.json{each}")
        return
    metrics = instantiate(cfg.metrics, _convert_="all")
    if (perceptual := instantiate(cfg.perceptual)) is not None:
        metrics = {score_name(perceptual): perceptual, **metrics}
    result = evaluate_tokenizer(
        load_tokenizer(cfg.checkpoint, cfg.patch_nums, trust_code=cfg.trust_code),
        str(cfg.shards),
        Path(cfg.out),
        curve_images=cfg.curve_images,
        features=instantiate(cfg.features),
        metrics=metrics,
        **shared,
    )
    print_scores(result, f"{cfg.out}: evaluation.json, by_scale.png, reconstructions.png")


def samples_or_grid(cfg: DictConfig) -> None:
    """Scores samples against real images, or a VAR's samples at each point of a grid of sampling settings."""
    import torch
    from hydra.utils import instantiate

    from varlab.checkpoints.load import load
    from varlab.distributed import default_device
    from varlab.evaluation.samples import evaluate_samples
    from varlab.evaluation.sampling_grid import evaluate_grid
    from varlab.sampling.sample_folder import labels_of, write_samples
    from varlab.sampling.token_sampling import SamplingSettings

    if cfg.reference is None:
        raise ValueError("reference=... is missing: shards (FOLDER), or the ADM reference batch (.npz)")
    network = instantiate(cfg.features)
    if network is None:
        raise ValueError(
            "features=... is missing: inception (for FID, sFID, IS) or efficientnet_lite0 (under its own name)"
        )
    if cfg.bootstraps is not None and (cfg.bootstraps < 0 or cfg.bootstraps == 1):
        raise ValueError(f"bootstraps={cfg.bootstraps}: give 2 or more, or 0 for no intervals")
    device = default_device(cfg.device)
    further = {name: instantiate(features) for name, features in cfg.also.items()}

    def evaluate(samples: str | Path, out: str | Path) -> dict[str, Any] | None:
        for name, other in further.items():
            evaluate_with(other, samples, Path(out) / name)
        return evaluate_with(network, samples, Path(out))

    def evaluate_with(network: torch.nn.Module, samples: str | Path, out: Path) -> dict[str, Any] | None:
        result = evaluate_samples(
            str(samples),
            str(cfg.reference),
            network,
            out,
            split=cfg.split or "train",
            num_images=cfg.num_images,
            resize_ratio=cfg.resize_ratio,
            batch_size=cfg.batch_size,
            device=torch.device(device),
            storage=instantiate(cfg.storage),
            preset=cfg.preset,
            metrics=instantiate(cfg.metrics, _convert_="all"),
            bootstraps=cfg.bootstraps,
        )
        if result is not None:
            warnings = [f"  warning: {warning}" for warning in result["warnings"]]
            print_scores(result, "\n".join([*warnings, f"{out}: generation.json"]))
        return result

    if cfg.samples is not None:
        evaluate(cfg.samples, cfg.out)
        return
    tokenizer, var, class_names = load(cfg.checkpoint, trust_code=cfg.trust_code)
    labels = labels_of(None, cfg.grid.num, class_names, var.num_classes)

    def sample(folder: Path, point: dict[str, Any]) -> None:
        write = partial(write_samples, class_names=class_names, seed=cfg.grid.seed, device=device)
        settings = SamplingSettings(point["cfg_scale"], top_k=int(point["top_k"]), top_p=float(point["top_p"]))
        write(folder, tokenizer, var, labels, settings, batch_size=cfg.batch_size)

    points = {name: list(cfg.grid[name]) for name in ("cfg_scale", "top_k", "top_p")}
    best = evaluate_grid(points, sample, lambda folder: evaluate(folder, folder), Path(cfg.out))
    if best:
        print(f"{cfg.out}: grid.csv, grid.png; {best}")


def print_scores(result: dict[str, Any], footer: str) -> None:
    """Prints one line per number."""
    for name, value in result.items():
        if isinstance(value, float | int):
            print(f"{name:60} {value:10.4g}")
    print(footer)


main = hydra_command("evaluate")(run)

if __name__ == "__main__":
    main()

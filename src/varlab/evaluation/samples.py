"""Samples against real images: scores under their right names, with protocol and floor (for `varlab evaluate`)."""

from pathlib import Path

from omegaconf import DictConfig


def evaluate_samples(cfg: DictConfig) -> None:
    """Writes generation.json into `out`: scores of samples against a reference, each with its protocol, and the floor."""
    import torch
    from hydra.utils import instantiate

    from varlab import __version__
    from varlab.distributed import WorkSplit, default_device
    from varlab.evaluation.generation import scores
    from varlab.evaluation.image_sets import ImageSet, cache_file, extract, network_identity
    from varlab.evaluation.published_scores import compare
    from varlab.files import save_json

    share, device = WorkSplit.of_environment(), torch.device(default_device(cfg.device))
    if cfg.reference is None:
        raise ValueError("reference=... is missing: shards (FOLDER), or the ADM reference batch (.npz)")
    network = instantiate(cfg.features)
    if network is None:
        raise ValueError(
            "features=... is missing: inception (for FID, sFID, IS) or efficientnet_lite0 (under its own name)"
        )
    network, samples = network.to(device), ImageSet(cfg.samples)
    identity, name = network_identity(network), name_of(cfg.features)
    made = extract(
        network,
        len(samples),
        lambda indices: samples.batch(indices, device),
        cfg.batch_size,
        cache_file(identity, samples.identity),
        "samples",
        share,
    )
    reference = Reference(cfg, network, identity, samples, device, share)
    if share.rank > 0:
        return
    result = {named(key, name): value for key, value in scores(made, reference.features).items()}
    if reference.statistics:
        result |= {named(key, name): value for key, value in reference.distances(made).items()}
    if reference.other is not None:
        floor = scores(reference.other, reference.features)
        result |= {f"{named(key, name)}/real_against_real": value for key, value in floor.items() if "/" not in key}
    sampling = Path(cfg.samples) / "samples.json"
    protocol = {
        "features": name,
        "features_weights": identity,
        "samples": samples.identity,
        "num_samples": len(samples),
        "resolution": samples.side,
        **reference.protocol,
        "sampling": load_sampling(sampling),
        "varlab": __version__,
    }
    warnings = compare(cfg.preset, protocol)
    out = Path(cfg.out)
    save_json(out / "generation.json", {**result, "protocol": protocol, "preset": cfg.preset, "warnings": warnings})
    print_scores(result)
    for warning in warnings:
        print(f"  beware: {warning}")
    print(f"{out}: generation.json")


def evaluate_grid(cfg: DictConfig) -> None:
    """Samples and scores a VAR at each point of `grid` (cfg_scale x top_k x top_p); writes grid.csv and grid.png into `out`. The
    reference's features are made once; points that are done are not repeated."""
    import csv
    from itertools import product

    from omegaconf import OmegaConf

    from varlab.commands import sample
    from varlab.config import conf_dir
    from varlab.evaluation.plots import curves_of_grid
    from varlab.files import atomic_write, load_json

    out, rows = Path(cfg.out), []
    defaults = OmegaConf.load(Path(conf_dir()) / "sample.yaml")
    for cfg_scale, top_k, top_p in product(cfg.grid.cfg_scale, cfg.grid.top_k, cfg.grid.top_p):
        point = {"cfg_scale": cfg_scale, "top_k": top_k, "top_p": top_p}
        folder = out / "-".join(f"{key}{value:g}" for key, value in point.items())
        drawn = {
            "checkpoint": cfg.checkpoint,
            "out": str(folder),
            "num": cfg.grid.num,
            "seed": cfg.grid.seed,
            "device": cfg.device,
        }
        sample.run(DictConfig(OmegaConf.merge(defaults, {**drawn, **point, "batch_size": cfg.batch_size})))
        evaluate_samples(DictConfig(OmegaConf.merge(cfg, {"samples": str(folder), "out": str(folder)})))
        found = load_json(folder / "generation.json", "varlab evaluate")
        rows.append({**point, **{key: value for key, value in found.items() if isinstance(value, float)}})
        with atomic_write(out / "grid.csv") as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    score = next(key for key in rows[0] if key.startswith(("fid", "frechet_distance")))
    curves_of_grid(rows, score, out / "grid.png")
    best = min(rows, key=lambda row: row[score])
    print(
        f"{out}: grid.csv, grid.png; least {score} {best[score]:.4g} at "
        + ", ".join(f"{key}={best[key]:g}" for key in ("cfg_scale", "top_k", "top_p"))
    )


def load_sampling(file: Path) -> dict | None:
    """How the samples were drawn, where `varlab sample` wrote it down; labels apart."""
    from varlab.files import load_json

    if not file.is_file():
        return None
    return {
        key: value for key, value in load_json(file, "varlab sample").items() if key not in ("labels", "class_names")
    }


class Reference:
    """What samples are compared to: features of real images, statistics of an ADM reference, and other real images as floor."""

    def __init__(self, cfg: DictConfig, network, identity: str, samples, device, share) -> None:
        from hydra.utils import instantiate

        from varlab.data.images import CenterCrops
        from varlab.data.shards import ShardReader, fingerprint
        from varlab.evaluation.image_sets import ImageSet, cache_file, extract, stored_statistics

        self.other, self.statistics = None, {}
        if str(cfg.reference).endswith(".npz"):
            if name_of(cfg.features) == "inception":
                self.statistics = stored_statistics(Path(cfg.reference))
            images = ImageSet(cfg.reference)
            self.features = extract(
                network,
                len(images),
                lambda indices: images.batch(indices, device),
                cfg.batch_size,
                cache_file(identity, images.identity),
                "reference",
                share,
            )
            self.protocol = {"reference": images.identity, "reference_images": len(images), "reference_split": None}
            self.protocol["reference_statistics"] = "stored" if self.statistics else "of the images"
            return

        def of_split(split: str, num_images: int | None):
            reader = ShardReader(cfg.reference, split, instantiate(cfg.storage))
            crops = CenterCrops(reader, samples.side, cfg.resize_ratio, num_images, cfg.batch_size, device)
            parts = [
                identity,
                fingerprint(reader.manifest),
                split,
                str(samples.side),
                str(cfg.resize_ratio),
                str(num_images),
            ]
            read = lambda indices: crops.read([crops.samples[i] for i in indices])  # noqa: E731
            return extract(network, len(crops.samples), read, cfg.batch_size, cache_file(*parts), split, share), reader

        split = cfg.split or "train"
        self.features, reader = of_split(split, cfg.num_images)
        other = "val" if split != "val" else "train"
        if other in reader.manifest["splits"]:
            self.other, _ = of_split(other, len(samples))
        self.protocol = {
            "reference": fingerprint(reader.manifest),
            "reference_images": len(self.features.pooled),
            "reference_split": split,
            "reference_statistics": "of the images",
            "resize_ratio": cfg.resize_ratio,
        }

    def distances(self, made) -> dict[str, float]:
        """Frechet distances to the statistics that the reference file holds."""
        from varlab.evaluation.frechet import frechet_distance, statistics

        names = {"pooled": "frechet_distance", "spatial": "spatial_frechet_distance"}
        return {
            names[kind]: frechet_distance(statistics(getattr(made, kind)), found)
            for kind, found in self.statistics.items()
        }


def named(score: str, network: str) -> str:
    """The field's name of a score with the Inception; with any other network its own name and the network's."""
    score, _, rest = score.partition("/")
    ours = {
        "frechet_distance": "fid",
        "spatial_frechet_distance": "sfid",
        "inception_score": "inception_score",
        "kernel_distance": "kid",
    }
    name = ours.get(score, score) if network == "inception" else f"{score}/{network}"
    return f"{name}/{rest}" if rest else name


def print_scores(result: dict) -> None:
    """One line a number."""
    for name, value in result.items():
        if isinstance(value, float | int):
            print(f"{name:60} {value:10.4g}")


def name_of(node: DictConfig) -> str:
    """What a network's scores are called."""
    target: str = (node.get("network") or node)["_target_"].rpartition(".")[2]
    return {"EfficientNetLite0": "efficientnet_lite0"}.get(target, target.lower())

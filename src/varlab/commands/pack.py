"""`varlab pack`: images -> webdataset shards with a manifest."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Packs a source into `out`, indexes shards of others, or checks packed shards (`verify=true`)."""
    import shutil

    from hydra.utils import instantiate

    from varlab.data.dataset_card import write_card
    from varlab.data.shards import verify
    from varlab.data.sources.folder import usable_cores
    from varlab.data.sources.index_existing import adopt
    from varlab.data.write_shards import images_per_shard, pack

    storage = instantiate(cfg.storage)
    if cfg.verify:
        path = cfg.path or require(cfg, "out", "path=FOLDER (or URL): the packed set to check")
        print(f"{path}: {verify(path, storage)} images, all as packed")
        return
    out, num_workers = Path(require(cfg, "out", "out=FOLDER for the shards")), cfg.num_workers or usable_cores()
    if not 0 <= cfg.val_share < 1:
        raise ValueError(f"val_share={cfg.val_share}: give a share between 0 and 1")
    if cfg.source == "shards":
        patterns = {
            split: require(cfg, split, "train= and val=: paths, globs or URLs of shards") for split in ("train", "val")
        }
        names = Path(cfg.class_names).read_text().splitlines() if cfg.class_names else None
        manifest = adopt(patterns, out, names, storage, num_workers, cfg.max_skipped_share)
    else:
        source = source_of(cfg, out, num_workers)
        shard_images = (
            images_per_shard(source, cfg.shard_size, cfg.short_side, cfg.quality)
            if cfg.shard_size
            else cfg.shard_images
        )
        manifest = pack(source, out, shard_images, cfg.seed, num_workers, cfg.short_side, cfg.quality)
        shutil.rmtree(out / "staging", ignore_errors=True)
    write_card(out, storage)
    counts = ", ".join(f"{split['num_images']} {name}" for name, split in manifest["splits"].items())
    print(f"{out}: {counts} images of {len(manifest['class_names'])} classes; README.md describes them")


def require(cfg: DictConfig, setting: str, what: str) -> str:
    """A setting that this call cannot do without."""
    if cfg[setting] is None:
        raise ValueError(f"{'verify=true' if cfg.verify else f'source={cfg.source}'} needs {what}")
    return cfg[setting]


def source_of(cfg: DictConfig, out: Path, num_workers: int):
    """The images that `source=` stands for."""
    from varlab.data.sources.folder import folder_source, ilsvrc2012_source, mnist5k_source
    from varlab.data.sources.parquet import parquet_source
    from varlab.data.storage import Storage

    if cfg.source == "mnist5k":
        return mnist5k_source(cfg.val_share, cfg.seed)
    if cfg.source == "folder":
        path = require(cfg, "path", "path=FOLDER, which holds one folder for each class")
        return folder_source(Path(path), cfg.val_share, cfg.seed)
    if cfg.source == "ilsvrc2012":
        train, val, devkit = (
            Path(require(cfg, name, "train=, val= and devkit=: the three archives as downloaded"))
            for name in ("train", "val", "devkit")
        )
        return ilsvrc2012_source(train, val, devkit)
    if cfg.source == "parquet":
        patterns = {
            "train": require(cfg, "train", "train= (and val=): parquet files, globs or brace patterns"),
            "val": cfg.val,
        }
        files = {
            split: [Path(file) for file in Storage().expand(pattern)] for split, pattern in patterns.items() if pattern
        }
        return parquet_source(
            files, out / "staging", cfg.image_column, cfg.label_column, cfg.val_share, cfg.seed, num_workers
        )
    raise ValueError(f"source={cfg.source!r} is unknown: choose folder, ilsvrc2012, parquet, shards or mnist5k")


main = verb("pack")(run)

if __name__ == "__main__":
    main()

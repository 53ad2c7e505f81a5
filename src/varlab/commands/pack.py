"""`varlab pack`: images -> webdataset shards with a manifest."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import hydra_command
from varlab.files import FolderLock


def run(cfg: DictConfig) -> None:
    """Packs a source into `out`, or checks packed shards (`verify=true`)."""
    from hydra.utils import instantiate

    from varlab.config import check_types
    from varlab.data.dataset_card import write_card
    from varlab.data.shards import verify
    from varlab.data.sources.items import usable_cores
    from varlab.data.write_shards import PackOptions

    storage = instantiate(cfg.storage)
    if cfg.verify:
        path = cfg.path or cfg.out
        if path is None:
            raise ValueError("verify=true needs path=FOLDER (or URL): the packed set to check")
        print(f"{path}: {verify(path, storage)} images verified")
        return
    if cfg.out is None:
        raise ValueError("out=FOLDER is missing: the folder for the shards")
    if cfg.source not in cfg.sources:
        raise ValueError(f"source={cfg.source!r} is unknown: choose one of {', '.join(cfg.sources)}")
    check_types(cfg)
    out = Path(cfg.out)
    num_workers = cfg.num_workers or usable_cores()
    options = PackOptions(
        cfg.shard_images, cfg.shard_size, cfg.seed, num_workers, cfg.short_side, cfg.quality, cfg.check
    )
    source = instantiate(cfg.sources[cfg.source], _convert_="all")
    with FolderLock(out, "varlab pack"):
        manifest = source.write(out, options)
        write_card(out, storage)
    counts = ", ".join(f"{split['num_images']} {name}" for name, split in manifest["splits"].items())
    print(f"{out}: {counts} images of {len(manifest['class_names'])} classes; README.md describes them")


main = hydra_command("pack")(run)

if __name__ == "__main__":
    main()

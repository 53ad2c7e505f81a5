"""`varlab pack`: images -> webdataset shards with a manifest."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Packs a source into `out`, or checks packed shards (`verify=true`)."""
    from varlab.data.pack import folder_source, mnist5k_source, pack
    from varlab.data.shards import verify

    if cfg.verify:
        print(f"{cfg.out}: {verify(cfg.out)} images, all as packed")
        return
    if not 0 <= cfg.val_share < 1:
        raise ValueError(f"val_share={cfg.val_share}: give a share between 0 and 1")
    if cfg.source == "mnist5k":
        source = mnist5k_source(cfg.val_share, cfg.seed)
    elif cfg.source == "folder":
        if cfg.path is None:
            raise ValueError("source=folder needs path=FOLDER, which holds one folder for each class")
        source = folder_source(Path(cfg.path), cfg.val_share, cfg.seed)
    else:
        raise ValueError(f"source={cfg.source!r} is unknown: choose folder or mnist5k")
    manifest = pack(source, Path(cfg.out), cfg.shard_images, cfg.seed)
    counts = ", ".join(f"{split['num_images']} {name}" for name, split in manifest["splits"].items())
    print(f"{cfg.out}: {counts} images of {len(manifest['class_names'])} classes")


main = verb("pack")(run)

if __name__ == "__main__":
    main()

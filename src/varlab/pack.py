"""`varlab pack`: images -> webdataset shards with a manifest."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Packs a source into `out`, or checks packed shards (`verify=true`)."""
    from varlab.data.card import write_card
    from varlab.data.pack import pack
    from varlab.data.shards import verify
    from varlab.data.sources import folder_source, ilsvrc2012_source, mnist5k_source, usable_cores

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
    elif cfg.source == "ilsvrc2012":
        if None in (cfg.train, cfg.val, cfg.devkit):
            raise ValueError("source=ilsvrc2012 needs train=, val= and devkit=: the three archives as downloaded")
        source = ilsvrc2012_source(Path(cfg.train), Path(cfg.val), Path(cfg.devkit))
    else:
        raise ValueError(f"source={cfg.source!r} is unknown: choose folder, ilsvrc2012 or mnist5k")
    out, num_workers = Path(cfg.out), cfg.num_workers or usable_cores()
    manifest = pack(source, out, cfg.shard_images, cfg.seed, num_workers, cfg.short_side, cfg.quality)
    write_card(out)
    counts = ", ".join(f"{split['num_images']} {name}" for name, split in manifest["splits"].items())
    print(f"{out}: {counts} images of {len(manifest['class_names'])} classes; README.md describes them")


main = verb("pack")(run)

if __name__ == "__main__":
    main()

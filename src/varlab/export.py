"""`varlab export`: checkpoint -> one file."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Writes a checkpoint in another form."""
    import torch

    from varlab import checkpoints
    from varlab.files import whole_file

    if cfg.to != "checkpoint":
        raise ValueError(f"to={cfg.to!r}: choose checkpoint")
    with whole_file(Path(cfg.out)) as partial:
        torch.save(checkpoints.read(cfg.checkpoint), partial)
    print(f"{cfg.out}: one file, for any number of devices (ckpt_path={cfg.out})")


main = verb("export")(run)

if __name__ == "__main__":
    main()

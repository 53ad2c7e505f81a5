"""`varlab import`: the authors' weight files -> folder for use anywhere."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Writes an export folder from released .pth files, which are read without unpickling anything but tensors."""
    from varlab.checkpoints.export_folder import save_pretrained
    from varlab.checkpoints.load import read_checkpoint
    from varlab.checkpoints.released_layout import tokenizer_from_released, var_from_released

    if cfg["from"] != "released":
        raise ValueError(f"from={cfg['from']!r}: choose released")
    patch_nums: Any = OmegaConf.to_container(cfg.patch_nums)
    tokenizer = tokenizer_from_released(inner(read_checkpoint(cfg.tokenizer), "vae_local"), patch_nums)
    var = None if cfg.var is None else var_from_released(inner(read_checkpoint(cfg.var), "var_wo_ddp"), patch_nums)
    names = (
        None
        if cfg.class_names is None
        else Path(cfg.class_names).read_text().split("\n")[: var.num_classes if var else None]
    )
    if names is not None and var is not None and len(names) != var.num_classes:
        raise ValueError(
            f"class_names={cfg.class_names} has {len(names)} lines, the transformer {var.num_classes} classes"
        )
    save_pretrained(Path(cfg.out), tokenizer, var, names, {"made from": "the weights that the VAR authors released"})
    print(f"{cfg.out}: config.json, tokenizer.safetensors{', var.safetensors' if var else ''}, model_card.md")


def inner(checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
    """The network's weights in a weight file or in a checkpoint of the released trainer."""
    return checkpoint["trainer"][key] if "trainer" in checkpoint else checkpoint


main = verb("import")(run)

if __name__ == "__main__":
    main()

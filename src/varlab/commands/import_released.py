"""`varlab import`: the authors' weight files -> export folder."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command


def run(cfg: DictConfig) -> None:
    """Writes an export folder from released .pth files; only tensors in them are unpickled."""
    from varlab.checkpoints.export_folder import save_pretrained
    from varlab.checkpoints.released_layout import load_released
    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR

    if cfg["from"] != "released":
        raise ValueError(f"from={cfg['from']!r}: choose released")
    patch_nums: Any = OmegaConf.to_container(cfg.patch_nums)
    tokenizer = load_released(cfg.tokenizer, patch_nums)
    var = None if cfg.var is None else load_released(cfg.var, patch_nums)
    if not isinstance(tokenizer, MSVQVAE):
        raise ValueError(f"tokenizer={cfg.tokenizer} holds a VAR: give the tokenizer's file, and this one as var=")
    if var is not None and not isinstance(var, VAR):
        raise ValueError(f"var={cfg.var} holds a tokenizer: give the file of a VAR")
    names = None if cfg.class_names is None else Path(cfg.class_names).read_text(encoding="utf-8").splitlines()
    if names is not None and var is not None and len(names) != var.num_classes:
        raise ValueError(
            f"class_names={cfg.class_names} has {len(names)} lines, but the transformer has {var.num_classes} classes"
        )
    save_pretrained(Path(cfg.out), tokenizer, var, names, {"made from": "the weights that the VAR authors released"})
    print(f"{cfg.out}: config.json, tokenizer.safetensors{', var.safetensors' if var else ''}, README.md")


main = hydra_command("import")(run)

if __name__ == "__main__":
    main()

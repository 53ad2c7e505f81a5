"""`varlab export`: checkpoint -> export folder, the released layout, one file, a low-rank adapter, or an exported program."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from varlab.config import hydra_command

FORMS = ("safetensors", "adapter", "released", "checkpoint", "torch_export", "onnx")
FACTS = ("images_seen", "epochs", "val_loss", "val_psnr", "flops_exact", "dataset_id", "tokenizer_id", "git_commit")


def run(cfg: DictConfig) -> None:
    """Writes a checkpoint in another format."""
    import torch

    from varlab.checkpoints import hub
    from varlab.checkpoints.adapters import save_adapter
    from varlab.checkpoints.export_folder import save_pretrained
    from varlab.checkpoints.load import load, load_any, read_checkpoint, weights
    from varlab.checkpoints.released_layout import to_released
    from varlab.files import atomic_write

    if cfg.to not in FORMS:
        raise ValueError(f"to={cfg.to!r}: choose one of {', '.join(FORMS)}")
    if cfg.precision not in ("fp32", "bf16") or (cfg.precision == "bf16" and cfg.to != "safetensors"):
        raise ValueError(f"precision={cfg.precision!r}: choose fp32, or bf16 with to=safetensors")
    if cfg.hub is not None and cfg.to != "safetensors":
        raise ValueError("hub=... uploads an export folder: leave out to=...")
    if cfg.hub is not None:
        hub.check_name(cfg.hub)
    out = Path(cfg.out)
    if cfg.to == "checkpoint":
        with atomic_write(out) as partial:
            torch.save(read_checkpoint(training_checkpoint(cfg)), partial)
        print(f"{out}: one file, for any number of devices (ckpt_path={out})")
        return
    if cfg.to == "adapter":
        if cfg.base is None:
            raise ValueError("to=adapter needs base=... : the model that was tuned (folder, checkpoint or name)")
        state = weights(read_checkpoint(training_checkpoint(cfg)), "net.", cfg.ema)
        tokenizer, var, class_names = load(cfg.checkpoint, cfg.ema, cfg.trust_code)
        base = load(cfg.base, trust_code=cfg.trust_code)[:2]
        save_adapter(out, str(cfg.base), base, state, (tokenizer, var), class_names)
        print(f"{out}: config.json, adapter.safetensors; it needs {cfg.base}")
        return
    tokenizer, var, class_names = load_any(cfg.checkpoint, cfg.ema, cfg.patch_nums, trust_code=cfg.trust_code)
    if cfg.to == "safetensors":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
        save_pretrained(out, tokenizer, var, class_names, facts_of(Path(cfg.checkpoint)), dtype, cfg.hub)
        print(f"{out}: config.json, tokenizer.safetensors, {'var.safetensors, ' if var else ''}README.md")
        if cfg.hub is not None:
            try:
                print(hub.upload(out, cfg.hub))
            except ValueError as error:
                raise ValueError(f"{error}; {out} is complete: `hf upload {cfg.hub} {out}` tries again") from None
    elif cfg.to == "released":
        networks = {"tokenizer": tokenizer} if var is None else {"tokenizer": tokenizer, "var": var}
        states = {name: to_released(network) for name, network in networks.items()}
        for name, state in states.items():
            with atomic_write(out / f"{name}.pth") as partial:
                torch.save(state, partial)
        print(f"{out}: tokenizer.pth{', var.pth' if var else ''}, as the released code loads them")
    else:
        from varlab.checkpoints import programs

        print(programs.write(out, tokenizer, var, is_onnx=cfg.to == "onnx"))


def training_checkpoint(cfg: DictConfig) -> Path:
    """The checkpoint, unless it is an export folder. Raises ValueError for one."""
    from varlab.checkpoints.export_folder import is_pretrained
    from varlab.checkpoints.load import located

    path = located(cfg.checkpoint)
    if is_pretrained(path):
        raise ValueError(f"to={cfg.to} needs a training checkpoint; {cfg.checkpoint} is an export folder")
    return path


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """Facts for the model card, from the run.json of the checkpoint's run."""
    row = checkpoint.parent.parent / "run.json"
    found = json.loads(row.read_text(encoding="utf-8")) if row.is_file() else {}
    return {key: found[key] for key in FACTS if found.get(key) is not None}


main = hydra_command("export")(run)

if __name__ == "__main__":
    main()

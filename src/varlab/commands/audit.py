"""`varlab audit`: membership inference and memorization of a VAR."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import hydra_command


def run(cfg: DictConfig) -> None:
    """Writes the audit of one checkpoint."""
    import torch
    from hydra.utils import instantiate

    from varlab.checkpoints.load import load, located
    from varlab.distributed import default_device
    from varlab.evaluation.audit import audit, card_line

    tokenizer, var, _ = load(cfg.checkpoint, trust_code=cfg.trust_code)
    found = audit(
        tokenizer,
        var,
        str(cfg.shards),
        Path(cfg.out),
        samples=None if cfg.samples is None else str(cfg.samples),
        num_images=cfg.num_images,
        resize_ratio=cfg.resize_ratio,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        device=torch.device(default_device(cfg.device)),
        storage=instantiate(cfg.storage),
    )
    for name, scores in found["membership"].items():
        low, high = scores["auc_interval"]
        found_at = "" if scores["tpr"] is None else f", {100 * scores['tpr']:.1f} % found at 1 % false positives"
        print(f"{name:16} AUC {scores['auc']:.3f} ({low:.3f} to {high:.3f}){found_at}")
    for name, value in found.get("memorization", {}).items():
        print(f"{name} {value:.4g}")
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    card = located(cfg.checkpoint) / "README.md"
    written = f"{cfg.out}: audit.json, audit.png"
    if card.is_file() and Path(cfg.checkpoint).exists():  # not one that is installed with varlab
        card.write_text(card_line(card.read_text(encoding="utf-8"), found), encoding="utf-8")
        written += f"; a line in {card}"
    print(written)


main = hydra_command("audit")(run)

if __name__ == "__main__":
    main()

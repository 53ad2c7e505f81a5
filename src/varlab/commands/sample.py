"""`varlab sample`: checkpoint -> PNG images or an ADM-format .npz, class grid, filmstrip of scales."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command
from varlab.files import FolderLock

SETTINGS = ("cfg_scale", "cfg_schedule", "cfg_from", "temperature", "top_k", "top_p", "min_p", "smooth")


def run(cfg: DictConfig) -> None:
    """Generates `num` images, split over the processes of torchrun."""
    import numpy as np
    from hydra.utils import instantiate

    from varlab.checkpoints.load import load
    from varlab.distributed import WorkSplit, default_device
    from varlab.models.conditioning import TextEmbedder
    from varlab.models.text_encoder import text_encoder_of, texts_of
    from varlab.sampling.sample_folder import labels_like, labels_of, read_conditions, write_samples
    from varlab.sampling.shapes import at_size
    from varlab.sampling.token_sampling import SamplingSettings

    if cfg.num < 1 or cfg.batch_size < 1:
        raise ValueError(f"num={cfg.num} and batch_size={cfg.batch_size} must be positive")
    if not isinstance(cfg.best_of, int) or cfg.best_of < 1:
        raise ValueError(f"best_of={cfg.best_of}: give the number of candidates per image, 1 or more")
    if cfg.scorer is not None and cfg.best_of == 1:
        raise ValueError("scorer=... chooses among candidates: give best_of=2 or more, too")
    if cfg.precision not in (None, "fp32", "bf16"):
        raise ValueError(f"precision={cfg.precision!r}: choose fp32 or bf16")
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    tokenizer, var, class_names = load(cfg.checkpoint, trust_code=cfg.trust_code)
    tokenizer, var = at_size(tokenizer, var, given["image_size"])
    shape = var.embedder.condition_shape
    chosen = [f"{name}={given[name]}" for name in ("classes", "text", "condition") if given[name] is not None]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one of them")
    texts = None if cfg.text is None else texts_of(given["text"], cfg.num)
    if shape and cfg.condition is None and texts is None:
        wanted = "text='...'" if isinstance(var.embedder, TextEmbedder) else "condition=FILE.npy"
        what = "images" if var.embedder.kind == "image" else "vectors"
        raise ValueError(f"this network takes no class label: give {wanted}, {what} of shape {shape}")
    if texts is not None:
        conditions = text_encoder_of(var, cfg.text_encoder)(texts).numpy()
    elif cfg.condition is not None:
        conditions = read_conditions(cfg.condition, cfg.num, var.embedder)
    elif given["classes"] == "data":
        if cfg.shards is None:
            raise ValueError("classes=data draws classes in the proportions of a data set: give shards=FOLDER")
        conditions = labels_like(str(cfg.shards), cfg.split, cfg.num, var.num_classes)
    else:
        conditions = labels_of(given["classes"], cfg.num, class_names, var.num_classes)
    work = WorkSplit.of_environment()
    with FolderLock(Path(cfg.out), "varlab sample", work.rank, work.num_ranks):
        write_samples(
            Path(cfg.out),
            tokenizer,
            var,
            conditions,
            SamplingSettings(**{name: given[name] for name in SETTINGS}),
            class_names=class_names,
            device=default_device(cfg.device),
            **{name: cfg[name] for name in ("seed", "batch_size", "precision", "compiled", "npz", "grid", "film_rows")},
            best_of=cfg.best_of,
            scorer=instantiate(cfg.scorer),
            scorer_settings=given["scorer"],
            texts=texts,
        )
    if work.rank == 0:
        if not isinstance(conditions, np.ndarray):
            drawn = list(dict.fromkeys(int(label) for label in conditions))
            shown = [class_names[label] if label < len(class_names) else str(label) for label in drawn[:20]]
            print(f"classes: {', '.join(shown)}{', ...' if len(drawn) > 20 else ''}")
        place = "samples.npz" if cfg.npz else "images/"
        print(f"{cfg.out}: {cfg.num} images in {place}, grid.png, filmstrip.png (coarse to fine), samples.json")


main = hydra_command("sample")(run)

if __name__ == "__main__":
    main()

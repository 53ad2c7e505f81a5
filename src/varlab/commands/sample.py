"""`varlab sample`: checkpoint -> PNG images or an ADM-format .npz, class grid, filmstrip of scales."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import verb

DRAWING = ("cfg_scale", "cfg_schedule", "cfg_from", "temperature", "top_k", "top_p", "min_p", "smooth")


def run(cfg: DictConfig) -> None:
    """Draws `num` images; image i has seed `seed + i` and is the same whatever batch size, devices and restarts.

    Under torchrun the processes share the images out. Images that are there are not drawn again.
    """
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from varlab import image_grid
    from varlab.checkpoints.load import load
    from varlab.distributed import WorkSplit, default_device, wait_for_files
    from varlab.files import save_json
    from varlab.sampling.generate import compile_scales, decode, generate_tokens
    from varlab.sampling.token_sampling import SamplingSettings

    if cfg.num < 1 or cfg.batch_size < 1:
        raise ValueError(f"num={cfg.num} and batch_size={cfg.batch_size} must be positive")
    share, device = WorkSplit.of_environment(), default_device(cfg.device)
    tokenizer, var, class_names = load(cfg.checkpoint)
    tokenizer, var = tokenizer.to(device), var.to(device)
    if cfg.is_compiled:
        compile_scales(var)
    labels = labels_of(cfg, class_names, var.num_classes)
    drawing: dict[str, Any] = {key: plain(cfg[key]) for key in DRAWING}
    settings, out = SamplingSettings(**drawing), Path(cfg.out)
    settings.by_scale(
        len(var.patch_nums), tokenizer.sizes["codebook_size"]
    )  # wrong ones are named before anything is written
    protocol = {"checkpoint": checkpoint_id(tokenizer, var), **drawing, "seed": cfg.seed, "precision": cfg.precision}
    begin(out, {**protocol, "rounding": "nearest", "labels": labels}, is_first=share.rank == 0)

    files = [out / "images" / f"{i:06d}-class{label:04d}.png" for i, label in enumerate(labels)]
    own = range(cfg.num)[share.rank :: share.num_ranks]  # by number, whatever the others have drawn by now
    missing = [i for i in own if not files[i].is_file()]
    batches = [missing[first : first + cfg.batch_size] for first in range(0, len(missing), cfg.batch_size)]
    for chunk in tqdm(batches, desc="sample", unit="batch", disable=share.rank > 0):
        filled = chunk + chunk[-1:] * (
            cfg.batch_size - len(chunk) if cfg.is_compiled else 0
        )  # no programs for the rest
        chosen = torch.tensor([labels[i] for i in filled], device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            f_hat, _ = generate_tokens(var, tokenizer, chosen, settings, seed=[cfg.seed + i for i in filled])
            images = decode(tokenizer, f_hat[: len(chunk)])
        for i, pixels in zip(chunk, image_grid.to_uint8(images), strict=True):
            image_grid.save(Image.fromarray(pixels), files[i])
    if share.rank > 0:
        return
    wait_for_files(files)
    few = torch.tensor(labels[: cfg.film_rows], device=device)
    with torch.no_grad():
        _, token_maps = generate_tokens(
            var, tokenizer, few, SamplingSettings(**{**drawing, "smooth": False}), seed=cfg.seed
        )
        strip = tokenizer.filmstrip(token_maps) / 2 + 0.5
    image_grid.save(image_grid.grid(image_grid.columns_of(*strip), columns=len(strip)), out / "filmstrip.png")
    shown = torch.stack([image_grid.read(file) for file in files[: cfg.grid]])
    image_grid.save(image_grid.grid(shown, len(set(labels)) if len(set(labels)) <= 10 else 10), out / "grid.png")
    if cfg.npz:
        image_grid.save_npz(files, out / "samples.npz")
    finished = {**protocol, "num": cfg.num, "classes": sorted(set(labels)), "class_names": class_names}
    save_json(out / "samples.json", {**finished, "rounding": "nearest", "labels": labels})
    npz = ", samples.npz" if cfg.npz else ""
    print(f"{out}: {cfg.num} images in images/, grid.png, filmstrip.png (coarse to fine), samples.json{npz}")


def plain(value: Any) -> Any:
    """A setting as Python's own list or number."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def labels_of(cfg: DictConfig, class_names: list[str], num_classes: int) -> list[int]:
    """The class of each image: the given ones (numbers or names) in turn, so that they come equally often."""
    from varlab.pipeline import label_of

    given = plain(cfg.classes)
    if given in (None, "balanced"):
        classes = list(range(num_classes))
        if given == "balanced" and cfg.num % num_classes:
            raise ValueError(
                f"num={cfg.num} does not divide evenly among {num_classes} classes: classes=balanced wants it to"
            )
    else:
        classes = [
            label_of(label, class_names, num_classes) for label in (given if isinstance(given, list) else [given])
        ]
    return [classes[i % len(classes)] for i in range(cfg.num)]


def checkpoint_id(tokenizer: Any, var: Any) -> str:
    """Identity of the weights, 16 hex digits each for tokenizer and transformer."""
    from varlab.checkpoints.export_folder import fingerprint, tokenizer_fingerprint

    return f"{tokenizer_fingerprint(tokenizer)}-{fingerprint(var)}"


def begin(out: Path, protocol: dict[str, Any], is_first: bool) -> None:
    """Notes what a folder of samples is made with. Raises ValueError when it holds some that were made with other settings."""
    from varlab.files import load_json, save_json

    file = out / "begun.json"
    if file.is_file():
        before = load_json(file, "varlab sample")
        count = min(len(before["labels"]), len(protocol["labels"]))
        cut = [{**one, "labels": one["labels"][:count]} for one in (before, protocol)]
        changed = [key for key in protocol if cut[0].get(key) != cut[1][key]]
        if changed:
            raise ValueError(
                f"{out} holds images made with other settings ({', '.join(changed)}): choose another out=..."
            )
    if is_first:
        save_json(file, protocol)


main = verb("sample")(run)

if __name__ == "__main__":
    main()

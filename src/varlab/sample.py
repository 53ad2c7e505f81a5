"""`varlab sample`: checkpoint -> class grid, filmstrip of scales, PNG images."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb


def run(cfg: DictConfig) -> None:
    """Draws `num` images, classes in turn; image i has seed `seed + i` and is the same whatever the batch size."""
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from varlab import checkpoints, pictures
    from varlab.drawing import Settings
    from varlab.files import save_json
    from varlab.sampling import decode, generate_tokens

    if cfg.num < 1 or cfg.batch_size < 1:
        raise ValueError(f"num={cfg.num} and batch_size={cfg.batch_size} must be positive")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, var, class_names = checkpoints.load(cfg.checkpoint)
    tokenizer, var = tokenizer.to(device), var.to(device)
    classes = list(range(var.num_classes)) if cfg.classes is None else list(cfg.classes)
    labels = torch.tensor([classes[i % len(classes)] for i in range(cfg.num)], device=device)
    out, images, token_maps = Path(cfg.out), [], []
    settings = {"cfg_scale": cfg.cfg_scale, "top_k": cfg.top_k, "top_p": cfg.top_p, "smooth": cfg.smooth}
    for first in tqdm(range(0, cfg.num, cfg.batch_size), desc="sample", unit="batch"):
        chunk = labels[first : first + cfg.batch_size]
        seeds = list(range(cfg.seed + first, cfg.seed + first + len(chunk)))
        f_hat, tokens = generate_tokens(var, tokenizer, chunk, Settings(**settings), seed=seeds)
        with torch.no_grad():
            batch = decode(tokenizer, f_hat)
        images.append(batch.cpu())
        token_maps.append(tokens)
        for i, pixels in enumerate(pictures.to_uint8(batch), start=first):
            pictures.save(Image.fromarray(pixels), out / "images" / f"{i:06d}-class{int(labels[i]):04d}.png")
    shown = torch.cat(images)[: cfg.grid]
    columns = len(classes) if len(classes) <= 10 else 10
    pictures.save(pictures.grid(shown, columns), out / "grid.png")
    first_maps = [tokens[: cfg.film_rows] for tokens in token_maps[0]]
    with torch.no_grad():
        strip = tokenizer.filmstrip(first_maps) / 2 + 0.5
    pictures.save(pictures.grid(pictures.columns_of(*strip), columns=len(strip)), out / "filmstrip.png")
    protocol = {
        "checkpoint": str(cfg.checkpoint),
        **settings,
        "seed": cfg.seed,
        "num": cfg.num,
        "classes": classes,
        "class_names": class_names,
    }
    save_json(out / "samples.json", {**protocol, "rounding": "nearest", "labels": labels.tolist()})
    print(f"{out}: {cfg.num} images in images/, grid.png, filmstrip.png (coarse to fine), samples.json")


main = verb("sample")(run)

if __name__ == "__main__":
    main()

"""`varlab edit`: inpainting, outpainting, class-conditional editing and super-resolution of an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR


def run(cfg: DictConfig) -> None:
    """Writes `num` edits of one image, edit.png (original | mask | results, or for super-resolution bicubic | results) and edit.json
    with errors and settings."""
    from varlab.checkpoints.load import load
    from varlab.data.decoding import open_image
    from varlab.distributed import default_device, use_exact_fp32
    from varlab.sampling.acceleration import default_precision, use_bf16

    if not isinstance(cfg.num, int) or cfg.num < 1:
        raise ValueError(f"num={cfg.num}: give the number of images, 1 or more")
    if not isinstance(cfg.composite, bool):
        raise ValueError(f"composite={cfg.composite}: give true or false")
    device = default_device(cfg.device)
    tokenizer, var, names = load(cfg.checkpoint, trust_code=cfg.trust_code)
    precision = default_precision(device)
    use_exact_fp32()  # the encoder's
    if precision == "bf16":
        use_bf16(tokenizer, var)
    tokenizer, var = tokenizer.to(device), var.to(device)
    image = open_image(cfg.image, f"image={cfg.image}")
    given: Any = OmegaConf.to_container(cfg)
    if given["upscale"] is None:
        results, record = edited(cfg, given, tokenizer, var, names, image)
    else:
        results, record = upscaled(given, tokenizer, var, image)
    names_of_settings = ("checkpoint", "image", "num", "seed", "composite")
    write_results(
        Path(cfg.out), *results, {**{name: given[name] for name in names_of_settings}, "precision": precision, **record}
    )


def edited(
    cfg: DictConfig, given: dict[str, Any], tokenizer: "MSVQVAE", var: "VAR", names: list[str], image: "Image.Image"
) -> tuple[tuple["Tensor", "Tensor"], dict[str, Any]]:
    """((results, images of the sheet), record) of zero-shot editing."""
    from dataclasses import asdict

    import torch

    from varlab.data.images import Crop, preprocess, to_tensor
    from varlab.data.resolutions import nearest_shape
    from varlab.models.conditioning import label_of
    from varlab.models.text_encoder import text_encoder_of, texts_of
    from varlab.sampling.editing import composite, edit, edit_errors, latent_mask
    from varlab.sampling.shapes import at_size, trained_sizes

    device, resolution = var.head.weight.device, given["image_size"]
    if resolution is None:
        resolution = nearest_shape((image.height, image.width), trained_sizes(tokenizer, var))
    tokenizer, var = at_size(tokenizer, var, resolution)
    size = tokenizer.image_size
    original = to_tensor([preprocess(image, size, 1.0, Crop())]).to(device).repeat(cfg.num, 1, 1, 1)
    keep = mask_of(cfg, image.size, size).to(device)
    shape = var.embedder.condition_shape
    condition = var.embedder.null(torch.zeros(cfg.num, *shape, dtype=torch.float32 if shape else torch.int64))
    if cfg.text is not None and cfg.label is not None:
        raise ValueError(f"text={cfg.text} and label={cfg.label}: give one of them")
    if cfg.text is not None:
        condition = text_encoder_of(var, cfg.text_encoder)(texts_of(cfg.text, cfg.num))
    elif cfg.label is not None:
        if shape:
            raise ValueError(f"label={cfg.label}: this network takes no class label")
        condition.fill_(label_of(str(cfg.label), names, var.num_classes))
    settings = {key: given[key] for key in ("cfg_scale", "top_k", "top_p", "smooth", "strength", "blend")}
    latent = latent_mask(keep, tokenizer.quantizer.sides[-1])
    drawn = edit(var, tokenizer, original, latent, condition.to(device), seed=cfg.seed, **settings)
    pixels = original / 2 + 0.5
    before = edit_errors(drawn, pixels, keep)
    results = composite(drawn, pixels, keep, cfg.feather) if cfg.composite else drawn
    print(
        f"before compositing: mean error outside the mask {before.outside:.1f} levels,"
        f" seam {before.seam:.1f} (usual step {before.usual:.1f})"
    )
    return (results, torch.cat([pixels[:1], (1 - keep).expand(1, 3, -1, -1), results])), {
        **({"text": cfg.text} if shape else {"label": int(condition[0])}),
        **settings,
        "fitted": how_fitted(image, size),
        "errors_in_levels": {"network": asdict(before), "result": asdict(edit_errors(results, pixels, keep))},
    }


def upscaled(
    given: dict[str, Any], tokenizer: "MSVQVAE", var: "VAR", image: "Image.Image"
) -> tuple[tuple["Tensor", "Tensor"], dict[str, Any]]:
    """((results, images of the sheet), record) of super-resolution. A photo as large as the results is reduced as in training."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from varlab.data.images import Crop, block_means, preprocess, to_tensor
    from varlab.sampling.upscaling import match_means, upscale, upscaling_factor

    factor, (height, width) = upscaling_factor(var, tokenizer), tokenizer.image_size
    size = height // factor, width // factor
    if given["upscale"] != factor:
        raise ValueError(
            f"upscale={given['upscale']!r}: this network turns {size[0]} x {size[1]} pixels into {height} x {width}: give upscale={factor}"
        )
    defaults = {"outpaint": False, "strength": 1.0, "blend": "tokens", "feather": 0}
    defaults |= dict.fromkeys(("mask", "box", "label", "text", "text_encoder", "image_size"))
    useless = [f"{name}={given[name]}" for name, value in defaults.items() if given[name] != value]
    if useless:
        raise ValueError(f"upscale={factor} and {' and '.join(useless)}: super-resolution takes the image alone")
    is_large = image.height >= height and image.width >= width
    pixels = np.asarray(preprocess(image, (height, width) if is_large else size, 1.0, Crop()))
    pixels = block_means(pixels, factor) if is_large else pixels
    small = to_tensor([pixels]).to(var.head.weight.device).repeat(given["num"], 1, 1, 1)
    settings = {key: given[key] for key in ("cfg_scale", "top_k", "top_p", "smooth")}
    drawn = upscale(var, tokenizer, small, seed=given["seed"], composite=False, **settings)
    results = match_means(drawn, small / 2 + 0.5) if given["composite"] else drawn
    errors = {
        name: 255 * float((F.avg_pool2d(images, factor) - small / 2 - 0.5).abs().mean())
        for name, images in (("network", drawn), ("result", results))
    }
    print(f"before compositing: the means of the blocks differ from the image by {errors['network']:.1f} levels")
    bicubic = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    shown = torch.cat([to_tensor([bicubic]).to(results) / 2 + 0.5, results])
    record = {"upscale": factor, **settings, "fitted": how_fitted(image, size), "errors_in_levels": errors}
    return (results, shown), record


def write_results(out: Path, results: "Tensor", shown: "Tensor", record: dict[str, Any]) -> None:
    """Writes the results, the sheet and the record, and removes results of an earlier call."""
    from PIL import Image

    from varlab import image_grid
    from varlab.files import save_json

    for i, array in enumerate(image_grid.to_uint8(results)):
        image_grid.save(Image.fromarray(array), out / f"edit-{i:03d}.png")
    for file in out.glob("edit-[0-9][0-9][0-9].png"):
        if int(file.stem[-3:]) >= len(results):
            file.unlink()
    image_grid.save(image_grid.grid(shown.cpu(), columns=len(shown)), out / "edit.png")
    save_json(out / "edit.json", {**record, "checkpoint": str(record["checkpoint"]), "image": str(record["image"])})
    what = "bicubic | results" if "upscale" in record else "original | mask | results"
    print(f"{out}: {len(results)} results, edit.png ({what}), edit.json; image: {record['fitted']}")


def how_fitted(image: "Image.Image", size: tuple[int, int]) -> str:
    """What `preprocess` makes of an image, for the record."""
    (height, width), scale = size, min(image.width / size[1], image.height / size[0])
    return f"center crop of {round(height * scale)} x {round(width * scale)} pixels, resized to {height} x {width}"


def mask_of(cfg: DictConfig, given: tuple[int, int], size: tuple[int, int]):
    """Mask of `size` (H W), 1 where the image is kept, from `mask` (an image as large as the `given` one, white where to edit) or
    `box`."""
    import numpy as np
    import torch
    from PIL import Image

    from varlab.data.decoding import open_mask
    from varlab.data.images import Crop, preprocess
    from varlab.sampling.editing import box_mask

    if (cfg.mask is None) == (cfg.box is None):
        raise ValueError("give either mask=FILE (white where to edit) or box=[y0,x0,y1,x1] (fractions of the side)")
    if cfg.mask is None:
        if (
            len(cfg.box) != 4
            or not all(0 <= x <= 1 for x in cfg.box)
            or cfg.box[0] >= cfg.box[2]
            or cfg.box[1] >= cfg.box[3]
        ):
            raise ValueError(f"box={list(cfg.box)}: give y0, x0, y1, x1 between 0 and 1, y0 < y1, x0 < x1")
        y0, x0, y1, x1 = (float(share) for share in cfg.box)
        region = box_mask((y0, x0, y1, x1), size)
    else:
        mask = Image.fromarray(255 * open_mask(cfg.mask).astype(np.uint8))
        if mask.size != given:
            raise ValueError(f"mask={cfg.mask} is {mask.size} pixels, but the image is {given}")
        array = preprocess(mask.convert("RGB"), size, 1.0, Crop())
        region = torch.from_numpy((np.asarray(array)[..., 0] > 127).astype(np.float32))
    if not region.any():
        raise ValueError("the mask is empty: nothing would be edited")
    return region if cfg.outpaint else 1 - region


main = hydra_command("edit")(run)

if __name__ == "__main__":
    main()

"""`varlab edit`: inpainting, outpainting, class-conditional editing and super-resolution of an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command

if TYPE_CHECKING:
    from PIL import Image

    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR


def run(cfg: DictConfig) -> None:
    """Writes `num` edits of one image, edit.png (original | mask | results, or for super-resolution bicubic | results) and edit.json
    with errors and settings."""
    from dataclasses import asdict

    import torch
    from PIL import Image

    from varlab import image_grid
    from varlab.checkpoints.load import load
    from varlab.data.decoding import open_image
    from varlab.data.images import Crop, preprocess, to_tensor
    from varlab.data.resolutions import nearest_shape
    from varlab.distributed import default_device, use_exact_fp32
    from varlab.files import save_json
    from varlab.models.conditioning import label_of
    from varlab.models.text_encoder import text_encoder_of, texts_of
    from varlab.sampling.acceleration import default_precision, use_bf16
    from varlab.sampling.editing import composite, edit, edit_errors, latent_mask
    from varlab.sampling.shapes import at_size, trained_sizes

    if cfg.num < 1:
        raise ValueError(f"num={cfg.num} must be positive")
    device = default_device(cfg.device)
    tokenizer, var, names = load(cfg.checkpoint, trust_code=cfg.trust_code)
    precision = default_precision(device)
    use_exact_fp32()  # the encoder's
    if precision == "bf16":
        use_bf16(tokenizer, var)
    tokenizer, var = tokenizer.to(device), var.to(device)
    image = open_image(cfg.image, f"image={cfg.image}")
    if cfg.upscale is not None:
        return write_upscaled(cfg, tokenizer, var, image, precision)
    given: Any = OmegaConf.to_container(cfg)
    resolution = given["image_size"]
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
    settings = {key: cfg[key] for key in ("cfg_scale", "top_k", "top_p", "smooth", "strength", "blend")}
    edited = edit(
        var,
        tokenizer,
        original,
        latent_mask(keep, tokenizer.quantizer.sides[-1]),
        condition.to(device),
        seed=cfg.seed,
        **settings,
    )
    pixels = original / 2 + 0.5
    before = edit_errors(edited, pixels, keep)
    results = composite(edited, pixels, keep, cfg.feather) if cfg.composite else edited
    errors = {"network": asdict(before), "result": asdict(edit_errors(results, pixels, keep))}
    out = Path(cfg.out)
    for i, array in enumerate(image_grid.to_uint8(results)):
        image_grid.save(Image.fromarray(array), out / f"edit-{i:03d}.png")
    shown = torch.cat([pixels[:1], (1 - keep).expand(1, 3, -1, -1), results]).cpu()
    image_grid.save(image_grid.grid(shown, columns=len(shown)), out / "edit.png")
    protocol = {
        "checkpoint": str(cfg.checkpoint),
        "image": str(cfg.image),
        **({"text": cfg.text} if shape else {"label": int(condition[0])}),
        "seed": cfg.seed,
        "precision": precision,
        **settings,
    }
    fitted = how_fitted(image, size)
    save_json(out / "edit.json", {**protocol, "fitted": fitted, "errors_in_levels": errors})
    print(f"{out}: {cfg.num} edits, edit.png (original | mask | results), edit.json; image: {fitted}")
    print(
        f"before compositing: mean error outside the mask {before.outside:.1f} levels,"
        f" seam {before.seam:.1f} (usual step {before.usual:.1f})"
    )


def write_upscaled(cfg: DictConfig, tokenizer: "MSVQVAE", var: "VAR", image: "Image.Image", precision: str) -> None:
    """Writes `num` larger versions of one image."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from varlab import image_grid
    from varlab.data.images import Crop, preprocess, to_tensor
    from varlab.files import save_json
    from varlab.sampling.upscaling import match_means, upscale, upscaling_factor

    factor, (height, width) = upscaling_factor(var, tokenizer), tokenizer.image_size
    size = height // factor, width // factor
    if cfg.upscale != factor:
        raise ValueError(
            f"upscale={cfg.upscale}: this network turns {size[0]} x {size[1]} pixels into {height} x {width}: give upscale={factor}"
        )
    useless = [
        f"{name}={cfg[name]}" for name in ("mask", "box", "label", "text", "image_size") if cfg[name] is not None
    ]
    if useless:
        raise ValueError(f"upscale={cfg.upscale} and {' and '.join(useless)}: super-resolution takes the image alone")
    pixels = np.asarray(preprocess(image, size, 1.0, Crop()))
    given = to_tensor([pixels]).to(var.head.weight.device).repeat(cfg.num, 1, 1, 1)
    settings = {key: cfg[key] for key in ("cfg_scale", "top_k", "top_p", "smooth")}
    drawn = upscale(var, tokenizer, given, seed=cfg.seed, composite=False, **settings)
    results = match_means(drawn, given / 2 + 0.5) if cfg.composite else drawn
    errors = {
        name: 255 * float((F.avg_pool2d(images, factor) - given / 2 - 0.5).abs().mean())
        for name, images in (("network", drawn), ("result", results))
    }
    out = Path(cfg.out)
    for i, array in enumerate(image_grid.to_uint8(results)):
        image_grid.save(Image.fromarray(array), out / f"edit-{i:03d}.png")
    bicubic = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    shown = torch.cat([to_tensor([bicubic]) / 2 + 0.5, results.cpu()])
    image_grid.save(image_grid.grid(shown, columns=len(shown)), out / "edit.png")
    fitted = how_fitted(image, size)
    protocol = {"checkpoint": str(cfg.checkpoint), "image": str(cfg.image), "upscale": factor, "seed": cfg.seed}
    save_json(
        out / "edit.json",
        {**protocol, "precision": precision, **settings, "fitted": fitted, "errors_in_levels": errors},
    )
    print(
        f"{out}: {cfg.num} images of {height} x {width} pixels, edit.png (bicubic | results), edit.json; image: {fitted}"
    )
    print(f"before compositing: the means of the blocks differ from the image by {errors['network']:.1f} levels")


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

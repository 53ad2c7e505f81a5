"""The one way to open images and masks: files of users, members of shards, uploads -> 8-bit RGB, or a reason why not."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from varlab.files import reason_of

try:
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
except ImportError:
    pass
Image.init()
FORMATS = sorted(set(Image.OPEN) - {"EPS"})  # EPS is a program, run by Ghostscript


def open_image(
    source: bytes | str | Path | IO[bytes],
    name: str | Callable[[], str] = "the image",
    max_pixels: int | None = None,
) -> Image.Image:
    """Any image as 8-bit RGB, upright: EXIF rotation applied, 16-bit gray and floats scaled down, alpha composited on
    white, CMYK converted, the first frame of an animation.

    `name`: what an error calls the image, or a function that looks it up. `max_pixels`: refuses larger images before they
    are decoded. Raises ValueError naming the image for whatever a decoder cannot read, and for values whose range is not
    clear (12-bit values, floats above 1).
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {max_pixels:,}")
            return upright_rgb(image)
    except Exception as error:  # decoders raise errors of many kinds for broken files
        reason = reason_of(error)
        if isinstance(error, UnidentifiedImageError):
            package = missing_decoder(source)
            reason = f"pip install '{package}'" if package else "it is not an image of a known format"
        named = name if isinstance(name, str) else name()
        raise ValueError(f"{named} cannot be decoded: {reason}") from None


def missing_decoder(source: bytes | str | Path | IO[bytes]) -> str | None:
    """The package that decodes this kind of file, where it is not installed."""
    head = source[:16] if isinstance(source, bytes) else b""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            head = file.read(16)
    if head[4:8] != b"ftyp":
        return None
    is_avif = head[8:12] in (b"avif", b"avis")
    return ("pillow>=11.3" if is_avif else "pillow-heif") if head[8:12] != b"qt  " else None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright 8-bit RGB. Raises ValueError for values whose range is not clear."""
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(as_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """With the rotation of its EXIF data applied, if that can be read."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data beside a readable image
        return image


def as_bytes(values: np.ndarray) -> np.ndarray:
    """16-bit integers or floats between 0 and 1 as 8-bit levels. Raises ValueError naming the largest value of others."""
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating):
        if not 0 <= low <= high <= 1:
            raise ValueError(f"its values are floats from {low:g} to {high:g}: scale them to 0 to 1, or save 8 bits")
        return (values * 255).round().astype(np.uint8)
    if low < 0 or high > 65535 or 0 < high < 4096:
        raise ValueError(
            f"its largest value is {high:g} of 65535, its smallest {low:g}: scale it to 16 bits, or save 8 bits"
        )
    return (values.astype(np.float64) / 257).round().astype(np.uint8)


def open_mask(path: str | Path) -> np.ndarray:
    """A mask as booleans (H, W), true where it is white: black and white, 0 and 1 (gray or palette), or 16 bits.

    Raises ValueError naming the file if it cannot be decoded, is transparent somewhere, or has another range of values.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            mask = upright(image)
            if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("it is transparent in places: save it without transparency, white where to edit")
            values = np.asarray(mask)
            if (mask.mode == "P" and values.max() > 1) or values.ndim == 3:
                values = np.asarray(mask.convert("L"))
    except Exception as error:
        raise ValueError(f"mask={path} cannot be used: {reason_of(error)}") from None
    high = float(values.max())
    if high not in (0, 1, 255, 65535):
        raise ValueError(f"mask={path} cannot be used: its largest value is {high:g}, not 1, 255 or 65535")
    return values > high / 2

"""Grids and strips of images, and their files."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from varlab.files import atomic_write


def grid(images: Float[Tensor, "B 3 H W"], columns: int, min_side: int = 64, gap: int = 2) -> Image.Image:
    """Images in [0, 1] row by row on white; small ones are scaled by an integer factor to at least `min_side` pixels."""
    factor = max(1, -(-min_side // images.shape[-1]))
    images = F.interpolate(images.float().cpu().clamp(0, 1), scale_factor=factor, mode="nearest")
    num_rows = -(-len(images) // columns)
    _, _, height, width = images.shape
    sheet = torch.ones(3, num_rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())


def columns_of(*columns: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Interleaves batches of the same size: row i of a grid with `columns=len(columns)` shows image i of each."""
    return torch.stack(columns, dim=1).flatten(0, 1)


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as partial:
        image.save(partial, "png")


def save_pixels(pixels: np.ndarray, path: Path) -> None:
    """Writes an image (uint8, H W 3) atomically, as .npy or PNG according to the name of the file."""
    if path.suffix == ".npy":
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, pixels)
    else:
        save(Image.fromarray(pixels), path)


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> np.ndarray:
    """Images in [0, 1] as uint8 (B, H, W, 3), rounded to the nearest level (the released demo rounds down)."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_pixels(path: Path) -> np.ndarray:
    """An image file (.npy, or any that Pillow reads) as uint8 (H, W, 3)."""
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path).convert("RGB"))


def read(path: Path) -> Float[Tensor, "3 H W"]:
    """An image file as values in [0, 1]."""
    return torch.from_numpy(read_pixels(path).astype(np.float32) / 255).permute(2, 0, 1)


def save_npz(files: Sequence[Path], path: Path) -> None:
    """Writes image files of one size as `arr_0`, uint8 (N, H, W, 3), the format of the ADM evaluator, one image at a
    time."""
    height, width = read_pixels(files[0]).shape[:2]
    shape = (len(files), height, width, 3)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with (
        atomic_write(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_2_0(array, header)
        for file in files:
            pixels = read_pixels(file)
            if pixels.shape != shape[1:]:
                raise ValueError(
                    f"{file} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but the first image is {width}x{height}"
                )
            array.write(np.ascontiguousarray(pixels).tobytes())

"""Images to be packed: an item locates the bytes of an image; sources list items without reading them."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Item:
    """One image: its label, its file extension, and its bytes, given directly or as a file or byte range of a file.
    `condition`: a vector in addition to the label, for networks that are conditioned on more than a class. `captions`: texts, the
    same. `name`: what messages call it, by default the file."""

    label: int
    extension: str
    content: bytes | None = None
    file: Path | None = None
    offset: int = 0
    size: int | None = None
    condition: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    name: str = ""

    @property
    def where(self) -> str:
        """What messages call the image."""
        place = "an image" if self.file is None else str(self.file)
        return self.name or (place if self.size is None else f"{place}, byte {self.offset}")

    def load(self) -> bytes:
        """The encoded image. Raises ValueError naming it if it cannot be read."""
        if self.content is not None:
            return self.content
        assert self.file is not None
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:  # an error of reading, not of writing the shard
            raise ValueError(f"{self.where} cannot be read: {error.strerror or error}") from None


def lines_of(text: str) -> tuple[str, ...]:
    """Captions in a text: its lines, without empty ones."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def extension_of(file: Path) -> str:
    """Extension of a file's name, without the dot."""
    return file.suffix.lower().removeprefix(".")


def check_share(val_share: float) -> None:
    """Raises ValueError for a `val_share` out of range."""
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share={val_share}: give a fraction from 0 up to, but not including, 1")


def split_off(items: list[Item], val_share: float, seed: int) -> dict[str, list[Item]]:
    """`val_share` of each class for validation (at least one image, if the class has two), the rest for training."""
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    by_label: dict[int, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    for label in sorted(by_label):
        members = by_label[label]
        shuffled = np.random.default_rng(seed).permutation(len(members))
        num_val = min(max(round(val_share * len(members)), int(val_share > 0)), len(members) - 1)
        splits["val"] += [members[i] for i in sorted(shuffled[:num_val])]
        splits["train"] += [members[i] for i in sorted(shuffled[num_val:])]
    return splits


def png(pixels: np.ndarray) -> bytes:
    """A uint8 image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def reencode(image: Image.Image, short_side: int, quality: int) -> bytes | None:
    """The image with its shorter side at `short_side` (Lanczos), as JPEG of this quality; None if it is small enough."""
    if min(image.size) <= short_side:
        return None
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

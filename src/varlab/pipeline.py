"""Images from a trained model in three lines, without Lightning or Hydra."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from varlab import image_grid
from varlab.checkpoints.load import load
from varlab.distributed import default_device
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.generate import generate


class VARPipeline:
    """Tokenizer, transformer and the names of their classes.

    pipeline = VARPipeline.from_pretrained("folder")
    images = pipeline(labels=["golden retriever", 207], cfg_scale=4.0, seed=0)
    """

    def __init__(self, tokenizer: MSVQVAE, var: VAR, class_names: Sequence[str] | None = None) -> None:
        self.tokenizer, self.var, self.class_names = tokenizer.eval(), var.eval(), list(class_names or [])

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> "VARPipeline":
        """From an export folder or a training checkpoint, on `device` (default: a GPU where there is one)."""
        tokenizer, var, class_names = load(path)
        return cls(tokenizer, var, class_names).to(device or default_device(None))

    def to(self, device: str | torch.device) -> "VARPipeline":
        """Moves both networks."""
        self.tokenizer, self.var = self.tokenizer.to(device), self.var.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.var.head.weight.device

    def __call__(
        self,
        labels: int | str | Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Image.Image]:
        """One image for each label, a class's number or name. Image i has seed `seed + i` (or `seed[i]`) and does not depend on the
        others. `settings`: fields of `varlab.sampling.token_sampling.Settings`."""
        named = [labels] if isinstance(labels, int | str) else list(labels)
        numbers = torch.tensor([label_of(label, self.class_names, self.var.num_classes) for label in named])
        seeds = [seed + i for i in range(len(named))] if isinstance(seed, int) else list(seed)
        images = []
        for first in range(0, len(named), batch_size):
            chunk = slice(first, first + batch_size)
            batch = generate(self.var, self.tokenizer, numbers[chunk].to(self.device), seed=seeds[chunk], **settings)
            assert isinstance(batch, torch.Tensor)
            images += [Image.fromarray(pixels) for pixels in image_grid.to_uint8(batch)]
        return images


def label_of(label: int | str, class_names: Sequence[str], num_classes: int) -> int:
    """The number of a class, given by number or name; of several names parted by commas any serves.

    Raises ValueError listing the nearest names for one that is unknown.
    """
    if isinstance(label, int):
        if not 0 <= label <= num_classes:
            raise ValueError(
                f"label {label} is out of range: there are {num_classes} classes, 0..{num_classes - 1} (and {num_classes} for none)"
            )
        return label
    wanted = label.strip().casefold()
    numbers = {}
    for number, names in enumerate(class_names):
        for name in [names, *names.split(",")]:
            numbers.setdefault(name.strip().casefold(), number)
    if wanted in numbers:
        return numbers[wanted]
    if wanted.isdigit():
        return label_of(int(wanted), class_names, num_classes)
    near = difflib.get_close_matches(wanted, numbers, n=5, cutoff=0.4)
    hint = (
        f"the nearest are {', '.join(repr(name) for name in near)}" if near else f"there are {len(class_names)} names"
    )
    raise ValueError(f"no class is called {label!r}: {hint}")

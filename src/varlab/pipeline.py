"""Images from a trained model in three lines, without Lightning or Hydra."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varlab import image_grid
from varlab.checkpoints import hub
from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.load import load
from varlab.data.resolutions import Resolution, height_and_width
from varlab.distributed import default_device
from varlab.models.conditioning import label_of
from varlab.models.msvqvae import MSVQVAE
from varlab.models.text_encoder import TextEncoder, text_encoder_of
from varlab.models.var import VAR
from varlab.sampling.acceleration import default_precision, use_bf16
from varlab.sampling.generate import generate, image_seeds
from varlab.sampling.shapes import at_size


class VARPipeline:
    """Tokenizer, transformer and class names.

    pipeline = VARPipeline.from_pretrained("glyphs32")
    images = pipeline(labels=["A", "b", "7"], cfg_scale=1.5, seed=0)

    A network that was trained on captions takes `text="a red heart"` in place of labels.
    """

    def __init__(
        self,
        tokenizer: MSVQVAE,
        var: VAR,
        class_names: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        compiled: str = "none",
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """`dtype`: torch.bfloat16 keeps the weights of transformer and decoder in bf16 from now on. `compiled`: see
        `generate`. `text_encoder`: by default the one that the checkpoint names, loaded with the first text."""
        self.tokenizer, self.var, self.class_names = tokenizer.eval(), var.eval(), list(class_names or [])
        self.of_sizes: dict[tuple[int, int], tuple[MSVQVAE, VAR]] = {}  # kept, so that they are compiled once
        self.compiled, self.dtype, self.text_encoder = compiled, dtype, text_encoder
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: choose torch.float32 or torch.bfloat16")
        if dtype == torch.bfloat16:
            use_bf16(tokenizer, var)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        trust_code: bool = False,
        dtype: torch.dtype | None = None,
        compiled: str = "none",
    ) -> "VARPipeline":
        """Loads an export folder, a training checkpoint, a pretrained model (`glyphs32` or `fashion32`, see
        `varlab.checkpoints.load.pretrained_models`) or a model on the Hugging Face Hub (`user/name`) to `device` (default:
        a GPU if there is one). `dtype`: by default bf16 on a GPU, fp32 elsewhere. `compiled`: see `generate`.
        `trust_code`: see `load`. Raises ValueError naming the file if it is missing, damaged, contains no VAR, or names
        code of others.
        """
        tokenizer, var, class_names = load(path, trust_code=trust_code)
        device = device or default_device(None)
        if dtype is None:
            dtype = torch.bfloat16 if default_precision(device) == "bf16" else torch.float32
        return cls(tokenizer, var, class_names, dtype, compiled).to(device)

    def save_pretrained(self, folder: str | Path, name: str | None = None) -> None:
        """Writes an export folder, which must not exist. `name`: by which its model card loads it; None is the folder's. Raises
        ValueError for a pipeline in bf16, whose weights are no longer those of the tokenizer that data were encoded with."""
        if self.dtype != torch.float32:
            raise ValueError(
                "the weights were rounded to bf16 when they were loaded: load with dtype=torch.float32 to save"
            )
        save_pretrained(Path(folder), self.tokenizer, self.var, self.class_names, {}, name=name)

    def push_to_hub(self, name: str, private: bool | None = None, commit_message: str | None = None) -> str:
        """Uploads an export folder as `user/name` to the Hugging Face Hub, and returns its address. Needs a login
        (`HF_TOKEN`) and `pip install 'varlab[hub]'`. Raises ValueError if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model", name)
            return hub.upload(Path(folder) / "model", name, private, commit_message)

    def to(self, device: str | torch.device) -> "VARPipeline":
        """Moves both networks."""
        self.tokenizer, self.var = self.tokenizer.to(device), self.var.to(device)
        self.of_sizes.clear()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.var.head.weight.device

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        text: str | Sequence[str] | None = None,
        condition: Tensor | None = None,
        image_size: Resolution | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Image.Image]:
        """One PIL image per entry of `labels` (class numbers or names), of `text` if the network was trained on captions, or per
        row of `condition` if it takes another kind of condition.

        Image i has seed `seed + i` (or `seed[i]`) and does not depend on the others. `batch_size`: images per forward
        pass. `image_size`: in pixels, the side of a square or (height, width), see `at_size`.
        `settings`: fields of `varlab.sampling.token_sampling.SamplingSettings` (cfg_scale=4.0, top_k=900, ...).
        Raises ValueError for an unknown class, naming the nearest names, and for a setting out of range.
        """
        if (labels is None) + (condition is None) + (text is None) != 2:
            raise ValueError("give either labels, text or condition")
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            self.text_encoder = self.text_encoder or text_encoder_of(self.var)
            condition = self.text_encoder(texts)
        if condition is None:
            named = [labels] if isinstance(labels, int | str) else list(labels or [])
            condition = torch.tensor([label_of(label, self.class_names, self.var.num_classes) for label in named])
        size = self.tokenizer.image_size if image_size is None else height_and_width(image_size, "image_size")
        if size not in self.of_sizes:
            self.of_sizes[size] = at_size(self.tokenizer, self.var, size)
        tokenizer, var = self.of_sizes[size]
        seeds = image_seeds(seed, len(condition))
        images = []
        for first in range(0, len(condition), batch_size):
            chunk = slice(first, first + batch_size)
            rows = condition[chunk].to(self.device)
            batch = generate(var, tokenizer, rows, seed=seeds[chunk], compiled=self.compiled, **settings)
            assert isinstance(batch, torch.Tensor)
            images += [Image.fromarray(pixels) for pixels in image_grid.to_uint8(batch)]
        return images

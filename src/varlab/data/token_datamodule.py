"""Training from a token cache."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from varlab.data.datamodule import OrderedDataModule
from varlab.data.order import SampleRequest
from varlab.data.shards import ConditionKind
from varlab.data.token_cache import FORMAT
from varlab.files import json_hash, load_json
from varlab.models import scales


class TokenBatch(NamedTuple):
    """Flattened token maps with their conditions: class labels (B), or the vectors of the cache. `weight` is 0 for
    padding."""

    sequence: Int[Tensor, "B L"]
    condition: Tensor
    weight: Float[Tensor, " B"]


class TokenDataset(Dataset):
    """Rows of the cache. Views alternate: sample i uses view (i + epoch) % views."""

    def __init__(self, tokens: np.ndarray | Tensor, conditions: np.ndarray | Tensor) -> None:
        self.tokens, self.conditions = tokens, conditions

    def __len__(self) -> int:
        return len(self.tokens)

    def on_device(self, device: torch.device) -> "TokenDataset":
        """The same rows in the memory of a device, in the smallest integer dtype that torch supports and that fits."""
        assert isinstance(self.tokens, np.ndarray)
        kind = next(kind for kind in (np.uint8, np.int16, np.int32) if self.tokens.max() <= np.iinfo(kind).max)
        arrays = self.tokens.astype(kind), np.asarray(self.conditions)
        return TokenDataset(*(torch.from_numpy(array).to(device) for array in arrays))

    def __getitems__(self, requests: list[SampleRequest]) -> TokenBatch:
        samples, epochs, is_real = (np.array(column) for column in zip(*requests, strict=True))
        views = (samples + epochs) % self.tokens.shape[1]
        weight = torch.from_numpy(is_real.astype(np.float32))
        if isinstance(self.tokens, Tensor):
            device = self.tokens.device
            samples, views = (torch.from_numpy(index).to(device) for index in (samples, views))
            return TokenBatch(self.tokens[samples, views].long(), self.conditions[samples], weight.to(device))
        return TokenBatch(
            torch.from_numpy(self.tokens[samples, views].astype(np.int64)),
            torch.from_numpy(self.conditions[samples]),
            weight,
        )


class TokenDataModule(OrderedDataModule):
    """Training from a token cache (`varlab tokenize`).

    `keep`: where the tokens are kept during training: `memory` (loaded at the start), `disk` (memory-mapped) or
    `device` (a copy on each GPU: two bytes per token, 1.7 GB for one view of ImageNet at 256 px; batches then need no
    transfer). `condition`: `label`, or `vector` if the cache holds a vector per image. Raises ValueError for a cache
    that is missing, shorter than its manifest says, or of another format. The VARModule checks that it matches the
    tokenizer.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int,
        num_workers: int = 0,
        keep: Literal["memory", "disk", "device"] = "memory",
        seed: int = 0,
        lanes: int = 64,
        window: int | None = None,
        condition: ConditionKind = "label",
    ) -> None:
        super().__init__(global_batch_size, num_workers, seed, lanes, window)
        if keep == "device" and num_workers:
            raise ValueError(
                f"data.keep=device needs data.num_workers=0, not {num_workers}: the rows are already on the device"
            )
        self.path = Path(path)
        self.keep = keep
        self.pins = keep != "device"
        self.condition: ConditionKind = condition

    def declared_size(self) -> tuple[int, int]:
        manifest = load_json(self.path / "manifest.json", "varlab tokenize")
        return manifest["splits"]["train"]["num_images"], len(manifest["class_names"])

    def setup(self, stage: str | None = None) -> None:
        self.manifest = load_json(self.path / "manifest.json", "varlab tokenize")
        if self.manifest.get("kind") != "tokens" or self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{self.path / 'manifest.json'} describes {self.manifest.get('kind')!r} of format {self.manifest.get('format')!r},"
                f" expected tokens of format {FORMAT}"
            )
        self.train_set, self.val_set = self.read("train"), self.read("val")
        self.views = self.train_set.tokens.shape[1]
        self.condition_shape = tuple(self.train_set.conditions.shape[1:])
        self.shard_counts, self.num_val = [len(self.train_set)], len(self.val_set)
        self.class_names, self.data_fingerprint = self.manifest["class_names"], json_hash(self.manifest)

    def marginal_entropies(self, codebook_size: int) -> dict[str, float]:
        """Entropy of the codes of each scale over the validation set, in nats: the loss of a model that predicts only
        the marginal frequency of each code."""
        tokens, found = np.asarray(torch.as_tensor(self.val_set.tokens).cpu()), {}  # pyright: ignore[reportAttributeAccessIssue]
        for k, (first, last) in enumerate(scales.scale_bounds(self.manifest["patch_nums"])):
            counts = np.bincount(tokens[:, 0, first:last].ravel().astype(np.int64), minlength=codebook_size)
            shares = counts[counts > 0] / counts.sum()
            found[f"entropy_marginal_scale_{k:02d}"] = float(-(shares * np.log(shares)).sum())
        return found

    def read(self, split: str) -> TokenDataset:
        """One split of the cache."""
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {split!r}, only {sorted(self.manifest['splits'])}")
        name = "labels" if self.condition == "label" else "condition"
        if name == "condition" and not (self.path / f"{split}.condition.npy").is_file():
            raise ValueError(f"data.condition=vector: {self.path} has labels only, no vector per image")
        try:
            tokens, conditions = (
                np.load(self.path / f"{split}.{part}.npy", mmap_mode="r" if self.keep == "disk" else None)
                for part in ("tokens", name)
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path}: the {split} tokens cannot be read ({error}): run `varlab tokenize` again"
            ) from None
        if len(tokens) != len(conditions) or len(tokens) != self.manifest["splits"][split]["num_images"]:
            raise ValueError(
                f"{self.path}: {split} holds {len(tokens)} rows and {len(conditions)} {name}, which differs from its manifest"
            )
        rows = TokenDataset(
            tokens if split == "train" else tokens[:, :1], conditions
        )  # validation uses no augmentation
        return rows.on_device(self.trainer.strategy.root_device) if self.keep == "device" and self.trainer else rows

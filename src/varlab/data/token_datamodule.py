"""Training from a token cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from varlab.data.datamodule import OrderedDataModule
from varlab.data.images import as_condition
from varlab.data.manifests import TokensManifest, open_array, spot_check
from varlab.data.order import SampleRequest
from varlab.data.shards import ConditionKind
from varlab.files import json_hash, load_json
from varlab.models import scales


@dataclass(frozen=True)
class RowCheck:
    """What the rows of a split hold: codes below `codebook_size`, and labels below `num_classes` (None: vectors)."""

    files: str  # path of its files, without their endings
    codebook_size: int
    num_classes: int | None

    def __call__(self, tokens: np.ndarray, conditions: np.ndarray) -> None:
        """Raises ValueError naming the file for rows that are out of range."""
        for name, values, bound in (("tokens", tokens, self.codebook_size), ("labels", conditions, self.num_classes)):
            if bound is not None and values.size and not 0 <= values.min() <= values.max() < bound:
                raise ValueError(
                    f"{self.files}.{name}.npy is damaged: it holds {values.min()} to {values.max()}, expected 0 to {bound - 1}"
                )


class TokenBatch(NamedTuple):
    """Flattened token maps with their conditions: class labels (B), or the vectors of the cache. `weight` is 0 for
    padding."""

    sequence: Int[Tensor, "B L"]
    condition: Tensor
    weight: Float[Tensor, " B"]


class TokenDataset(Dataset):
    """Rows of the cache. Views alternate: sample i uses view (i + epoch) % views; so do the captions of an image, each of which
    meets every view."""

    def __init__(
        self,
        tokens: np.ndarray | Tensor,
        conditions: np.ndarray | Tensor,
        kind: ConditionKind = "label",
        check: RowCheck | None = None,
    ) -> None:
        self.tokens, self.conditions, self.check = tokens, conditions, check
        self.kind: ConditionKind = kind

    def __len__(self) -> int:
        return len(self.tokens)

    def on_device(self, device: torch.device) -> "TokenDataset":
        """The same rows in the memory of a device, in the smallest integer dtype that torch supports and that fits."""
        assert isinstance(self.tokens, np.ndarray) and isinstance(self.conditions, np.ndarray)
        dtype = next(
            dtype for dtype in (np.uint8, np.int16, np.int32, np.int64) if self.tokens.max() <= np.iinfo(dtype).max
        )
        tokens = torch.from_numpy(self.tokens.astype(dtype)).to(device)
        return TokenDataset(tokens, as_condition(self.conditions, self.kind).to(device), self.kind)

    def __getitems__(self, requests: list[SampleRequest]) -> TokenBatch:
        samples, epochs, is_real = (np.array(column) for column in zip(*requests, strict=True))
        turns, num_views = samples + epochs, self.tokens.shape[1]
        views, chosen = turns % num_views, (samples,)
        if self.kind == "text":
            chosen = samples, (turns // num_views + views) % self.conditions.shape[1]
        weight = torch.from_numpy(is_real.astype(np.float32))
        if isinstance(self.tokens, Tensor):
            device = self.tokens.device
            index = [torch.from_numpy(numbers).to(device) for numbers in chosen]
            samples, views = (torch.from_numpy(numbers).to(device) for numbers in (samples, views))
            return TokenBatch(self.tokens[samples, views].long(), self.conditions[tuple(index)], weight.to(device))
        tokens, conditions = self.tokens[samples, views], self.conditions[chosen]
        assert isinstance(tokens, np.ndarray) and isinstance(conditions, np.ndarray)
        if self.check is not None:
            self.check(tokens, conditions)
        return TokenBatch(torch.from_numpy(tokens.astype(np.int64)), as_condition(conditions, self.kind), weight)


class TokenDataModule(OrderedDataModule):
    """Training from a token cache (`varlab tokenize`).

    `keep`: where the tokens are kept during training: `disk` (memory-mapped: read as needed, and shared by all processes of a
    host), `memory` (a copy per process) or `device` (a copy on each GPU: two bytes per token up to 32,768 codes, 1.7 GB for one view of
    ImageNet at 256 px; batches then need no transfer). `condition`: `label`, `vector` if the cache holds a vector per image, or
    `text` if it holds vectors of captions. Raises ValueError for a cache that is missing, damaged, or of another format. The
    VARModule checks that it matches the tokenizer.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int,
        num_workers: int = 0,
        keep: Literal["disk", "memory", "device"] = "disk",
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
        manifest = load_json(self.path / "manifest.json", "varlab tokenize", TokensManifest)
        return manifest["splits"]["train"]["num_images"], len(manifest["class_names"])

    def setup(self, stage: str | None = None) -> None:
        self.manifest = load_json(self.path / "manifest.json", "varlab tokenize", TokensManifest)
        self.class_names, self.data_fingerprint = self.manifest["class_names"], json_hash(self.manifest)
        self.train_set, self.val_set = self.read("train"), self.read("val")
        self.views = self.train_set.tokens.shape[1]
        self.condition_shape = tuple(self.train_set.conditions.shape[2 if self.condition == "text" else 1 :])
        self.text = self.manifest.get("text") if self.condition == "text" else None
        self.shard_counts, self.num_val = [len(self.train_set)], len(self.val_set)

    def marginal_entropies(self) -> dict[str, float]:
        """Entropy of the codes of each scale over the validation set, in nats: the loss of a model that predicts only
        the marginal frequency of each code."""
        tokens, found = self.val_set.tokens, {}  # pyright: ignore[reportAttributeAccessIssue]
        tokens = tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens
        for k, (first, last) in enumerate(scales.scale_bounds(self.manifest["patch_nums"])):
            _, counts = np.unique(tokens[:, 0, first:last], return_counts=True)
            shares = counts / counts.sum()
            found[f"entropy_marginal_scale_{k:02d}"] = float(-(shares * np.log(shares)).sum())
        return found

    def read(self, split: str) -> TokenDataset:
        """One split of the cache."""
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {split!r}, only {sorted(self.manifest['splits'])}")
        num_images, kind = (self.manifest["splits"][split][key] for key in ("num_images", "dtype"))
        shape = (num_images, len(self.manifest["views"]), scales.num_tokens(self.manifest["patch_nums"]))
        tokens = open_array(self.path / f"{split}.tokens.npy", shape, kind)
        if self.condition == "vector" and not (self.path / f"{split}.condition.npy").is_file():
            raise ValueError(f"data.condition=vector: {self.path} has labels only, no vector per image")
        if self.condition == "text" and self.manifest.get("text") is None:
            raise ValueError(
                f"data.condition=text: {self.path} holds no vectors of captions: make it with `varlab tokenize text=minilm`"
            )
        if self.condition == "label":
            conditions = open_array(self.path / f"{split}.labels.npy", (num_images,))
        elif self.condition == "text":
            text = self.manifest["text"]
            rows = [1 + text["tokens"]] if text["tokens"] else []
            shape = (num_images, text["captions"], *rows, None)
            conditions = open_array(self.path / f"{split}.text.npy", shape, np.float16)
            conditions = conditions if split == "train" else conditions[:, :1]
        else:
            conditions = open_array(self.path / f"{split}.condition.npy")
        if len(conditions) != num_images:
            raise ValueError(f"{self.path}: {split} has {len(conditions)} vectors for {num_images} images")
        num_classes = len(self.class_names) if self.condition == "label" else None
        check = RowCheck(str(self.path / split), self.manifest["codebook_size"], num_classes)
        chosen = spot_check(tokens.nbytes // 64)
        check(tokens[chosen], conditions[chosen])
        if self.keep != "disk":
            tokens, conditions = np.array(tokens), np.array(conditions)
        views = tokens if split == "train" else tokens[:, :1]  # validation uses no augmentation
        rows = TokenDataset(views, conditions, self.condition, check)
        return rows.on_device(self.trainer.strategy.root_device) if self.keep == "device" and self.trainer else rows

"""Training from a token cache."""

from collections.abc import Sequence
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
from varlab.data.manifests import TokensManifest, cache_folders, open_array, spot_check
from varlab.data.order import Order, SampleRequest
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
    """Flattened token maps with their conditions: class labels (B), or the vectors or smaller images of the cache. `weight` is 0 for
    padding. `shape`: number of the pyramid, of the data module's `pyramids`."""

    sequence: Int[Tensor, "B L"]
    condition: Tensor
    weight: Float[Tensor, " B"]
    shape: int = 0


class TokenDataset(Dataset):
    """Rows of the cache. Views alternate: sample i uses view (i + epoch) % views, of an image that is its condition, too; so do the
    captions of an image, each of which meets every view."""

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
            dtype
            for dtype in (np.uint8, np.int16, np.int32, np.int64)
            if self.tokens.max(initial=0) <= np.iinfo(dtype).max
        )
        tokens = torch.from_numpy(self.tokens.astype(dtype)).to(device)
        is_image = self.kind == "image"  # stays uint8 until a batch needs it
        conditions = (
            torch.from_numpy(np.array(self.conditions)) if is_image else as_condition(self.conditions, self.kind)
        )
        return TokenDataset(tokens, conditions.to(device), self.kind)

    def __getitems__(self, requests: list[SampleRequest]) -> TokenBatch:
        samples, epochs, is_real = (np.array(column) for column in zip(*requests, strict=True))
        turns, num_views = samples + epochs, self.tokens.shape[1]
        views, chosen = turns % num_views, (samples,)
        if self.kind == "text":
            chosen = samples, (turns // num_views + views) % self.conditions.shape[1]
        elif self.kind == "image":
            chosen = samples, views
        weight = torch.from_numpy(is_real.astype(np.float32))
        if isinstance(self.tokens, Tensor):
            device = self.tokens.device
            index = [torch.from_numpy(numbers).to(device) for numbers in chosen]
            samples, views = (torch.from_numpy(numbers).to(device) for numbers in (samples, views))
            conditions = as_condition(self.conditions[tuple(index)], self.kind)
            return TokenBatch(self.tokens[samples, views].long(), conditions, weight.to(device))
        tokens, conditions = self.tokens[samples, views], self.conditions[chosen]
        assert isinstance(tokens, np.ndarray) and isinstance(conditions, np.ndarray)
        if self.check is not None:
            self.check(tokens, conditions)
        return TokenBatch(torch.from_numpy(tokens.astype(np.int64)), as_condition(conditions, self.kind), weight)


class TokensOfShapes(Dataset):
    """Rows of the caches of several shapes, numbered one after the other. The rows of a batch are of one of them."""

    def __init__(self, parts: Sequence[TokenDataset]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, requests: list[SampleRequest]) -> TokenBatch:
        shape = int(np.searchsorted(self.ends, requests[0].sample, side="right"))
        part = self.parts[shape]
        start = int(self.ends[shape]) - len(part)
        own = [request._replace(sample=request.sample - start) for request in requests]
        return part.__getitems__(own)._replace(shape=shape)


class TokenDataModule(OrderedDataModule):
    """Training from a token cache, or from those of several shapes (`varlab tokenize`). The images of a batch have one shape;
    `pyramids` are the patch_nums of each.

    `keep`: where the tokens are kept during training: `disk` (memory-mapped: read as needed, and shared by all processes of a
    host), `memory` (a copy per process) or `device` (a copy on each GPU: two bytes per token up to 32,768 codes, 1.7 GB for one view of
    ImageNet at 256 px, and the bytes of smaller images; batches then need no transfer). `condition`: `label`, `vector` if the cache
    holds a vector per image, `text` if it holds vectors of captions, or `image` if it holds smaller versions of its images. Raises
    ValueError for a cache that is missing, damaged, or of another format. The VARModule checks that it matches the tokenizer.
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

    def load_manifests(self) -> None:
        """Reads the manifest of each cache."""
        self.caches = {
            folder: load_json(folder / "manifest.json", "varlab tokenize", TokensManifest)
            for folder in cache_folders(self.path)
        }
        self.pyramids = [manifest["patch_nums"] for manifest in self.caches.values()]
        self.manifest = next(iter(self.caches.values()))
        for folder, manifest in self.caches.items():
            for key in ("data", "class_names", "codebook_size", "views", "text", "low_res"):
                if manifest.get(key) != self.manifest.get(key):
                    raise ValueError(
                        f"{folder}: its {key} differs from that of {next(iter(self.caches))}: tokenize anew"
                    )
            if len(manifest["patch_nums"]) != len(self.pyramids[0]):
                raise ValueError(f"{folder} has {len(manifest['patch_nums'])} scales, not {len(self.pyramids[0])}")

    def declared_size(self) -> tuple[int, int]:
        self.load_manifests()
        num_images = sum(manifest["splits"]["train"]["num_images"] for manifest in self.caches.values())
        return num_images, len(self.manifest["class_names"])

    def setup(self, stage: str | None = None) -> None:
        self.load_manifests()
        manifests = list(self.caches.values())
        self.class_names = self.manifest["class_names"]
        self.data_fingerprint = json_hash(manifests[0] if len(manifests) == 1 else manifests)
        self.train_parts, self.val_parts = (
            [self.read(cache, split) for cache in self.caches] for split in ("train", "val")
        )
        self.train_set, self.val_set = (
            parts[0] if len(parts) == 1 else TokensOfShapes(parts) for parts in (self.train_parts, self.val_parts)
        )
        first = self.train_parts[0]
        if self.condition == "image" and len(self.caches) > 1:
            raise ValueError(f"data.condition=image takes images of one shape: set data.path={next(iter(self.caches))}")
        self.views = first.tokens.shape[1]
        self.condition_shape = tuple(first.conditions.shape[2 if self.condition in ("text", "image") else 1 :])
        self.text = self.manifest.get("text") if self.condition == "text" else None
        self.shard_counts, self.num_val = [len(part) for part in self.train_parts], sum(self.val_counts())

    def orders(self) -> list[Order]:
        if len(self.caches) > 1:
            for folder, num in zip(self.caches, self.shard_counts, strict=True):
                if num < self.global_batch_size:
                    raise ValueError(
                        f"{folder} has {num} training images, fewer than data.global_batch_size={self.global_batch_size}: tokenize"
                        " without this shape, or train with smaller batches"
                    )
        seeds = (self.seed + (i << 32) for i in range(len(self.caches)))
        return [Order([num], seed, self.lanes, self.window) for num, seed in zip(self.shard_counts, seeds, strict=True)]

    def val_counts(self) -> list[int]:
        return [len(part) for part in self.val_parts]

    def marginal_entropies(self) -> dict[str, float]:
        """Entropy of the codes of each scale over the validation set, in nats: the loss of a model that predicts only
        the marginal frequency of each code."""
        found, bounds = {}, [scales.scale_bounds(pyramid) for pyramid in self.pyramids]
        for k in range(len(bounds[0])):
            maps = []
            for part, own in zip(self.val_parts, bounds, strict=True):
                tokens = part.tokens[:, 0, slice(*own[k])]
                maps.append((tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens).ravel())
            _, counts = np.unique(np.concatenate(maps), return_counts=True)
            shares = counts / counts.sum()
            found[f"entropy_marginal_scale_{k:02d}"] = float(-(shares * np.log(shares)).sum())
        return found

    def read(self, path: Path, split: str) -> TokenDataset:
        """One split of a cache."""
        manifest = self.caches[path]
        if split not in manifest["splits"]:
            raise ValueError(f"{path} has no split {split!r}, only {sorted(manifest['splits'])}")
        num_images, kind = (manifest["splits"][split][key] for key in ("num_images", "dtype"))
        shape = (num_images, len(manifest["views"]), scales.num_tokens(manifest["patch_nums"]))
        tokens = open_array(path / f"{split}.tokens.npy", shape, kind)
        if self.condition == "vector" and not (path / f"{split}.condition.npy").is_file():
            raise ValueError(f"data.condition=vector: {path} has labels only, no vector per image")
        if self.condition == "text" and manifest.get("text") is None:
            raise ValueError(
                f"data.condition=text: {path} holds no vectors of captions: make it with `varlab tokenize text=minilm`"
            )
        if self.condition == "image" and manifest.get("low_res") is None:
            raise ValueError(
                f"data.condition=image: {path} holds no smaller images: make it with `varlab tokenize low_res=2`"
            )
        if self.condition == "label":
            conditions = open_array(path / f"{split}.labels.npy", (num_images,))
        elif self.condition == "image":
            conditions = open_array(path / f"{split}.image.npy", (num_images, shape[1], 3, None, None), np.uint8)
            conditions = conditions if split == "train" else conditions[:, :1]
        elif self.condition == "text":
            text = manifest["text"]
            rows = [1 + text["tokens"]] if text["tokens"] else []
            shape = (num_images, text["captions"], *rows, None)
            conditions = open_array(path / f"{split}.text.npy", shape, np.float16)
            conditions = conditions if split == "train" else conditions[:, :1]
        else:
            conditions = open_array(path / f"{split}.condition.npy")
        if len(conditions) != num_images:
            raise ValueError(f"{path}: {split} has {len(conditions)} vectors for {num_images} images")
        num_classes = len(manifest["class_names"]) if self.condition == "label" else None
        check = RowCheck(str(path / split), manifest["codebook_size"], num_classes)
        chosen = spot_check(tokens.nbytes // 64)
        check(tokens[chosen], conditions[chosen])
        if self.keep != "disk":
            tokens, conditions = np.array(tokens), np.array(conditions)
        views = tokens if split == "train" else tokens[:, :1]  # validation uses no augmentation
        rows = TokenDataset(views, conditions, self.condition, check)
        return rows.on_device(self.trainer.strategy.root_device) if self.keep == "device" and self.trainer else rows

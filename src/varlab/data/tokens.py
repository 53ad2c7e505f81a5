"""The token cache: images encoded once, read by every transformer that is trained on them.

manifest.json                 tokenizer fingerprint, patch_nums, data set, views
train.tokens.npy              (N, views, L) in the smallest integer type that holds the codebook
train.labels.npy              (N,)
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from varlab import scales
from varlab.checkpoints import tokenizer_fingerprint
from varlab.data.imagenet import Crop, ImageDataset, to_tensor
from varlab.data.module import OrderedDataModule
from varlab.data.order import Draw
from varlab.data.shards import ShardReader
from varlab.data.shards import fingerprint as shards_fingerprint
from varlab.files import json_hash, load_json, save_json, sha256, whole_file
from varlab.models.msvqvae import MSVQVAE

FORMAT = 1
log = logging.getLogger(__name__)


class TokenBatch(NamedTuple):
    """Flattened token maps with their labels. `weight` is 0 for padding."""

    sequence: Int[Tensor, "B L"]
    labels: Int[Tensor, " B"]
    weight: Float[Tensor, " B"]


def views_of(crops: int, flips: bool, seed: int) -> list[dict[str, Any]]:
    """Descriptions of the views of each image: the center crop, or `crops` random ones; each also mirrored if `flips`."""
    places = [{"crop": "center"}] if crops == 0 else [{"crop": "random", "seed": seed + i} for i in range(crops)]
    return [{**place, "is_flipped": flip} for place in places for flip in ([False, True] if flips else [False])]


def crop_of_view(view: dict[str, Any], sample: int) -> Crop:
    """The crop of one sample in one view."""
    if view["crop"] == "center":
        return Crop(is_flipped=view["is_flipped"])
    top, left = np.random.default_rng([view["seed"], sample]).random(2)
    return Crop(top, left, view["is_flipped"])


@torch.no_grad()
def write_cache(
    path: Path,
    shards: str,
    tokenizer: MSVQVAE,
    resize_ratio: float,
    crops: int,
    flips: bool,
    seed: int,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Encodes all splits of a packed set; returns the manifest. A split that is there already and belongs to the same
    tokenizer, data and views is kept; one that belongs to others is an error."""
    views = views_of(crops, flips, seed)
    reader = ShardReader(shards, "train")
    manifest: dict[str, Any] = {
        "kind": "tokens",
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "patch_nums": tokenizer.patch_nums,
        "codebook_size": tokenizer.sizes["codebook_size"],
        "data": shards_fingerprint(reader.manifest),
        "resize_ratio": resize_ratio,
        "views": views,
        "class_names": reader.manifest["class_names"],
        "splits": {},
    }
    file = path / "manifest.json"
    if file.is_file():
        found = load_json(file, "varlab tokenize")
        changed = [key for key in manifest if key != "splits" and found.get(key) != manifest[key]]
        if changed:
            raise ValueError(
                f"{path} already holds a token cache with another {', '.join(changed)}: choose another folder or remove it"
            )
        return found
    tokenizer = tokenizer.to(device).eval()
    side = tokenizer.image_size[0]
    for split in reader.manifest["splits"]:
        images = ImageDataset(ShardReader(shards, split), side, resize_ratio, random_crop=False, random_flip=False)
        manifest["splits"][split] = encode_split(path, split, images, tokenizer, views, batch_size, device)
    save_json(file, manifest)
    return manifest


def encode_split(
    path: Path,
    split: str,
    images: ImageDataset,
    tokenizer: MSVQVAE,
    views: list[dict[str, Any]],
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Writes tokens and labels of one split; returns its entry in the manifest."""
    shape = (len(images), len(views), scales.num_tokens(tokenizer.patch_nums))
    kind = np.min_scalar_type(tokenizer.sizes["codebook_size"] - 1)
    tokens_file, labels_file = path / f"{split}.tokens.npy", path / f"{split}.labels.npy"
    with whole_file(tokens_file) as partial:
        tokens = np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=shape)
        labels = images.reader.labels.copy()
        skipped: set[int] = set()
        for first in tqdm(range(0, len(images), batch_size), desc=f"tokenize {split}", unit="batch"):
            samples = range(first, min(first + batch_size, len(images)))
            for v, view in enumerate(views):
                read = [images.readable(Draw(i, 0, True), crop_of_view(view, i)) for i in samples]
                batch = to_tensor([pixels for pixels, _, _ in read]).to(device)
                tokens[first : first + len(samples), v] = torch.cat(tokenizer.encode(batch), dim=1).cpu().numpy()
                labels[samples] = [label for _, label, _ in read]
                skipped |= {i for i, (_, _, is_replaced) in zip(samples, read, strict=True) if is_replaced}
        tokens.flush()
        del tokens
    with whole_file(labels_file) as partial, open(partial, "wb") as file:
        np.save(file, labels)
    if skipped:
        log.warning("%s: %d images could not be read, their neighbors take their places", split, len(skipped))
    return {"num_images": len(images), "skipped": len(skipped), "sha256": sha256(tokens_file), "dtype": str(kind)}


class TokenDataset(Dataset):
    """Rows of the cache. Views take turns: sample i shows view (i + epoch) % views."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, draws: list[Draw]) -> TokenBatch:
        samples, epochs, is_real = (np.array(column) for column in zip(*draws, strict=True))
        rows = self.tokens[samples, (samples + epochs) % self.tokens.shape[1]]
        return TokenBatch(
            torch.from_numpy(rows.astype(np.int64)),
            torch.from_numpy(self.labels[samples]),
            torch.from_numpy(is_real.astype(np.float32)),
        )


class TokenDataModule(OrderedDataModule):
    """Training from a token cache (`varlab tokenize`), memory-mapped or, with `in_memory`, read at once.

    Raises ValueError for a cache that is missing, shorter than its manifest says, or of another format. Whether it
    belongs to the tokenizer is checked by the VARModule, which holds one.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int,
        num_workers: int = 0,
        in_memory: bool = True,
        seed: int = 0,
        lanes: int = 64,
        window: int | None = None,
    ) -> None:
        super().__init__(global_batch_size, num_workers, seed, lanes, window)
        self.path, self.in_memory = Path(path), in_memory

    def setup(self, stage: str | None = None) -> None:
        self.manifest = load_json(self.path / "manifest.json", "varlab tokenize")
        if self.manifest.get("kind") != "tokens" or self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{self.path / 'manifest.json'} describes {self.manifest.get('kind')!r} of format {self.manifest.get('format')!r},"
                f" expected tokens of format {FORMAT}"
            )
        self.train_set, self.val_set = self.read("train"), self.read("val")
        self.shard_counts, self.num_val = [len(self.train_set)], len(self.val_set)
        self.class_names, self.data_fingerprint = self.manifest["class_names"], json_hash(self.manifest)

    def read(self, split: str) -> TokenDataset:
        """One split of the cache."""
        if split not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {split!r}, only {sorted(self.manifest['splits'])}")
        try:
            tokens, labels = (
                np.load(self.path / f"{split}.{part}.npy", mmap_mode=None if self.in_memory else "r")
                for part in ("tokens", "labels")
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path}: the {split} tokens cannot be read ({error}): run `varlab tokenize` again"
            ) from None
        if len(tokens) != len(labels) or len(tokens) != self.manifest["splits"][split]["num_images"]:
            raise ValueError(
                f"{self.path}: {split} holds {len(tokens)} rows and {len(labels)} labels, not what its manifest says"
            )
        return TokenDataset(tokens, labels)

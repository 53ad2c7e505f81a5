"""The token cache: images encoded once, read by every transformer that is trained on them.

manifest.json                 tokenizer fingerprint, patch_nums, data set, views
train.tokens.npy              (N, views, L) in the smallest integer type that holds the codebook
train.labels.npy              (N,)
"""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from varlab.checkpoints.load import tokenizer_fingerprint
from varlab.data.datamodule import OrderedDataModule
from varlab.data.images import Crop, ImageDataset, to_tensor
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader, load_manifest
from varlab.data.shards import fingerprint as shards_fingerprint
from varlab.data.storage import Storage
from varlab.distributed import WorkSplit, wait_for_files
from varlab.files import atomic_write, json_hash, load_json, save_json, sha256
from varlab.models import scales
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
    part_images: int = 4096,
    share: WorkSplit | None = None,
    storage: Storage | None = None,
) -> dict[str, Any]:
    """Encodes all splits of a packed set; returns the manifest, its `splits` empty on all ranks but the first.

    Work is done in parts of `part_images`, each written whole: a killed call continues with the parts that are missing,
    and several processes share the parts out. A cache that is there already and belongs to the same tokenizer, data and
    views is kept; one that belongs to others is an error.
    """
    share = share or WorkSplit()
    shard_manifest = load_manifest(shards, storage)
    views = views_of(crops, flips, seed)
    manifest: dict[str, Any] = {
        "kind": "tokens",
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "patch_nums": tokenizer.patch_nums,
        "codebook_size": tokenizer.sizes["codebook_size"],
        "data": shards_fingerprint(shard_manifest),
        "resize_ratio": resize_ratio,
        "views": views,
        "class_names": shard_manifest["class_names"],
        "splits": {},
    }
    check_same_cache(path / "manifest.json", manifest)
    if (path / "manifest.json").is_file():
        return load_json(path / "manifest.json", "varlab tokenize")
    begun = path / "parts/manifest.json"
    check_same_cache(begun, manifest)
    save_json(begun, {**manifest, "part_images": part_images})
    tokenizer, side = tokenizer.to(device).eval(), tokenizer.image_size[0]
    files: dict[str, list[Path]] = {}
    for split in shard_manifest["splits"]:
        reader = ShardReader(shards, split, storage)
        images = ImageDataset(reader, side, resize_ratio, random_crop=False, random_flip=False)
        starts = range(0, len(images), part_images)
        files[split] = [path / f"parts/{split}-{part_images}-{number:05d}.npz" for number in range(len(starts))]
        own = list(zip(files[split], starts, strict=True))[share.rank :: share.num_ranks]
        for file, start in tqdm(own, desc=f"tokenize {split}", unit="part"):
            if not file.is_file():
                samples = range(start, min(start + part_images, len(images)))
                write_part(file, images, samples, tokenizer, views, batch_size, device)
    if share.rank:
        return manifest
    for split, parts in files.items():
        wait_for_files(parts)
        manifest["splits"][split] = join_parts(path, split, parts, tokenizer, len(views))
    save_json(path / "manifest.json", manifest)
    shutil.rmtree(path / "parts")
    return manifest


def check_same_cache(file: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError when the cache at hand (or begun) belongs to something else."""
    if not file.is_file():
        return
    found = load_json(file, "varlab tokenize")
    changed = [key for key in manifest if key != "splits" and found.get(key) != manifest[key]]
    if changed:
        raise ValueError(
            f"{file.parent} already holds a token cache with another {', '.join(changed)}: choose another folder or remove it"
        )


@torch.no_grad()
def write_part(
    file: Path,
    images: ImageDataset,
    samples: range,
    tokenizer: MSVQVAE,
    views: list[dict[str, Any]],
    batch_size: int,
    device: str,
) -> None:
    """Encodes a stretch of samples in all views into one file: tokens (n, views, L), labels (n,), skipped (n,)."""
    tokens, labels, skipped = [], [], []
    for first in range(samples.start, samples.stop, batch_size):
        batch = range(first, min(first + batch_size, samples.stop))
        images.reader.prepare(batch)
        by_view = [[images.readable(SampleRequest(i, 0, True), crop_of_view(view, i)) for i in batch] for view in views]
        encoded = [tokenizer.encode(to_tensor([pixels for pixels, _, _ in view]).to(device)) for view in by_view]
        tokens.append(torch.stack([torch.cat(token_maps, dim=1).cpu() for token_maps in encoded], dim=1).numpy())
        labels += [label for _, label, _ in by_view[0]]
        skipped += [is_replaced for _, _, is_replaced in by_view[0]]
    kind = smallest_type(tokenizer)
    with atomic_write(file) as partial, open(partial, "wb") as stream:
        np.savez(stream, tokens=np.concatenate(tokens).astype(kind), labels=np.array(labels), skipped=np.array(skipped))


def smallest_type(tokenizer: MSVQVAE) -> np.dtype:
    """The smallest integer type that holds every token."""
    return np.min_scalar_type(tokenizer.sizes["codebook_size"] - 1)


def join_parts(path: Path, split: str, parts: list[Path], tokenizer: MSVQVAE, num_views: int) -> dict[str, Any]:
    """Joins the parts of a split into its two arrays; returns its entry in the manifest."""
    tokens_file = path / f"{split}.tokens.npy"
    labels, num_skipped = [], 0
    for part in parts:
        with np.load(part) as loaded:
            labels.append(loaded["labels"])
            num_skipped += int(loaded["skipped"].sum())
    num_images, kind = sum(map(len, labels)), smallest_type(tokenizer)
    with atomic_write(tokens_file) as partial:
        shape = (num_images, num_views, scales.num_tokens(tokenizer.patch_nums))
        tokens = np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=shape)
        first = 0
        for part in parts:
            with np.load(part) as loaded:
                tokens[first : first + len(loaded["tokens"])] = loaded["tokens"]
                first += len(loaded["tokens"])
        tokens.flush()
        del tokens
    with atomic_write(path / f"{split}.labels.npy") as partial, open(partial, "wb") as stream:
        np.save(stream, np.concatenate(labels))
    if num_skipped:
        log.warning("%s: %d images could not be read, their neighbors take their places", split, num_skipped)
    return {"num_images": num_images, "skipped": num_skipped, "sha256": sha256(tokens_file), "dtype": str(kind)}


class TokenDataset(Dataset):
    """Rows of the cache. Views take turns: sample i shows view (i + epoch) % views."""

    def __init__(self, tokens: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def on_device(self, device: torch.device) -> "TokenDataset":
        """The same rows in the memory of a device, in the smallest type that torch can index."""
        assert isinstance(self.tokens, np.ndarray)
        kind = next(kind for kind in (np.uint8, np.int16, np.int32) if self.tokens.max() <= np.iinfo(kind).max)
        return TokenDataset(
            *(torch.from_numpy(array).to(device) for array in (self.tokens.astype(kind), np.asarray(self.labels)))
        )

    def __getitems__(self, draws: list[SampleRequest]) -> TokenBatch:
        samples, epochs, is_real = (np.array(column) for column in zip(*draws, strict=True))
        views = (samples + epochs) % self.tokens.shape[1]
        weight = torch.from_numpy(is_real.astype(np.float32))
        if isinstance(self.tokens, Tensor):
            device = self.tokens.device
            samples, views = (torch.from_numpy(place).to(device) for place in (samples, views))
            return TokenBatch(self.tokens[samples, views].long(), self.labels[samples], weight.to(device))
        return TokenBatch(
            torch.from_numpy(self.tokens[samples, views].astype(np.int64)),
            torch.from_numpy(self.labels[samples]),
            weight,
        )


class TokenDataModule(OrderedDataModule):
    """Training from a token cache (`varlab tokenize`).

    `keep`: where the tokens lie while training: `memory` (read at once), `disk` (memory-mapped) or `device` (a copy on each
    GPU: two bytes a token, 1.7 GB for a view of ImageNet at 256 px; batches then cost no transfer). Raises ValueError for a
    cache that is missing, shorter than its manifest says, or of another format. Whether it belongs to the tokenizer is
    checked by the VARModule, which holds one.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int,
        num_workers: int = 0,
        keep: str = "memory",
        seed: int = 0,
        lanes: int = 64,
        window: int | None = None,
    ) -> None:
        super().__init__(global_batch_size, num_workers, seed, lanes, window)
        if keep not in ("memory", "disk", "device"):
            raise ValueError(f"data.keep={keep!r} is unknown: choose memory, disk or device")
        if keep == "device" and num_workers:
            raise ValueError(
                f"data.keep=device needs data.num_workers=0, not {num_workers}: rows are on the device already"
            )
        self.path, self.keep, self.pins = Path(path), keep, keep != "device"

    def setup(self, stage: str | None = None) -> None:
        self.manifest = load_json(self.path / "manifest.json", "varlab tokenize")
        if self.manifest.get("kind") != "tokens" or self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{self.path / 'manifest.json'} describes {self.manifest.get('kind')!r} of format {self.manifest.get('format')!r},"
                f" expected tokens of format {FORMAT}"
            )
        self.train_set, self.val_set = self.read("train"), self.read("val")
        self.views = self.train_set.tokens.shape[1]
        self.shard_counts, self.num_val = [len(self.train_set)], len(self.val_set)
        self.class_names, self.data_fingerprint = self.manifest["class_names"], json_hash(self.manifest)

    def marginal_entropies(self, codebook_size: int) -> dict[str, float]:
        """Entropy of the codes of each scale over the validation set, in nats: the loss of a guess that knows how often each code
        comes and nothing else."""
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
        try:
            tokens, labels = (
                np.load(self.path / f"{split}.{part}.npy", mmap_mode="r" if self.keep == "disk" else None)
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
        rows = TokenDataset(tokens if split == "train" else tokens[:, :1], labels)  # validation sees no augmentation
        return rows.on_device(self.trainer.strategy.root_device) if self.keep == "device" and self.trainer else rows

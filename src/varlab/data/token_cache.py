"""The token cache: images encoded once and read by every transformer that is trained on them.

manifest.json                 tokenizer fingerprint, patch_nums, data set, views
train.tokens.npy              (N, views, L) in the smallest integer dtype that fits the codebook
train.labels.npy              (N,)
train.condition.npy           (N, ...) if the shards hold a vector per image
train.text.npy                (N, captions, D) in float16, if captions are encoded, or (N, captions, 1 + tokens, D) with vectors of
                              their tokens; zeros for images without
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from varlab.checkpoints.load import tokenizer_fingerprint
from varlab.data.images import Crop, ImageDataset, to_tensor
from varlab.data.manifests import TokensManifest
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader, load_manifest
from varlab.data.shards import fingerprint as shards_fingerprint
from varlab.data.storage import Storage
from varlab.distributed import WorkSplit, wait_for_files
from varlab.files import atomic_write, json_hash, load_json, save_json, sha256
from varlab.models import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.text_encoder import TextEncoder

FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionVectors:
    """The vectors of the captions of a split: `num` for each image, in turn where it has fewer."""

    encoder: TextEncoder
    captions: list[list[str]]
    num: int

    def of(self, numbers: list[int]) -> np.ndarray:
        """(n, num, D) in float16, or (n, num, 1 + tokens, D); zeros for images without captions."""
        texts = [self.captions[i] or [""] for i in numbers]
        chosen = [own[j % len(own)] for own in texts for j in range(self.num)]
        vectors = self.encoder(chosen).half().cpu().numpy()
        return vectors.reshape(len(numbers), self.num, *vectors.shape[1:])


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
    work: WorkSplit | None = None,
    storage: Storage | None = None,
    text: TextEncoder | None = None,
    max_captions: int = 4,
) -> dict[str, Any]:
    """Encodes all splits of a packed set; returns the manifest, its `splits` empty on all ranks but the first. With `text`, the
    first `max_captions` captions of each image, too; the captions of images with fewer are repeated in turn.

    Work is done in parts of `part_images`, each written atomically: an interrupted call continues with the missing
    parts, and several processes share the parts. An existing cache of the same tokenizer, data and views is kept.
    Raises ValueError if they differ.
    """
    work = work or WorkSplit()
    shard_manifest = load_manifest(shards, storage)
    views = views_of(crops, flips, seed)
    manifest: dict[str, Any] = {
        "kind": "tokens",
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "patch_nums": tokenizer.patch_nums,
        "codebook_size": tokenizer.quantizer.codebook_size,
        "data": shards_fingerprint(shard_manifest),
        "resize_ratio": resize_ratio,
        "views": views,
        "class_names": shard_manifest["class_names"],
        "splits": {},
    }
    readers = {split: ShardReader(shards, split, storage) for split in shard_manifest["splits"]}
    vectors: dict[str, CaptionVectors] = {}
    if text is not None:
        captions = {split: reader.captions() for split, reader in readers.items()}
        if not any(map(any, captions.values())):
            raise ValueError(f"{shards} has no captions: its shards hold no .txt files (see docs/text.md)")
        num_captions = min(max_captions, max(len(texts) for lists in captions.values() for texts in lists))
        vectors = {split: CaptionVectors(text, texts, num_captions) for split, texts in captions.items()}
        manifest["text"] = {
            "encoder": text.name,
            "fingerprint": text.fingerprint,
            "tokens": text.tokens,
            "captions": num_captions,
            "data": json_hash(captions),
        }
    check_same_cache(path / "manifest.json", manifest)
    if (path / "manifest.json").is_file():
        return load_json(path / "manifest.json", "varlab tokenize", TokensManifest)
    begun = path / "parts/manifest.json"
    check_same_cache(begun, manifest)
    save_json(begun, {**manifest, "part_images": part_images})
    tokenizer = tokenizer.to(device).eval()
    files: dict[str, list[Path]] = {}
    for split, reader in readers.items():
        images = ImageDataset(reader, tokenizer.image_size, resize_ratio, random_crop=False, random_flip=False)
        starts = range(0, len(images), part_images)
        files[split] = [path / f"parts/{split}-{part_images}-{number:05d}.npz" for number in range(len(starts))]
        own = list(zip(files[split], starts, strict=True))[work.rank :: work.num_ranks]
        for file, start in tqdm(own, desc=f"tokenize {split}", unit="part"):
            if not file.is_file():
                samples = range(start, min(start + part_images, len(images)))
                write_part(file, images, samples, tokenizer, views, batch_size, device, vectors.get(split))
    if work.rank:
        return manifest
    for split, parts in files.items():
        wait_for_files(parts)
        manifest["splits"][split] = join_parts(path, split, parts, tokenizer, len(views))
    save_json(path / "manifest.json", manifest)
    shutil.rmtree(path / "parts")
    return manifest


def check_same_cache(file: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError if an existing (or unfinished) cache was made with other settings."""
    if not file.is_file():
        return
    found = load_json(file, "varlab tokenize")
    changed = [key for key in {**manifest, "text": None} if key != "splits" and found.get(key) != manifest.get(key)]
    if changed:
        raise ValueError(
            f"{file.parent} already holds a token cache with different {', '.join(changed)}: choose another folder or remove it"
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
    captions: CaptionVectors | None,
) -> None:
    """Encodes a range of samples in all views into one file: tokens (n, views, L), labels (n,), skipped (n,), vectors
    (n, ...) if the shards hold them, and those of `captions`."""
    tokens: list[np.ndarray] = []
    numbers: list[int] = []
    skipped: list[bool] = []
    for first in range(samples.start, samples.stop, batch_size):
        batch = range(first, min(first + batch_size, samples.stop))
        images.reader.prepare(batch)
        by_view = [[images.readable(SampleRequest(i, 0, True), crop_of_view(view, i)) for i in batch] for view in views]
        encoded = [tokenizer.encode(to_tensor([pixels for pixels, _, _ in view]).to(device)) for view in by_view]
        tokens.append(torch.stack([torch.cat(token_maps, dim=1).cpu() for token_maps in encoded], dim=1).numpy())
        numbers += [number for _, number, _ in by_view[0]]
        skipped += [is_replaced for _, _, is_replaced in by_view[0]]
    arrays = {"tokens": np.concatenate(tokens).astype(smallest_type(tokenizer)), "skipped": np.array(skipped)}
    arrays["labels"] = images.reader.labels[numbers].astype(np.int64)
    if "condition" in images.reader.described:
        arrays["condition"] = images.reader.conditions("vector")[numbers]
    if captions is not None:
        arrays["text"] = captions.of(numbers)
    with atomic_write(file) as partial, open(partial, "wb") as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


def smallest_type(tokenizer: MSVQVAE) -> np.dtype:
    """The smallest integer dtype that fits every token."""
    return np.min_scalar_type(tokenizer.quantizer.codebook_size - 1)


def join_parts(path: Path, split: str, parts: list[Path], tokenizer: MSVQVAE, num_views: int) -> dict[str, Any]:
    """Joins the parts of a split into its arrays; returns its entry in the manifest."""
    tokens_file = path / f"{split}.tokens.npy"
    found: dict[str, list[np.ndarray]] = {}
    num_skipped = 0
    for part in parts:
        with np.load(part) as loaded:
            num_skipped += int(loaded["skipped"].sum())
            for name in {"labels", "condition", "text"} & set(loaded):
                found.setdefault(name, []).append(loaded[name])
    num_images, kind = sum(map(len, found["labels"])), smallest_type(tokenizer)
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
    for name, arrays in found.items():
        with atomic_write(path / f"{split}.{name}.npy") as partial, open(partial, "wb") as stream:
            np.save(stream, np.concatenate(arrays))
    if num_skipped:
        log.warning("%s: %d images could not be read and were replaced by the next ones", split, num_skipped)
    return {"num_images": num_images, "skipped": num_skipped, "sha256": sha256(tokens_file), "dtype": str(kind)}

"""The token cache: images encoded once and read by every transformer that is trained on them.

manifest.json                 tokenizer fingerprint, patch_nums, data set, views
train.tokens.npy              (N, views, L) in the smallest integer dtype that fits the codebook
train.labels.npy              (N,)
train.condition.npy           (N, ...) if the shards hold a vector per image
train.text.npy                (N, captions, D) in float16, if captions are encoded, or (N, captions, 1 + tokens, D) with vectors of
                              their tokens; zeros for images without
train.image.npy               (N, views, 3, h, w) in uint8, each view at a fraction of its size, if `low_res` says so

With `shapes`, there is such a cache in a folder HEIGHTxWIDTH for each, with the images whose aspect ratio is nearest to it, and
manifest.json beside them names the folders.
"""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from varlab.checkpoints.load import tokenizer_fingerprint
from varlab.data.images import Crop, ImageDataset, block_means, to_tensor
from varlab.data.manifests import TokensManifest, cache_folders
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
        vectors = self.encoder(chosen or [""]).half().cpu().numpy()[: len(chosen)]
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
    shapes: Sequence[tuple[int, int]] = (),
    low_res: int = 0,
) -> dict[Path, dict[str, Any]]:
    """Encodes all splits of a packed set; returns the manifest of the cache in each folder, its `splits` empty on all ranks but the
    first. With `text`, the first `max_captions` captions of each image, too; the captions of images with fewer are repeated in turn.
    `shapes`: (height, width) in pixels, see above; the one with the most training images comes first. `low_res`: each view is also
    stored this many times smaller, every pixel the mean of a block, as a condition for super-resolution; 0 for none.

    Work is done in parts of `part_images`, each written atomically: an interrupted call continues with the missing
    parts, and several processes share the parts. An existing cache of the same tokenizer, data and views is kept.
    Raises ValueError if they differ, and for a `low_res` that does not divide the sides of the images.
    """
    work = work or WorkSplit()
    shard_manifest = load_manifest(shards, storage)
    views = views_of(crops, flips, seed)
    shared: dict[str, Any] = {
        "kind": "tokens",
        "format": FORMAT,
        "codebook_size": tokenizer.quantizer.codebook_size,
        "data": shards_fingerprint(shard_manifest),
        "resize_ratio": resize_ratio,
        "views": views,
        "class_names": shard_manifest["class_names"],
        **({"shapes": [list(shape) for shape in shapes]} if shapes else {}),
        **({"low_res": low_res} if low_res else {}),
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
        shared["text"] = {
            "encoder": text.name,
            "fingerprint": text.fingerprint,
            "tokens": text.tokens,
            "captions": num_captions,
            "data": json_hash(captions),
        }
    tokenizer = tokenizer.to(device).eval()
    tokenizers = {path / f"{h}x{w}": tokenizer.at(tokenizer.pyramid_of((h, w))) for h, w in shapes} or {path: tokenizer}
    for own in tokenizers.values():
        height, width = own.image_size
        if low_res and (not 2 <= low_res <= 64 or height % low_res or width % low_res):
            raise ValueError(
                f"low_res={low_res}: give 2 to 64, a divisor of the sides of the images, {height} x {width}"
            )
    manifests = {
        folder: {**shared, "tokenizer": tokenizer_fingerprint(own), "patch_nums": own.patch_nums}
        for folder, own in tokenizers.items()
    }
    for folder, manifest in manifests.items():
        check_same_cache(folder / "manifest.json", manifest)
        check_same_cache(folder / "parts/manifest.json", manifest)
    if (path / "manifest.json").is_file():
        found = cache_folders(path)
        if not set(found) <= set(tokenizers):
            raise ValueError(
                f"{path} already holds token caches of {', '.join(folder.name for folder in found)}: choose another folder or remove it"
            )
        remove_parts(tokenizers)
        return {folder: load_json(folder / "manifest.json", "varlab tokenize", TokensManifest) for folder in found}
    for folder, manifest in manifests.items():
        save_json(folder / "parts/manifest.json", {**manifest, "part_images": part_images})
    names: dict[str, list[str]] = {}
    for split, reader in readers.items():
        images = ImageDataset(
            reader, tokenizer.image_size, resize_ratio, random_crop=False, random_flip=False, shapes=shapes
        )
        starts = range(0, len(images), part_images)
        names[split] = [f"parts/{split}-{part_images}-{number:05d}.npz" for number in range(len(starts))]
        own = list(zip(names[split], starts, strict=True))[work.rank :: work.num_ranks]
        for name, start in tqdm(own, desc=f"tokenize {split}", unit="part"):
            if not all((folder / name).is_file() for folder in tokenizers):
                samples = range(start, min(start + part_images, len(images)))
                write_part(name, images, samples, tokenizers, views, batch_size, vectors.get(split), low_res)
    if work.rank:
        return {folder: {**manifest, "splits": {}} for folder, manifest in manifests.items()}
    for folder, manifest in manifests.items():
        manifest["splits"] = {}
        for split, parts in names.items():
            files = [folder / name for name in parts]
            wait_for_files(files)
            manifest["splits"][split] = join_parts(folder, split, files, tokenizers[folder], len(views), low_res)
    counts = {
        folder: {split: entry["num_images"] for split, entry in manifest["splits"].items()}
        for folder, manifest in manifests.items()
    }
    used = sorted(manifests, key=lambda folder: -counts[folder].get("train", 0))
    used = [folder for folder in used if counts[folder].get("train", 0) or not shapes]
    for folder in used:
        save_json(folder / "manifest.json", manifests[folder])
    if shapes:
        save_json(path / "manifest.json", {"kind": "shapes", "format": 1, "shapes": [folder.name for folder in used]})
    for folder in tokenizers.keys() - set(used):
        log.warning(
            "%s: no training image is nearest to this shape; %d others are left out",
            folder,
            sum(counts[folder].values()),
        )
        for split in manifests[folder]["splits"]:
            for file in folder.glob(f"{split}.*.npy"):
                file.unlink()
    remove_parts(tokenizers)
    return {folder: manifests[folder] for folder in used}


def remove_parts(folders: Iterable[Path]) -> None:
    """Removes what an unfinished call leaves behind; other files stay."""
    for folder in folders:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_same_cache(file: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError if an existing (or unfinished) cache was made with other settings."""
    if not file.is_file():
        return
    found = load_json(file, "varlab tokenize")
    changed = [
        key
        for key in {**manifest, "text": None, "shapes": None, "low_res": None}
        if key != "splits" and found.get(key) != manifest.get(key)
    ]
    if changed:
        raise ValueError(
            f"{file.parent} already holds a token cache with different {', '.join(changed)}: choose another folder or remove it"
        )


@torch.no_grad()
def write_part(
    name: str,
    images: ImageDataset,
    samples: range,
    tokenizers: dict[Path, MSVQVAE],
    views: list[dict[str, Any]],
    batch_size: int,
    captions: CaptionVectors | None,
    low_res: int = 0,
) -> None:
    """Encodes a range of samples in all views into one file in each folder: tokens (n, views, L), labels (n,), skipped (n,), vectors
    (n, ...) if the shards hold them, and those of `captions`; with `low_res`, the views at a fraction of their size, too."""
    rows: dict[Path, list[tuple[Tensor, int, bool]]] = {folder: [] for folder in tokenizers}
    smaller: dict[Path, list[np.ndarray]] = {folder: [] for folder in tokenizers}
    for first in range(samples.start, samples.stop, batch_size):
        batch = range(first, min(first + batch_size, samples.stop))
        images.reader.prepare(batch)
        read = [[images.readable(SampleRequest(i, 0, True), crop_of_view(view, i)) for view in views] for i in batch]
        for folder, tokenizer in tokenizers.items():
            own = [views for views in read if views[0][0].shape[:2] == tokenizer.image_size]
            if own:
                encoded = [encode(tokenizer, [pixels for pixels, _, _ in view]) for view in zip(*own, strict=True)]
                tokens = torch.stack(encoded, dim=1)
                rows[folder] += [(row, *views[0][1:]) for row, views in zip(tokens, own, strict=True)]
                if low_res:
                    means = block_means(np.array([[pixels for pixels, _, _ in view] for view in own]), low_res)
                    smaller[folder].append(means.transpose(0, 1, 4, 2, 3))
    for folder, tokenizer in tokenizers.items():
        numbers = [number for _, number, _ in rows[folder]]
        tokens = np.zeros((len(numbers), len(views), scales.num_tokens(tokenizer.patch_nums)), smallest_type(tokenizer))
        for i, (row, _, _) in enumerate(rows[folder]):
            tokens[i] = row.numpy()
        arrays = {"tokens": tokens, "skipped": np.array([is_replaced for _, _, is_replaced in rows[folder]], bool)}
        arrays["labels"] = images.reader.labels[numbers].astype(np.int64)
        if "condition" in images.reader.described:
            arrays["condition"] = images.reader.conditions("vector")[numbers]
        if captions is not None:
            arrays["text"] = captions.of(numbers)
        if low_res:
            height, width = (side // low_res for side in tokenizer.image_size)
            arrays["image"] = np.concatenate([np.zeros((0, len(views), 3, height, width), np.uint8), *smaller[folder]])
        with atomic_write(folder / name) as partial, open(partial, "wb") as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


def encode(tokenizer: MSVQVAE, images: list[np.ndarray]) -> Int[Tensor, "B L"]:
    """Sequences of uint8 images, on the CPU."""
    device = tokenizer.quantizer.hits.device
    return torch.cat(tokenizer.encode(to_tensor(images).to(device)), dim=1).cpu()


def smallest_type(tokenizer: MSVQVAE) -> np.dtype:
    """The smallest integer dtype that fits every token."""
    return np.min_scalar_type(tokenizer.quantizer.codebook_size - 1)


def join_parts(
    path: Path, split: str, parts: list[Path], tokenizer: MSVQVAE, num_views: int, low_res: int
) -> dict[str, Any]:
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
    shape = (num_images, num_views, scales.num_tokens(tokenizer.patch_nums))
    join_rows(parts, "tokens", tokens_file, shape, kind)
    if low_res:
        shape = (num_images, num_views, 3, *(side // low_res for side in tokenizer.image_size))
        join_rows(parts, "image", path / f"{split}.image.npy", shape, np.dtype(np.uint8))
    for name, arrays in found.items():
        with atomic_write(path / f"{split}.{name}.npy") as partial, open(partial, "wb") as stream:
            np.save(stream, np.concatenate(arrays))
    if num_skipped:
        log.warning("%s: %d images could not be read and were replaced by the next ones", split, num_skipped)
    return {"num_images": num_images, "skipped": num_skipped, "sha256": sha256(tokens_file), "dtype": str(kind)}


def join_rows(parts: list[Path], name: str, file: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes the rows of one array of all parts into a file of this shape, one part in memory at a time."""
    with atomic_write(file) as partial:
        rows = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        first = 0
        for part in parts:
            with np.load(part) as loaded:
                own = loaded[name]
            rows[first : first + len(own)] = own
            first += len(own)
        rows.flush()
        del rows

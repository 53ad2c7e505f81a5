"""Image sets for scores: folders, ADM-format .npz files, stored statistics; their features, cached by content."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from varlab.data.decoding import open_image
from varlab.data.manifests import read_archive
from varlab.distributed import WorkSplit, wait_for_files
from varlab.evaluation.frechet import FeatureStatistics
from varlab.evaluation.generation_metrics import Features
from varlab.files import atomic_write, sha256

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
LOSSY = (".jpg", ".jpeg", ".webp")


class ImageSet:
    """Images of one size: the files of a folder, sorted by name, or `arr_0` of an .npz (uint8, N H W 3); for a folder of
    `varlab sample`, its `images` or its `samples.npz`.

    `identity`: hash of their content. Raises ValueError naming the problem.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[Path] = []
        self.array: np.ndarray | None = None
        if (self.path / "samples.npz").is_file() and not (self.path / "images").is_dir():
            self.path = self.path / "samples.npz"
        if self.path.suffix == ".npz" and self.path.is_file():
            array = read_archive(self.path, "arr_0").get("arr_0")
            if array is None or array.size == 0:
                raise ValueError(f"{path} holds no images as arr_0")
            if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
                raise ValueError(f"{path}: arr_0 is {array.dtype} of shape {array.shape}, not uint8 (N, H, W, 3)")
            self.array = array
            self.identity = sha256(self.path)[:16]
            return
        folder = self.path / "images" if (self.path / "images").is_dir() else self.path
        self.files = sorted(file for file in folder.glob("*") if file.suffix.lower() in EXTENSIONS)
        if not self.files:
            raise ValueError(f"{path} is neither a folder of images nor an .npz of images")
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(bytes.fromhex(sha256(file)))
        self.identity = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    @property
    def lossy(self) -> int:
        """Number of files in a format that changes pixels."""
        return sum(file.suffix.lower() in LOSSY for file in self.files)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.pixels(0).shape[:2]
        return height, width

    def pixels(self, i: int) -> np.ndarray:
        """One image, uint8 (H, W, 3)."""
        return self.array[i] if self.array is not None else np.asarray(open_image(self.files[i], str(self.files[i])))

    def batch(self, indices: Sequence[int], device: torch.device) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1]. Raises ValueError naming the first image of a different size."""
        images = [self.pixels(i) for i in indices]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                name = self.files[i] if self.files else f"image {i}"
                raise ValueError(
                    f"{name} has shape {image.shape}, but others have {images[0].shape}: scores need images of one size"
                )
        return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def extract(
    network: nn.Module,
    num_images: int,
    read,
    batch_size: int,
    cache: Path,
    desc: str,
    work: WorkSplit | None = None,
) -> Features:
    """Features of images 0 .. num_images - 1, which `read(indices)` returns as batches in [-1, 1]; cached in the file
    `cache`.

    The images are split over processes; all but the first return only their own.
    """
    work = work or WorkSplit()
    if cache.is_file():
        return load_features(cache)
    own = list(range(num_images))[work.rank :: work.num_ranks]
    found: dict[str, list[np.ndarray]] = {}
    batches = [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
    for indices in tqdm(batches, desc=desc, unit="batch", disable=work.rank > 0):
        for name, values in outputs(network, read(indices)).items():
            found.setdefault(name, []).append(values)
    arrays = {name: np.concatenate(values) for name, values in found.items()}
    if work.num_ranks == 1:
        save_features(cache, arrays)
        return Features(**arrays)
    parts = [cache.with_name(f"{cache.stem}-{rank}-of-{work.num_ranks}.npz") for rank in range(work.num_ranks)]
    save_features(parts[work.rank], arrays)
    if work.rank > 0:
        return Features(**arrays)
    wait_for_files(parts)
    loaded = [load_features(part) for part in parts]
    joined = {}
    for name in arrays:
        whole = np.empty((num_images, arrays[name].shape[1]), dtype=arrays[name].dtype)
        for rank, one in enumerate(loaded):
            whole[rank :: work.num_ranks] = getattr(one, name)
        joined[name] = whole
    save_features(cache, joined)
    for part in parts:
        part.unlink()
    return Features(**joined)


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """The network's outputs for a batch: those of `all_outputs` (Inception), or the pooled features alone."""
    if hasattr(network, "all_outputs"):
        values = network.all_outputs(images)  # pyright: ignore[reportCallIssue]
        return {
            name: value.float().cpu().numpy()
            for name, value in zip(("pooled", "spatial", "probabilities"), values, strict=True)
        }
    return {"pooled": network.pooled(images).float().cpu().numpy()}  # pyright: ignore[reportCallIssue]


def save_features(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes features atomically."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_features(path: Path) -> Features:
    """Features of a cache file."""
    try:
        return Features(**read_archive(path))
    except TypeError:
        raise ValueError(f"{path} is not a cache of features: remove it") from None


def cache_file(*parts: str) -> Path:
    """The cache file of features with this key, in VARLAB_CACHE or the user's cache folder."""
    folder = Path(os.environ.get("VARLAB_CACHE", "~/.cache/varlab")).expanduser() / "features"
    return folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}.npz"


def stored_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """`mu`, `sigma` (and `mu_s`, `sigma_s` for sFID) of an ADM reference .npz; empty if it holds only images."""
    arrays, found = read_archive(path, "mu", "sigma", "mu_s", "sigma_s"), {}
    for name, suffix in [("pooled", ""), ("spatial", "_s")]:
        mean, covariance = (arrays.get(f"{what}{suffix}") for what in ("mu", "sigma"))
        if mean is not None and covariance is not None:
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(
                    f"{path}: mu{suffix} {mean.shape} and sigma{suffix} {covariance.shape} do not belong together"
                )
            found[name] = FeatureStatistics(mean, covariance, 0)
    return found


def score_name(network: nn.Module) -> str:
    """The name of a network in scores: its `score_name`, or its class name in lower case."""
    return getattr(network, "score_name", type(network).__name__.lower())


def network_identity(network: nn.Module) -> str:
    """Hash of a network's class and weights; 16 hex digits."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted([*network.named_parameters(), *network.named_buffers()]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

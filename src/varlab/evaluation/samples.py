"""Scores of samples against real images, under their common names, with protocol and floor."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from varlab import __version__
from varlab.data.images import CenterCrops
from varlab.data.resolutions import resolution_of
from varlab.data.shards import ShardReader, fingerprint
from varlab.data.storage import Storage
from varlab.distributed import WorkSplit
from varlab.evaluation.frechet import frechet_distance, statistics
from varlab.evaluation.generation_metrics import Features, frechet_infinity, resampled_distances, scores
from varlab.evaluation.image_sets import (
    ImageSet,
    cache_file,
    extract,
    network_identity,
    score_name,
    stored_statistics,
)
from varlab.evaluation.published_scores import compare
from varlab.files import load_json, save_json

MOST_HALF_SAMPLES = 50
FIELD_NAMES = {  # common names of scores with Inception's features
    "frechet_distance": "fid",
    "frechet_distance_infinity": "fid_infinity",
    "spatial_frechet_distance": "sfid",
    "inception_score": "inception_score",
    "kernel_distance": "kid",
}


def evaluate_samples(
    samples: str,
    reference: str,
    network: nn.Module,
    out: Path,
    *,
    split: str = "train",
    num_images: int | None = None,
    resize_ratio: float = 1.0,
    batch_size: int = 32,
    device: torch.device,
    storage: Storage | None = None,
    preset: str | None = None,
    metrics: dict[str, Callable[[Features, Features], float]] | None = None,
    bootstraps: int | None = None,
) -> dict[str, Any] | None:
    """Writes generation.json into `out`: scores of samples (folder or .npz) against a reference (packed set or ADM
    .npz), with their protocol and the floor (scores of other real images); returns it. The images are split over the
    processes of torchrun; all but the first return None.

    `network`: computes the features. `metrics`: by name, functions of the features of samples and of real images.
    `preset`: published scores to compare the protocol with. `bootstraps`: resamplings for intervals;
    None is 100 with at most 512 features, else none. Scores that too few images do not allow are left out, with a warning.
    """
    work, sample_set = WorkSplit.of_environment(), ImageSet(samples)
    network, name = network.to(device), score_name(network)
    made = features_of_set(sample_set, network, batch_size, device, work, "samples")
    real = Reference(reference, network, sample_set, split, num_images, resize_ratio, batch_size, device, storage, work)
    if work.rank > 0:
        return None
    if bootstraps is None:
        bootstraps = 100 if made.pooled.shape[1] <= 512 else 0
    # with stored statistics there are no images to resample
    resampled = [] if real.statistics else resampled_distances(made.pooled, real.features.pooled, bootstraps)
    found, warnings = scores(made, real.features, resampled=resampled, half_samples=min(bootstraps, MOST_HALF_SAMPLES))
    result = {named(key, name): value for key, value in found.items()}
    if real.statistics:
        result.pop(named("frechet_distance_infinity", name), None)
        result |= {named(key, name): value for key, value in real.distances(made).items()}
    if real.other is not None:
        floor, _ = scores(real.other, real.features)
        result |= {f"{named(key, name)}/real_against_real": value for key, value in floor.items() if "/" not in key}
    result |= {key: float(metric(made, real.features)) for key, metric in (metrics or {}).items()}
    protocol = {
        "features": name,
        "features_weights": network_identity(network),
        "samples": sample_set.identity,
        "num_samples": len(sample_set),
        "resolution": resolution_of(sample_set.size),
        **real.protocol,
        "bootstraps": bootstraps,
        "sampling": load_sampling(Path(samples) / "samples.json"),
        "varlab": __version__,
    }
    warnings += compare(preset, protocol)
    warnings += class_mix(load_labels(Path(samples) / "samples.json"), real.labels)
    if sample_set.lossy:
        warnings.append(
            f"{sample_set.lossy} images are in a lossy format: its artifacts count as differences; save as PNG"
        )
    result |= {"resampled_distances": [float(f"{distance:.6g}") for distance in resampled]}
    result = {**result, "protocol": protocol, "preset": preset, "warnings": warnings}
    save_json(out / "generation.json", result)
    return result


def load_sampling(file: Path) -> dict[str, Any] | None:
    """The sampling settings that `varlab sample` recorded, without labels; None if there are none."""
    if not file.is_file():
        return None
    recorded = load_json(file, "varlab sample")
    return {key: value for key, value in recorded.items() if key not in ("labels", "class_names")}


def load_labels(file: Path) -> np.ndarray:
    """The classes of samples that `varlab sample` recorded; none for others."""
    recorded = load_json(file, "varlab sample").get("labels", []) if file.is_file() else []
    return np.asarray(recorded if all(isinstance(label, int) for label in recorded) else [], dtype=np.int64)


def class_mix(made: np.ndarray, real: np.ndarray) -> list[str]:
    """A warning if the shares of the classes differ by more than chance: distances then measure the mix, too."""
    if not len(made) or not len(real):
        return []
    num_classes = int(max(made.max(), real.max())) + 1
    counts, shares = np.bincount(made, minlength=num_classes), np.bincount(real, minlength=num_classes) / len(real)
    difference = np.abs(counts / len(made) - shares).sum() / 2
    random = np.random.default_rng(0).multinomial(len(made), shares, size=200) / len(made)
    if difference <= np.quantile(np.abs(random - shares).sum(axis=1) / 2, 0.99):
        return []
    return [
        f"the classes of the samples are in other proportions than the reference's ({100 * difference:.0f} % of the images would"
        " have to change class), which raises distances: sample with classes=data shards=REFERENCE"
    ]


def features_of_set(
    images: ImageSet, network: nn.Module, batch_size: int, device: torch.device, work: WorkSplit, desc: str
) -> Features:
    """Features of all images of a folder or .npz."""
    cache = cache_file(network_identity(network), images.identity)
    return extract(network, len(images), lambda indices: images.batch(indices, device), batch_size, cache, desc, work)


class Reference:
    """The reference of a comparison: features of real images, statistics of an ADM reference, and other real images for
    the floor."""

    def __init__(
        self,
        path: str,
        network: nn.Module,
        samples: ImageSet,
        split: str,
        num_images: int | None,
        resize_ratio: float,
        batch_size: int,
        device: torch.device,
        storage: Storage | None,
        work: WorkSplit,
    ) -> None:
        self.other: Features | None = None
        self.labels = np.zeros(0, dtype=np.int64)
        self.statistics = {}
        self.protocol: dict[str, Any]
        if path.endswith(".npz"):
            if score_name(network) == "inception":
                self.statistics = stored_statistics(Path(path))
            images = ImageSet(path)
            self.features = features_of_set(images, network, batch_size, device, work, "reference")
            self.protocol = {"reference": images.identity, "reference_images": len(images), "reference_split": None}
            self.protocol["reference_statistics"] = "stored" if self.statistics else "of the images"
            self.protocol["floor_images"] = None
            return

        def of_split(split: str, num_images: int | None) -> tuple[Features, ShardReader, np.ndarray]:
            reader = ShardReader(path, split, storage)
            crops = CenterCrops(reader, samples.size, resize_ratio, num_images, batch_size, device)
            settings = (split, resolution_of(samples.size), resize_ratio, num_images)
            cache = cache_file(network_identity(network), fingerprint(reader.manifest), *map(str, settings))

            def read(indices: list[int]) -> torch.Tensor:
                return crops.read([crops.samples[i] for i in indices])

            labels = np.asarray(reader.labels)[crops.samples].astype(np.int64)
            return extract(network, len(crops.samples), read, batch_size, cache, split, work), reader, labels

        self.features, reader, self.labels = of_split(split, num_images)
        other = "val" if split != "val" else "train"
        if other in reader.manifest["splits"]:
            self.other = of_split(other, len(samples))[0]
        self.protocol = {
            "reference": fingerprint(reader.manifest),
            "reference_images": len(self.features.pooled),
            "reference_split": split,
            "reference_statistics": "of the images",
            "floor_images": None if self.other is None else len(self.other.pooled),
            "resize_ratio": resize_ratio,
        }

    def distances(self, made: Features) -> dict[str, float]:
        """Frechet distances to the statistics stored in the reference file."""
        names = {"pooled": "frechet_distance", "spatial": "spatial_frechet_distance"}
        distances = {
            names[kind]: frechet_distance(statistics(getattr(made, kind)), found)
            for kind, found in self.statistics.items()
        }
        with suppress(ValueError):  # too few samples, which `scores` has said
            if (target := self.statistics.get("pooled")) is not None:
                distances["frechet_distance_infinity"] = frechet_infinity(made.pooled, target)
        return distances


def named(score: str, network: str) -> str:
    """The common name of a score with Inception's features; with any other network SCORE/NETWORK."""
    score, _, rest = score.partition("/")
    name = FIELD_NAMES.get(score, score) if network == "inception" else f"{score}/{network}"
    return f"{name}/{rest}" if rest else name

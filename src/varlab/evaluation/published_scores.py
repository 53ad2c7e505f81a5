"""Protocols of published scores: what must be equal before scores are compared."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published number and how it was made."""

    fid: float
    inception_score: float | None
    source: str
    resolution: int = 256
    num_samples: int = 50_000
    cfg_scale: float = 1.5
    top_k: int = 900
    top_p: float = 0.96


REPOSITORY = "the released weights, by their repository: ADM evaluator, 50 images a class, no rejection"
PRESETS = {
    "var_d16_256": Preset(3.55, 274.4, REPOSITORY),
    "var_d20_256": Preset(2.95, 302.6, REPOSITORY),
    "var_d24_256": Preset(2.33, 312.9, REPOSITORY),
    "var_d30_256": Preset(1.97, 323.1, REPOSITORY),
    "var_d36_512": Preset(2.63, 303.2, "the paper: ADM evaluator, ImageNet 512", resolution=512),
}


def compare(name: str | None, protocol: dict[str, Any]) -> list[str]:
    """What keeps a set of scores from being compared with the published one (or, without a preset, with any published
    FID).

    Raises ValueError for a preset that is unknown.
    """
    warnings = general(protocol)
    if name is None:
        return warnings
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    preset, sampling = PRESETS[name], protocol.get("sampling") or {}
    wanted = {key: getattr(preset, key) for key in ("cfg_scale", "top_k", "top_p")}
    if not sampling:
        warnings.append(f"how the samples were made is unknown; {name} wants {wanted}")
    for key, value in wanted.items():
        if sampling and sampling.get(key) != value:
            warnings.append(f"{key}={sampling.get(key)}, {name} has {value}")
    if sampling.get("smooth"):
        warnings.append("smooth=true changes scores: it is for demos")
    if protocol["resolution"] != preset.resolution:
        warnings.append(f"images of {protocol['resolution']} pixels, {name} has {preset.resolution}")
    if protocol["num_samples"] != preset.num_samples and protocol["num_samples"] >= 50_000:
        warnings.append(f"{protocol['num_samples']:,} samples, {name} has {preset.num_samples:,}")
    if protocol["reference_statistics"] != "stored":
        warnings.append("the published number is against the statistics stored in the ADM reference .npz")
    published = f"published: FID {preset.fid}" + (f", IS {preset.inception_score}" if preset.inception_score else "")
    verdict = "not comparable" if warnings else "same protocol"
    return [*warnings, f"{published} ({preset.source}); {verdict}"]


def general(protocol: dict[str, Any]) -> list[str]:
    """What makes any score of generated images unlike the published ones."""
    warnings = []
    if protocol["features"] != "inception":
        warnings.append(f"features of {protocol['features']}: not FID, and not to be compared with one")
    if protocol["num_samples"] < 50_000:
        warnings.append(
            f"{protocol['num_samples']:,} samples: fewer than the 50,000 of published scores give higher distances"
        )
    if protocol.get("reference_split") == "val":
        warnings.append(
            "against the validation split: published FIDs of generated images are against training statistics"
        )
    return warnings

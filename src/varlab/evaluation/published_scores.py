"""Protocols of published scores: what must match before scores are compared."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One published score and its protocol."""

    fid: float
    inception_score: float | None
    source: str
    resolution: int = 256
    num_samples: int = 50_000
    cfg_scale: float = 1.5
    top_k: int = 900
    top_p: float = 0.96


REPOSITORY = "the released weights, according to their repository: ADM evaluator, 50 images per class, no rejection"
PRESETS = {
    "var_d16_256": Preset(3.55, 274.4, REPOSITORY),
    "var_d20_256": Preset(2.95, 302.6, REPOSITORY),
    "var_d24_256": Preset(2.33, 312.9, REPOSITORY),
    "var_d30_256": Preset(1.97, 323.1, REPOSITORY),
    "var_d36_512": Preset(2.63, 303.2, "the paper: ADM evaluator, ImageNet 512", resolution=512),
}


def compare(name: str | None, protocol: dict[str, Any]) -> list[str]:
    """Reasons why scores are not comparable with the published ones of a preset (or, without a preset, with any
    published FID), as text.

    Raises ValueError for an unknown preset.
    """
    warnings = general(protocol)
    if name is None:
        return warnings
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    preset, sampling = PRESETS[name], protocol.get("sampling") or {}
    wanted = {key: getattr(preset, key) for key in ("cfg_scale", "top_k", "top_p")}
    if not sampling:
        warnings.append(f"the sampling settings are unknown; {name} uses {wanted}")
    for key, value in wanted.items():
        if sampling and sampling.get(key) != value:
            warnings.append(f"{key}={sampling.get(key)}, but {name} uses {value}")
    if sampling.get("smooth"):
        warnings.append("smooth=true changes scores: it is for demos")
    if protocol["resolution"] != preset.resolution:
        warnings.append(f"images of {protocol['resolution']} pixels, but {name} uses {preset.resolution}")
    if protocol["num_samples"] != preset.num_samples and protocol["num_samples"] >= 50_000:
        warnings.append(f"{protocol['num_samples']:,} samples, but {name} uses {preset.num_samples:,}")
    if protocol["reference_statistics"] != "stored":
        warnings.append("the published score uses the statistics stored in the ADM reference .npz")
    published = f"published: FID {preset.fid}" + (f", IS {preset.inception_score}" if preset.inception_score else "")
    verdict = "not comparable" if warnings else "same protocol"
    return [*warnings, f"{published} ({preset.source}); {verdict}"]


def general(protocol: dict[str, Any]) -> list[str]:
    """Reasons why scores are not comparable with any published score of generated images."""
    warnings = []
    if protocol["features"] != "inception":
        warnings.append(f"features of {protocol['features']}: not FID, and not comparable with it")
    if protocol["num_samples"] < 50_000:
        warnings.append(
            f"{protocol['num_samples']:,} samples: fewer than the 50,000 of published scores give higher distances"
        )
    if protocol.get("reference_split") == "val":
        warnings.append(
            "computed against the validation split: published FIDs of generated images use training statistics"
        )
    return warnings

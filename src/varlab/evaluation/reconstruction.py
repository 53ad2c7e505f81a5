"""Scores of reconstructions: fidelity after each scale, codebook usage, Frechet distance with its floor."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from varlab.evaluation.frechet import features_of, frechet_distance, statistics
from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import perplexity_of


def ssim(images: Float[Tensor, "B 3 H W"], references: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity (Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5) of each image; images in [-1, 1]."""
    score = structural_similarity_index_measure(
        images / 2 + 0.5, references / 2 + 0.5, data_range=1.0, reduction="none", gaussian_kernel=True
    )
    assert isinstance(score, Tensor)
    return score.reshape(len(images))


@dataclass
class Averages:
    """Running means of named scores over images."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """Adds one value per image."""
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0) + len(values)

    def means(self) -> dict[str, float]:
        """Mean of each score."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@torch.no_grad()
def reconstruction_scores(
    tokenizer: MSVQVAE, batches: Iterable[Tensor], metrics: dict[str, Callable], num_curve: int
) -> dict[str, Any]:
    """Scores of a tokenizer on batches of images in [-1, 1].

    psnr (dB), ssim and each of `metrics` (one value per image) as means over images; `by_scale`: the same after each
    scale, over the first `num_curve` images; `usage_by_scale` (percent of the codes, or of the values of their digits, in
    use), `perplexity_by_scale` (codes), and both over all scales.
    """
    quantizer, seen, averages = tokenizer.quantizer, 0, Averages()
    hits = torch.zeros(quantizer.hits.shape)
    for images in tqdm(batches, desc="reconstruct", unit="batch"):
        token_maps = tokenizer.encode(images)
        hits += quantizer.count(token_maps).cpu()
        is_in_curve = seen < num_curve
        outputs = tokenizer.filmstrip(token_maps) if is_in_curve else tokenizer.decode(token_maps)[None]
        for k, output in enumerate(outputs):
            is_last = k == len(outputs) - 1
            for name, values in scores_of(output, images, metrics).items():
                if is_in_curve:
                    averages.add(f"{name}@{k}", values)
                if is_last:
                    averages.add(name, values)
        seen += len(images)
    means = averages.means()
    names = [name for name in means if "@" not in name]
    by_scale = [quantizer.hits_of_scale(hits, k) for k in range(quantizer.num_scales)]
    return {
        **{name: means[name] for name in names},
        "usage": usage_of(quantizer.hits_of_all(hits)),
        "perplexity": float(perplexity_of(quantizer.hits_of_all(hits))),
        "by_scale": {name: [means[f"{name}@{k}"] for k in range(quantizer.num_scales)] for name in names},
        "curve_images": averages.counts["psnr@0"],
        "usage_by_scale": [usage_of(parts) for parts in by_scale],
        "perplexity_by_scale": [float(perplexity_of(parts)) for parts in by_scale],
        "tokens_by_scale": scales.lengths(tokenizer.patch_nums),
        "num_images": seen,
    }


def usage_of(digits: list[Tensor]) -> float:
    """Percent of the values of all digits that occur."""
    return 100 * float((torch.cat(digits) > 0).float().mean())


def scores_of(output: Tensor, images: Tensor, metrics: dict[str, Callable]) -> dict[str, Tensor]:
    """Every score of each image."""
    return {
        "psnr": losses.psnr(output, images),
        "ssim": ssim(output, images),
        **{name: metric(output, images) for name, metric in metrics.items()},
    }


@torch.no_grad()
def reconstruction_distance(
    tokenizer: MSVQVAE, network: nn.Module, images: Iterable[Tensor], others: Iterable[Tensor]
) -> dict[str, float]:
    """Frechet distance of reconstructions to the images, and its floor: the distance of the same number of other real
    images."""

    def reconstructed() -> Iterator[Tensor]:
        for batch in images:
            yield tokenizer.decode(tokenizer.encode(batch))

    real, made = features_of(network, images, "real"), features_of(network, reconstructed(), "reconstructed")
    other = features_of(network, others, "other real")[: len(real)]
    reference = statistics(real)
    return {
        "distance": frechet_distance(statistics(made), reference),
        "real_against_real": frechet_distance(statistics(other), reference),
        "num_images": len(real),
        "num_other": len(other),
    }

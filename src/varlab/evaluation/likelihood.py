"""How well a VAR predicts the tokens of images: loss, error, calibration and the gain from the condition, per scale."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from varlab.models import losses, scales
from varlab.models.digits import Bases, most_likely
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR

NUM_BINS = 15


class Calibration:
    """Expected calibration error (Guo et al. 2017): mean gap between the probability of the most likely code and its
    accuracy, over 15 bins of equal width, in percent. Counted on `device`."""

    def __init__(self, num_scales: int, device: torch.device | None = None) -> None:
        self.counts, self.confidence, self.right = (
            torch.zeros(num_scales, NUM_BINS, dtype=torch.float64, device=device) for _ in range(3)
        )

    def add(self, k: int, logits: Float[Tensor, "B l S"], tokens: Int[Tensor, "B l"], bases: Bases) -> None:
        """Adds the tokens of scale k, predicted digit by digit."""
        found, confidence = most_likely(logits.flatten(0, 1), bases)
        bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        right = (found == tokens.flatten()).double()
        for total, values in [
            (self.counts, torch.ones_like(right)),
            (self.confidence, confidence.double()),
            (self.right, right),
        ]:
            total[k].scatter_add_(0, bins, values)

    def error(self, k: int | None = None) -> float:
        """Calibration error of scale k, or of all tokens."""
        counts, confidence, right = (
            x.sum(dim=0) if k is None else x[k] for x in (self.counts, self.confidence, self.right)
        )
        return 100 * float((confidence - right).abs().sum() / counts.sum().clamp(min=1))


@torch.no_grad()
def likelihood_scores(
    var: VAR, quantizer: ResidualQuantizer, batches: Iterable[tuple[Int[Tensor, "B L"], Tensor]]
) -> dict[str, Any]:
    """Scores over batches of (sequence, condition).

    `loss` (nats per token), `error` (percent), `perplexity`, `calibration_error` (percent), `bits_per_token`,
    `bits_per_image`, `unconditional_loss` (with the null condition) and `class_gap` (that minus `loss`, in nats per
    token), over all tokens and, in `by_scale`, for each scale.
    """
    var.eval()
    patch_nums, num, device = var.patch_nums, 0, var.head.weight.device
    zeros = torch.zeros(len(patch_nums), dtype=torch.float64, device=device)
    sums = {name: zeros.clone() for name in ("loss", "error", "unconditional_loss")}
    calibration = Calibration(len(patch_nums), device)
    for sequence, condition in tqdm(batches, desc="likelihood", unit="batch"):
        token_maps = list(sequence.split(scales.lengths(patch_nums), dim=1))
        inputs = quantizer.teacher_forcing_inputs(token_maps, var.order)
        logits = var(inputs, condition)
        found = losses.token_scores(logits, sequence, patch_nums, var.bases)
        blind = losses.token_scores(var(inputs, var.embedder.null(condition)), sequence, patch_nums, var.bases)
        for name, values in [("loss", found.loss), ("error", found.error), ("unconditional_loss", blind.loss)]:
            sums[name] += values.double().sum(dim=0)
        for k, (first, last) in enumerate(scales.scale_bounds(patch_nums)):
            calibration.add(k, logits[:, first:last], sequence[:, first:last], var.bases)
        num += len(condition)
    sums = {name: total.cpu() for name, total in sums.items()}
    by_scale = {name: (total / num).tolist() for name, total in sums.items()}
    overall = {name: float(losses.over_tokens(total / num, patch_nums)) for name, total in sums.items()}
    by_scale["perplexity"] = [math.exp(loss) for loss in by_scale["loss"]]
    by_scale["calibration_error"] = [calibration.error(k) for k in range(len(patch_nums))]
    by_scale["class_gap"] = [
        blind - loss for blind, loss in zip(by_scale["unconditional_loss"], by_scale["loss"], strict=True)
    ]
    bits = overall["loss"] / math.log(2)
    return {
        **overall,
        "perplexity": math.exp(overall["loss"]),
        "calibration_error": calibration.error(),
        "class_gap": overall["unconditional_loss"] - overall["loss"],
        "bits_per_token": bits,
        "bits_per_image": bits * scales.num_tokens(patch_nums),
        "by_scale": by_scale,
        "num_images": num,
    }

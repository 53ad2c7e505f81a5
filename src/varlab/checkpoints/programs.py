"""Exported programs of a trained model: the decoder and one step of the next-scale loop (torch.export), or the decoder
as ONNX."""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varlab.files import atomic_folder
from varlab.models.msvqvae import MSVQVAE
from varlab.models.transformer import BlockCache
from varlab.models.var import VAR


class DecoderProgram(nn.Module):
    """Sum of codes (B C H W) -> images (B 3 h w) in [0, 1]."""

    def __init__(self, tokenizer: MSVQVAE) -> None:
        super().__init__()
        self.post_conv, self.decoder = tokenizer.post_conv, tokenizer.decoder

    def forward(self, f_hat: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        return self.decoder(self.post_conv(f_hat)).clamp(-1, 1) / 2 + 0.5


class StepProgram(nn.Module):
    """Inputs of scale k, conditions, keys and values of the prefix, if there is one, and the coarser scales (depth, B, heads,
    tokens, head dim) -> logits of scale k, keys and values including scale k."""

    def __init__(self, var: VAR, k: int) -> None:
        super().__init__()
        self.var, self.k = var, k

    def forward(
        self,
        inputs: Float[Tensor, "B l C"],
        condition: Tensor,
        keys: Float[Tensor, "n B N c d"],
        values: Float[Tensor, "n B N c d"],
    ) -> tuple[Float[Tensor, "B m V"], Float[Tensor, "n B N e d"], Float[Tensor, "n B N e d"]]:
        room = keys.new_zeros(*keys.shape[:3], inputs.shape[1], keys.shape[4])
        seen = keys.shape[3]
        caches = [
            BlockCache(torch.cat([keys[i], room[i]], dim=2), torch.cat([values[i], room[i]], dim=2), seen)
            for i in range(len(keys))
        ]
        logits = self.var.predict_scale(self.k, inputs, replace(self.var.start_cache(condition), blocks=caches))
        return logits, torch.stack([cache.keys for cache in caches]), torch.stack([cache.values for cache in caches])


def decoder_example(tokenizer: MSVQVAE) -> tuple[Tensor]:
    """Inputs of the decoder, for two images."""
    return (torch.zeros(2, tokenizer.quantizer.codebook_dim, *tokenizer.quantizer.sides[-1]),)


def condition_example(var: VAR) -> Tensor:
    """Conditions of two images: class labels, or what a custom embedder takes."""
    shape = var.embedder.condition_shape
    return torch.zeros(2, *shape) if shape else torch.zeros(2, dtype=torch.long)


def step_example(var: VAR, k: int) -> tuple[Tensor, ...]:
    """Inputs of the step at scale k, for two images."""
    first, last = var.step_bounds[k]
    cached = torch.zeros(var.depth, 2, var.num_heads, var.num_prefix + first, var.width // var.num_heads)
    return (
        torch.zeros(2, last - first, var.codebook_dim),
        condition_example(var),
        cached,
        cached.clone(),
    )


def write(out: Path, tokenizer: MSVQVAE, var: VAR | None, is_onnx: bool) -> str:
    """Writes the programs into a new folder, for any batch size; returns a message. Raises ValueError if a package is
    missing."""
    batch, decoder = torch.export.Dim("batch", min=1), DecoderProgram(tokenizer).eval()
    with atomic_folder(out) as partial:
        if is_onnx:
            try:
                import onnxscript  # noqa: F401
            except ImportError:
                raise ValueError("to=onnx needs the packages onnx and onnxscript: pip install 'varlab[onnx]'") from None
            example, shapes = decoder_example(tokenizer), ({0: batch},)
            torch.onnx.export(
                decoder, example, partial / "decoder.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            return f"{out}: decoder.onnx (f_hat -> images in [0, 1])"
        program = torch.export.export(decoder, decoder_example(tokenizer), dynamic_shapes=({0: batch},))
        torch.export.save(program, partial / "decoder.pt2")
        if var is None:
            return f"{out}: decoder.pt2"
        k = len(var.step_bounds) - 1
        shapes = ({0: batch}, {0: batch}, {1: batch}, {1: batch})
        program = torch.export.export(StepProgram(var, k).eval(), step_example(var, k), dynamic_shapes=shapes)
        torch.export.save(program, partial / f"step_{k:02d}.pt2")
        return f"{out}: decoder.pt2, step_{k:02d}.pt2 (the finest scale; see varlab.checkpoints.programs for inputs and outputs)"

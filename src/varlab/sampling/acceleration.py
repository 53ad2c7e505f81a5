"""Faster sampling: weights in bf16, compiled blocks and decoder, and all scales with the decoder as one CUDA graph."""

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models.autocast import hold_in_bf16
from varlab.models.msvqvae import MSVQVAE
from varlab.models.transformer import AdaLNBlock
from varlab.models.var import VAR
from varlab.sampling.token_sampling import SamplingSettings

log = logging.getLogger(__name__)
Compiled = Literal["none", "blocks", "graph"]
Precision = Literal["fp32", "bf16"]


class Drawn(NamedTuple):
    """The result of one call of the sampler."""

    f_hat: Float[Tensor, "B C H W"]
    images: Float[Tensor, "B 3 H W"]  # in [0, 1]
    token_maps: list[Int[Tensor, "B _"]]


Draw = Callable[[Tensor, Tensor], Drawn]  # conditions and uniform numbers (B L), both on the device


def default_precision(device: str | torch.device) -> Precision:
    """bf16 on a GPU, fp32 elsewhere."""
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def use_bf16(tokenizer: MSVQVAE, var: VAR) -> None:
    """Holds the weights of transformer and decoder in bf16. The quantizer and the encoder stay fp32: bf16 would choose
    other tokens."""
    for network in (var, tokenizer.post_conv, tokenizer.decoder):
        hold_in_bf16(network)


def compile_for_sampling(tokenizer: MSVQVAE, var: VAR) -> None:
    """Compiles the blocks of the transformer, once per scale (and batch size, so keep it constant), and the decoder.

    The first batch takes a minute or more; tokens are the same up to rounding.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(var.step_bounds))
    for block in var.blocks:
        assert isinstance(block, AdaLNBlock)
        block.forward = torch.compile(block.forward, dynamic=False)
    for part in (*tokenizer.decoder.levels, tokenizer.decoder.middle):
        part.compile(dynamic=False)


def why_no_graph(var: VAR, settings: SamplingSettings, device: torch.device) -> str | None:
    """The reason why sampling cannot run as a CUDA graph; None if it can."""
    if device.type != "cuda":
        return f"it needs a GPU, and this is the {device.type}"
    if settings.smooth:
        return "smooth=true draws its noise on the CPU"
    if var.order == "raster":
        return "a network with order=raster has a step per token"
    return None


class CUDAGraph:
    """`draw` for one batch size and fixed settings, captured once and then launched by a single call.

    `draw` must neither wait for the device nor read from the host. The results of a call are copies. Memory for the
    activations of all scales stays reserved.
    """

    NUM_WARMUPS = 3  # compilation, cuBLAS handles, attention plans

    def __init__(self, draw: Draw, condition: Tensor, uniform: Tensor) -> None:
        self.condition, self.uniform = condition.clone(), uniform.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.NUM_WARMUPS):
                draw(self.condition, self.uniform)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.drawn = draw(self.condition, self.uniform)

    def __call__(self, condition: Tensor, uniform: Tensor) -> Drawn:
        self.condition.copy_(condition)
        self.uniform.copy_(uniform)
        self.graph.replay()
        return Drawn(
            self.drawn.f_hat.clone(), self.drawn.images.clone(), [tokens.clone() for tokens in self.drawn.token_maps]
        )


prepared: WeakKeyDictionary[VAR, set[Any]] = WeakKeyDictionary()  # networks that were compiled
captured: WeakKeyDictionary[VAR, dict[Any, CUDAGraph | None]] = WeakKeyDictionary()  # None: it failed


def accelerate(
    draw: Draw,
    tokenizer: MSVQVAE,
    var: VAR,
    settings: SamplingSettings,
    condition: Tensor,
    uniform: Tensor,
    compiled: str,
) -> Draw:
    """`draw` as asked: as it is, with compiled networks, or as a CUDA graph. Where there can be no graph, it runs
    without one, and a warning says why. Raises ValueError for an unknown `compiled`."""
    if compiled not in get_args(Compiled):
        raise ValueError(f"compiled={compiled!r}: choose one of {', '.join(get_args(Compiled))}")
    if compiled == "none":
        return draw
    graphs = captured.setdefault(var, {})
    reason = why_no_graph(var, settings, condition.device) if compiled == "graph" else None
    if reason is not None:
        if reason not in graphs:
            log.warning("compiled=graph: %s; sampling runs without it", reason)
            graphs[reason] = None
        return draw
    if id(tokenizer) not in prepared.setdefault(var, set()):
        compile_for_sampling(tokenizer, var)
        prepared[var].add(id(tokenizer))
    if compiled == "blocks":
        return draw
    address = var.head.weight.data_ptr()  # another one after a move to another device or dtype
    has_autocast = torch.is_autocast_enabled(condition.device.type)
    key = (id(tokenizer), repr(settings), tuple(condition.shape), condition.dtype, address, has_autocast)
    if key not in graphs:
        try:
            graphs[key] = CUDAGraph(draw, condition, uniform)
        except RuntimeError as error:
            log.warning("compiled=graph: capture failed (%s); sampling runs without it", error)
            graphs[key] = None
    return graphs[key] or draw

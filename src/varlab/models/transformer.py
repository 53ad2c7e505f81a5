"""Blocks of the VAR transformer: QK-norm attention, adaptive layer norm, drop path, key/value cache."""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
COSTLY = [  # what selective recomputation stores: matrix products and attention
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
Recompute = Literal["none", "selective", "all"]
AttentionKind = Literal["masked", "split", "flex"]


def modulate(
    x: Float[Tensor, "B l D"], scale: Float[Tensor, "B 1 D"], shift: Float[Tensor, "B 1 D"]
) -> Float[Tensor, "B l D"]:
    """Adaptive layer norm's affine part: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


@dataclass(frozen=True)
class Split:
    """Block-causal attention mostly without a mask: the coarse tokens, as many as `mask` has rows, attend with the mask
    in one call; each of `bounds` (first, one past the last token) is one unmasked call over all tokens up to its end.
    The same result with fewer products, by kernels that do not support a mask."""

    mask: Bool[Tensor, "c c"]
    bounds: tuple[tuple[int, int], ...]


Visible = Bool[Tensor, "l l"] | Split | BlockMask | None


def attend(
    q: Float[Tensor, "B N l d"],
    k: Float[Tensor, "B N m d"],
    v: Float[Tensor, "B N m d"],
    softmax_scale: float,
    visible: Bool[Tensor, "l m"] | Split | BlockMask | None,
) -> Float[Tensor, "B l N d"]:
    """Attention of each token to the tokens that `visible` allows: a mask (True: attends), None (all), a `Split`, or
    a FlexAttention `BlockMask`, whose kernel skips fully masked blocks."""
    if isinstance(visible, BlockMask):
        kernel = compiled_flex_attention() if q.is_cuda else flex_attention
        return kernel(q, k, v, block_mask=visible, scale=softmax_scale).transpose(1, 2)  # pyright: ignore
    if not isinstance(visible, Split):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale).transpose(1, 2)
    coarse = len(visible.mask)
    parts = [attend(q[:, :, :coarse], k[:, :, :coarse], v[:, :, :coarse], softmax_scale, visible.mask)]
    for first, last in visible.bounds:
        parts.append(attend(q[:, :, first:last], k[:, :, :last], v[:, :, :last], softmax_scale, None))
    return torch.cat(parts, dim=1)


@cache
def compiled_flex_attention():
    """One compiled kernel for all blocks: uncompiled FlexAttention computes every score."""
    return torch.compile(flex_attention, dynamic=False)


@dataclass
class BlockCache:
    """What one block keeps from scale to scale of one `generate` call: keys, values, and its modulation.

    The modulation depends on the condition alone, so it is computed once, not at every scale.
    """

    keys: Float[Tensor, "B N L d"]
    values: Float[Tensor, "B N L d"]
    length: int = 0
    modulation: Float[Tensor, "B 6 D"] | None = None

    def append(
        self, k: Float[Tensor, "B N l d"], v: Float[Tensor, "B N l d"]
    ) -> tuple[Float[Tensor, "B N m d"], Float[Tensor, "B N m d"]]:
        """Stores the keys and values of one scale; returns those of all scales so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def unit(x: Float[Tensor, "B l N d"], length: Float[Tensor, "N 1"] | float = 1.0) -> Float[Tensor, "B l N d"]:
    """Vectors with the direction of `x` and the given length, in the dtype of `x`; the arithmetic is fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * (length / norm.clamp(min=1e-12))).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention. With `qk_norm`, q and k have unit length and each head learns its own temperature.

    Without it the softmax scale is a quarter of the usual 1 / sqrt(head dim), as released. There is no key bias.
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(4))) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B l D"], visible: Visible = None, cache: BlockCache | None = None
    ) -> Float[Tensor, "B l D"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = rearrange(
            F.linear(x, self.qkv.weight, bias), "B l (three N d) -> B l three N d", three=3, N=self.num_heads
        )
        q, k, v = qkv.unbind(dim=2)  # each B l N d: no copy of the whole
        if self.log_scale is None:
            softmax_scale = 0.25 / math.sqrt(q.shape[-1])
        else:
            softmax_scale = 1.0
            q = unit(q, self.log_scale.clamp(max=math.log(100)).exp()[:, None])
            k = unit(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        h = attend(q, k, v, softmax_scale, visible)
        return self.proj(rearrange(h, "B l N d -> B l (N d)"))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B l D"]) -> Float[Tensor, "B l D"]:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Modulation(nn.Module):
    """SiLU and Linear: the conditioning vector -> `num_vectors` vectors of size `width`."""

    def __init__(self, width: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(width, num_vectors * width)

    def forward(self, cond: Float[Tensor, "B D"]) -> Float[Tensor, "B n D"]:
        return rearrange(self.linear(F.silu(cond)), "B (n D) -> B n D", n=self.num_vectors)


class DropPath(nn.Module):
    """Drops the whole branch for some samples while training; kept branches are divided by the keep probability. Applied
    to the gate of a branch, which is small, not to its output."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, gate: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 D"]:
        if not self.training or self.rate == 0:
            return gate
        keep = torch.rand(gate.shape[0], 1, 1, device=gate.device) >= self.rate
        return gate * keep / (1 - self.rate)


class AdaLNBlock(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by vectors derived from the condition (AdaLN-Zero).

    With `shared_adaln` the six vectors come from one network for all blocks and are passed as `cond`, and this block
    only adds a learned offset; otherwise the block has its own Linear.

    `recompute` trades time for memory in the backward pass: `none` keeps all activations, `selective` those of matrix
    products and attention, `all` only the block's input.
    """

    recompute: Recompute = "none"
    attention_class = Attention

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, drop_path: float, shared_adaln: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = self.attention_class(width, num_heads, qk_norm)
        self.feed_forward = FeedForward(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.modulation = None if shared_adaln else Modulation(width, 6)
        self.modulation_offset = nn.Parameter(torch.zeros(6, width)) if shared_adaln else None

    def modulate_by(self, cond: Float[Tensor, "B *six D"]) -> Float[Tensor, "B 6 D"]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2: in this order, as released."""
        if self.modulation is not None:
            return self.modulation(cond)
        assert self.modulation_offset is not None
        return cond + self.modulation_offset

    def forward(
        self,
        x: Float[Tensor, "B l D"],
        cond: Float[Tensor, "B *six D"],
        visible: Visible = None,
        cache: BlockCache | None = None,
    ) -> Float[Tensor, "B l D"]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.transform(x, cond, visible, cache)
        if self.recompute == "all":
            return checkpoint(self.transform, x, cond, visible, use_reentrant=False)  # pyright: ignore[reportReturnType]
        keeps = partial(create_selective_checkpoint_contexts, COSTLY)
        return checkpoint(self.transform, x, cond, visible, use_reentrant=False, context_fn=keeps)  # pyright: ignore[reportReturnType]

    def transform(
        self,
        x: Float[Tensor, "B l D"],
        cond: Float[Tensor, "B *six D"],
        visible: Visible = None,
        cache: BlockCache | None = None,
    ) -> Float[Tensor, "B l D"]:
        """The block itself."""
        modulation = cache.modulation if cache is not None and cache.modulation is not None else self.modulate_by(cond)
        if cache is not None:
            cache.modulation = modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:, :, None].unbind(dim=1)  # each B 1 D
        h = self.attention(modulate(self.norm(x), scale1, shift1), visible, cache)
        x = x + self.drop_path(gamma1) * h
        h = self.feed_forward(modulate(self.norm(x), scale2, shift2))
        return x + self.drop_path(gamma2) * h

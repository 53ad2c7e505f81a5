"""VAR: a transformer over the token pyramid that predicts all tokens of a scale at once from the coarser ones
(VAR, section 3.2, figure 4).

The network knows nothing of the tokenizer: it maps embeddings (sums of coarser codes, see
`MultiScaleQuantizer.teacher_forcing_inputs`) and a class label to logits.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from varlab.models import scales
from varlab.models.custom_classes import named
from varlab.models.transformer import AdaLNBlock, Attention, BlockCache, Modulation, Split, modulate

SPLIT_FROM = 64  # tokens of a scale that attends in a call of its own


def block_causal_mask(patch_nums: scales.PatchNums, order: str = "scales") -> Bool[Tensor, "L L"]:
    """True where a token (row) may look: its own step, a scale or in raster order itself, and all steps before."""
    steps = scales.step_bounds(patch_nums, order)
    step = torch.tensor([number for number, (first, last) in enumerate(steps) for _ in range(first, last)])
    return step[:, None] >= step[None, :]


@lru_cache(maxsize=16)
def flex_mask(ends: tuple[int, ...], device: torch.device) -> BlockMask:
    """The block-causal mask of the steps that end at these tokens, as FlexAttention takes it."""
    lengths = torch.tensor([last - first for first, last in zip((0, *ends), ends, strict=False)])
    step = torch.repeat_interleave(torch.arange(len(ends)), lengths).to(device)
    return create_block_mask(lambda _b, _h, q, kv: step[q] >= step[kv], None, None, ends[-1], ends[-1], device)  # pyright: ignore[reportArgumentType]


class VAR(nn.Module):
    """Next-scale transformer. `depth` is the one dial of size; what is None follows from it as in the paper:
    width 64 * depth, num_heads depth, drop_path 0.1 * depth / 24 (rate of the last block, rising linearly from 0).

    With `order="raster"` it is the baseline that the paper compares with: the same blocks predict the same sequence token by
    token, scale after scale and each row by row, seeing all tokens before. `step_bounds` are then single tokens.

    `attention`: how the block-causal mask is kept while training: `masked` in one call, `split` (see `Split`), or `flex`, by
    FlexAttention (trains on GPUs only); the same result.

    The residual stream is fp32 also under autocast. Label dropout and drop path act in training mode only (the released
    code drops labels in validation too).
    """

    scale_of_token: Tensor
    mask: Tensor
    attention = "split"
    block_class = AdaLNBlock

    def __init__(
        self,
        depth: int,
        patch_nums: scales.PatchNums,
        codebook_size: int,
        codebook_dim: int,
        num_classes: int,
        width: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float | None = None,
        label_dropout: float = 0.1,
        shared_adaln: bool = False,
        qk_norm: bool = True,
        order: str = "scales",
        init_head: float = 0.02,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: a VAR has at least one block")
        width = 64 * depth if width is None else width
        num_heads = depth if num_heads is None else num_heads
        drop_path = 0.1 * depth / 24 if drop_path is None else drop_path
        self.sizes: dict[str, Any] = {
            "depth": depth,
            "patch_nums": [pn if isinstance(pn, int) else list(pn) for pn in patch_nums],
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "num_classes": num_classes,
            "width": width,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "drop_path": drop_path,
            "label_dropout": label_dropout,
            "shared_adaln": shared_adaln,
            "qk_norm": qk_norm,
            **named(self, VAR),
        }
        if order != "scales":  # what was saved before there was a choice lacks the word
            self.sizes["order"] = order
        self.depth, self.width, self.num_heads, self.num_classes, self.label_dropout = (
            depth,
            width,
            num_heads,
            num_classes,
            label_dropout,
        )
        self.patch_nums = self.sizes["patch_nums"]
        self.order, self.step_bounds = order, scales.step_bounds(patch_nums, order)
        num_tokens, num_start = self.step_bounds[-1][1], self.step_bounds[0][1]

        self.class_embedding = nn.Embedding(num_classes + 1, width)  # the last row is the null label's
        self.start_position = nn.Parameter(torch.empty(1, num_start, width))
        self.word_embed = nn.Linear(codebook_dim, width)
        self.position = nn.Parameter(torch.empty(1, num_tokens, width))
        self.scale_embedding = nn.Embedding(len(patch_nums), width)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            self.block_class(width, num_heads, mlp_ratio, rate, shared_adaln, qk_norm) for rate in rates
        )
        self.shared_modulation = Modulation(width, 6) if shared_adaln else None
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = Modulation(width, 2)
        self.head = nn.Linear(width, codebook_size)

        self.register_buffer("scale_of_token", torch.tensor(scales.scale_of_token(patch_nums)), persistent=False)
        self.register_buffer("mask", block_causal_mask(patch_nums, order), persistent=False)
        self.init_weights(init_head, init_adaln, init_adaln_gamma)

    @property
    def null_label(self) -> int:
        """The class that stands for "no class"."""
        return self.num_classes

    @torch.no_grad()
    def init_weights(self, init_head: float, init_adaln: float, init_adaln_gamma: float) -> None:
        """
        Standard deviations, with std = sqrt(1 / (3 D)):

        | parameter                                             | rule                                          |
        |-------------------------------------------------------|-----------------------------------------------|
        | weights of Linear and Embedding, positions            | normal, std                                   |
        | all biases                                            | 0                                             |
        | head                                                  | std * init_head                               |
        | head modulation                                       | std * init_adaln                              |
        | attention projection, second Linear of feed-forward   | std / sqrt(2 depth)                           |
        | modulation of a block: rows of gamma / other rows     | std * init_adaln_gamma / std * init_adaln     |
        | shared modulation                                     | std, gamma rows included (as released)        |
        | offset of a block to it: gamma rows / other rows      | 1/sqrt(D) * init_adaln_gamma / * init_adaln   |
        | log of the attention temperature                      | log 4                                         |
        """
        std = math.sqrt(1 / (3 * self.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Attention):
                nn.init.zeros_(module.q_bias)
                nn.init.zeros_(module.v_bias)
                if module.log_scale is not None:
                    nn.init.constant_(module.log_scale, math.log(4))
        nn.init.normal_(self.position, std=std)
        nn.init.normal_(self.start_position, std=std)
        self.head.weight.mul_(init_head)
        self.head_modulation.linear.weight.mul_(init_adaln)
        for block in self.blocks:
            assert isinstance(block, AdaLNBlock)
            block.attention.proj.weight.div_(math.sqrt(2 * self.depth))
            block.feed_forward.down.weight.div_(math.sqrt(2 * self.depth))
            if block.modulation is not None:
                block.modulation.linear.weight[: 2 * self.width].mul_(init_adaln_gamma)
                block.modulation.linear.weight[2 * self.width :].mul_(init_adaln)
            if block.modulation_offset is not None:
                nn.init.normal_(block.modulation_offset, std=self.width**-0.5)
                block.modulation_offset[:2].mul_(init_adaln_gamma)
                block.modulation_offset[2:].mul_(init_adaln)

    def drop_labels(self, labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Labels, each replaced by the null label with probability `label_dropout` while training (for guidance)."""
        if not self.training or self.label_dropout == 0:
            return labels
        return torch.where(torch.rand(labels.shape, device=labels.device) < self.label_dropout, self.null_label, labels)

    def embed(
        self, inputs: Float[Tensor, "B l C"] | None, class_vector: Float[Tensor, "B D"], k_first: int, k_last: int
    ) -> Float[Tensor, "B m D"]:
        """Embeddings of steps k_first..k_last; step 0 is made of the class vector, the others of `inputs`."""
        first, last = self.step_bounds[k_first][0], self.step_bounds[k_last][1]
        parts = [class_vector[:, None] + self.start_position] if k_first == 0 else []
        if inputs is not None and inputs.shape[1]:
            parts.append(self.word_embed(inputs))
        place = self.scale_embedding(self.scale_of_token[first:last]) + self.position[:, first:last]
        return torch.cat([part.float() for part in parts], dim=1) + place

    def predict(self, x: Float[Tensor, "B l D"], class_vector: Float[Tensor, "B D"]) -> Float[Tensor, "B l V"]:
        """Logits of the last hidden states, fp32; the matrix product itself runs in the autocast type."""
        scale, shift = self.head_modulation(class_vector)[:, :, None].unbind(dim=1)  # each B 1 D
        return self.head(modulate(self.head_norm(x), scale, shift)).float()

    def forward(
        self,
        inputs: Float[Tensor, "B l C"],
        labels: Int[Tensor, " B"],
        judge: Callable[[Tensor, slice], Tensor] | None = None,
        num_chunks: int = 1,
    ) -> Tensor:
        """Logits of the L tokens from the true coarser ones, B m V.

        `inputs`: teacher-forcing inputs of steps 1..K-1, B (L - l_0) C. A shorter sequence that ends with a step gives
        the logits of the steps it holds.

        With `judge`, what it makes of them instead (B m and more): it is given the logits and the place of their tokens in the
        sequence, a chunk at a time, and no logits outlive their chunk (the backward pass computes them again).
        """
        length = inputs.shape[1] + self.step_bounds[0][1]
        ends = [end for _, end in self.step_bounds]
        if length not in ends:
            raise ValueError(
                f"inputs hold {inputs.shape[1]} tokens, which ends no scale of patch_nums {self.patch_nums}"
            )
        class_vector = self.class_embedding(self.drop_labels(labels))
        cond = class_vector if self.shared_modulation is None else self.shared_modulation(class_vector)
        x = self.embed(inputs, class_vector, 0, ends.index(length))
        visible = self.visible(length)
        for block in self.blocks:
            x = block(x, cond, visible)
        if judge is None:
            return self.predict(x, class_vector)

        def judged(x: Tensor, class_vector: Tensor, place: slice) -> Tensor:
            return judge(self.predict(x, class_vector), place)

        if num_chunks == 1:
            return judged(x, class_vector, slice(0, length))
        bounds = [length * i // num_chunks for i in range(num_chunks + 1)]
        parts = [
            checkpoint(judged, x[:, first:last], class_vector, slice(first, last), use_reentrant=False)
            for first, last in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)  # pyright: ignore[reportArgumentType]

    def visible(self, length: int) -> Tensor | Split | BlockMask:
        """What each of the first `length` tokens may see."""
        if self.attention == "flex":
            ends = tuple(last for _, last in self.step_bounds if last <= length)
            return flex_mask(ends, self.mask.device)
        apart = tuple(
            (first, last) for first, last in self.step_bounds if last - first >= SPLIT_FROM and last <= length
        )
        if self.attention == "masked" or not apart:
            return self.mask[:length, :length]
        coarse = apart[0][0]
        return Split(self.mask[:coarse, :coarse], apart)

    def start_cache(self, batch_size: int, dtype: torch.dtype = torch.float32) -> list[BlockCache]:
        """An empty cache for `predict_scale`, one entry a block, with room for all scales but the last, which none looks back at."""
        shape = (batch_size, self.num_heads, self.step_bounds[-1][0], self.width // self.num_heads)
        device = self.head.weight.device
        return [
            BlockCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in self.blocks
        ]

    def predict_scale(
        self, k: int, inputs: Float[Tensor, "B l C"] | None, labels: Int[Tensor, " B"], cache: list[BlockCache]
    ) -> Float[Tensor, "B m V"]:
        """Logits of step k alone; steps 0..k-1 are in `cache`, which then holds step k too, but for the last. No mask is
        needed: all that is cached may be seen. `inputs` is None at step 0."""
        class_vector = self.class_embedding(labels)
        cond = class_vector if self.shared_modulation is None else self.shared_modulation(class_vector)
        x = self.embed(inputs, class_vector, k, k)
        for block, block_cache in zip(self.blocks, cache, strict=True):
            x = block(x, cond, cache=block_cache)
        return self.predict(x, class_vector)

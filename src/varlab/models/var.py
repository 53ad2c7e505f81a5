"""VAR: a transformer over the token pyramid that predicts all tokens of a scale at once from the coarser ones
(VAR, section 3.2, figure 4).

The network does not depend on the tokenizer: it maps embeddings (sums of coarser codes, see
`ResidualQuantizer.teacher_forcing_inputs`) and a condition, such as a class label, to logits.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from varlab.models import scales
from varlab.models.conditioning import ClassEmbedder, ConditionEmbedder
from varlab.models.custom_classes import RecordedModule
from varlab.models.positions import CoordinatePositions, num_waves
from varlab.models.transformer import AdaLNBlock, Attention, AttentionKind, BlockCache, Modulation, Split, modulate

MIN_SPLIT_TOKENS = 64  # scales with at least this many tokens get their own attention call


def block_causal_mask(
    patch_nums: scales.PatchNums, order: scales.Order = "scales", num_prefix: int = 0
) -> Bool[Tensor, "L L"]:
    """True where a token (row) may attend: its own step (a scale, or in raster order itself) and all earlier steps. The tokens of
    a prefix are the first step."""
    steps = scales.step_bounds(patch_nums, order)
    numbers = [number for number, (first, last) in enumerate(steps) for _ in range(first, last)]
    step = torch.tensor([-1] * num_prefix + numbers)
    return step[:, None] >= step[None, :]


@lru_cache(maxsize=16)
def flex_mask(ends: tuple[int, ...], device: torch.device) -> BlockMask:
    """The block-causal mask of the steps that end at these tokens, as a FlexAttention `BlockMask`."""
    lengths = torch.tensor([last - first for first, last in zip((0, *ends), ends, strict=False)])
    step = torch.repeat_interleave(torch.arange(len(ends)), lengths).to(device)
    return create_block_mask(lambda _b, _h, q, kv: step[q] >= step[kv], None, None, ends[-1], ends[-1], device)  # pyright: ignore[reportArgumentType]


class SizeDefaults(NamedTuple):
    """Arguments derived from the depth unless they are given."""

    width: int
    num_heads: int
    drop_path: float
    shared_adaln: bool
    init_adaln_gamma: float


def size_defaults(depth: int) -> SizeDefaults:
    """The paper's sizes: width 64 d, d heads, drop path 0.1 d / 24 (VAR, section 5.1); AdaLN shared from d36 on, and
    smaller initial gates for deeper networks (released recipes of d16, d20, d24, d30, d36; other depths use those of
    the next smaller one)."""
    gamma = 1e-3 if depth < 24 else 1e-4 if depth < 30 else 1e-5 if depth < 36 else 5e-6
    return SizeDefaults(64 * depth, depth, 0.1 * depth / 24, depth >= 36, gamma)


LOWEST = -1e4  # a logit without probability; finite, so that guidance can subtract it


class HiddenStates(NamedTuple):
    """The inputs of the head: the last hidden states and the conditioning vector."""

    x: Float[Tensor, "B l D"]
    vector: Float[Tensor, "B D"]


@dataclass
class ScaleCache:
    """What `predict_scale` keeps from scale to scale: what depends on the condition alone, and keys and values."""

    vector: Float[Tensor, "B D"]  # starts the sequence
    cond: Float[Tensor, "B *six D"]  # modulates the blocks
    added: Float[Tensor, "B L D"] | None  # to the embeddings of all tokens
    head: Float[Tensor, "B 2 D"]  # scale and shift of the head
    blocks: list[BlockCache]


class VAR(RecordedModule):
    """Next-scale transformer. `depth` alone sets the size; arguments that are None are derived from it, see
    `size_defaults` (`drop_path` is the rate of the last block, rising linearly from 0).

    `bases`: of the digits of a token, each of which the head predicts (models/digits.py); None is one digit, a softmax over all
    codes.

    `codes_by_scale`: number of codes of each scale where they differ: the first ones. The logits of all others are `LOWEST`,
    but for those of `predict`. None: all scales have all codes.

    `embedder`: class of the condition embedder (models/conditioning.py), called with num_classes, width and
    dropout=`label_dropout`. The tokens of its prefix, if it has one, precede the sequence; what it has for each token is added.

    `order="raster"` is the paper's baseline: the same blocks predict the same sequence token by token, scale by scale
    and row by row within a scale, attending to all previous tokens. `step_bounds` are then single tokens.

    `position`: a `learned` embedding of each token, as released, or one of its `coordinates` (models/positions.py), which are
    defined for maps of any shape, see `at`. `pyramids`: the patch_nums of all shapes that the network is trained on, where there are
    several.

    `attention`: how the block-causal mask is applied in training: `masked` in one call, `split` (see `Split`), or
    `flex`, by FlexAttention (trains on GPUs only); the results are the same.

    The residual stream is fp32 even under autocast. Label dropout and drop path are active in training mode only (the
    released code drops labels in validation too).
    """

    changeable: ClassVar = frozenset(
        {"drop_path", "label_dropout", "pyramids", "init_head", "init_adaln", "init_adaln_gamma"}
    )
    scale_of_token: Tensor
    beyond: Tensor  # which codes the scale of a token does not have, L V
    mask: Tensor
    waves: Tensor  # features of the coordinates, L F
    position: nn.Parameter | CoordinatePositions
    embedder: ConditionEmbedder
    order: scales.Order
    attention: AttentionKind = "split"
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
        shared_adaln: bool | None = None,
        qk_norm: bool = True,
        order: scales.Order = "scales",
        position: Literal["learned", "coordinates"] = "learned",
        pyramids: Sequence[scales.PatchNums] | None = None,
        bases: Sequence[int] | None = None,
        codes_by_scale: Sequence[int] | None = None,
        embedder: Callable[..., nn.Module] = ClassEmbedder,
        init_head: float = 0.02,
        init_adaln: float = 0.5,
        init_adaln_gamma: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: a VAR needs at least one block")
        defaults = size_defaults(depth)
        self.depth = depth
        self.width = width = defaults.width if width is None else width
        self.num_heads = num_heads = defaults.num_heads if num_heads is None else num_heads
        self.shared_adaln = shared_adaln = defaults.shared_adaln if shared_adaln is None else shared_adaln
        self.drop_path = drop_path = defaults.drop_path if drop_path is None else drop_path
        self.init_adaln_gamma = defaults.init_adaln_gamma if init_adaln_gamma is None else init_adaln_gamma
        self.num_classes = num_classes
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.bases = [codebook_size] if bases is None else [int(base) for base in bases]
        if math.prod(self.bases) != codebook_size or min(self.bases) < 2:
            raise ValueError(
                f"bases={self.bases}: give numbers of 2 or more whose product is the number of codes, {codebook_size}"
            )
        self.codes_by_scale = None if codes_by_scale is None else [int(size) for size in codes_by_scale]
        if self.codes_by_scale is not None and (
            len(self.codes_by_scale) != len(patch_nums)
            or max(self.codes_by_scale) != codebook_size
            or bases is not None
        ):
            raise ValueError(
                f"codes_by_scale={self.codes_by_scale}: give one number for each of {len(patch_nums)} scales, the largest"
                f" {codebook_size}, and no bases"
            )
        self.order = order
        self.pyramids = None if pyramids is None else [scales.plain(pyramid) for pyramid in pyramids]
        num_tokens, num_start = scales.num_tokens(patch_nums), scales.step_bounds(patch_nums, order)[0][1]
        self.sizes: dict[str, Any] = {
            "depth": depth,
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
            "order": order,
            **({} if position == "learned" else {"num_waves": num_waves([patch_nums, *(pyramids or [])])}),
            "bases": self.bases,
            "codes_by_scale": self.codes_by_scale,
        }
        self.embedder = embedder(num_classes=num_classes, width=width, dropout=label_dropout)  # pyright: ignore[reportAttributeAccessIssue]
        self.num_prefix = self.embedder.num_prefix
        if not isinstance(self.embedder, ClassEmbedder):  # what counts of parameters and FLOPs need to know
            embedder_params = sum(parameter.numel() for parameter in self.embedder.parameters())
            self.sizes |= {"embedder_params": embedder_params, "num_prefix": self.num_prefix}
        self.start_position = nn.Parameter(torch.empty(1, num_start, width))
        self.word_embed = nn.Linear(codebook_dim, width)
        self.position = (
            nn.Parameter(torch.empty(1, num_tokens, width))
            if position == "learned"
            else CoordinatePositions([patch_nums, *(pyramids or [])], width)
        )
        self.scale_embedding = nn.Embedding(len(patch_nums), width)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            self.block_class(width, num_heads, mlp_ratio, rate, shared_adaln, qk_norm) for rate in rates
        )
        self.shared_modulation = Modulation(width, 6) if shared_adaln else None
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = Modulation(width, 2)
        self.head = nn.Linear(width, sum(self.bases))

        self.set_patch_nums(patch_nums)
        self.init_weights(init_head, init_adaln, self.init_adaln_gamma)

    def set_patch_nums(self, patch_nums: scales.PatchNums) -> None:
        """Sets the pyramid and what follows from it alone."""
        self.patch_nums = scales.plain(patch_nums)
        self.step_bounds = scales.step_bounds(patch_nums, self.order)
        self.sizes = {**self.sizes, "patch_nums": self.patch_nums}
        found = {"scale_of_token": torch.tensor(scales.scale_of_token(patch_nums))}
        found["mask"] = block_causal_mask(patch_nums, self.order, self.num_prefix)
        if self.codes_by_scale is not None:
            sizes = torch.tensor(self.codes_by_scale)[found["scale_of_token"]]
            found["beyond"] = torch.arange(self.codebook_size) >= sizes[:, None]
        if isinstance(self.position, CoordinatePositions):
            found["waves"] = self.position.features(patch_nums)
        for name, value in found.items():
            self.register_buffer(name, value.to(self.head.weight.device), persistent=False)

    def at(self, patch_nums: scales.PatchNums) -> "VAR":
        """The network of another pyramid with as many scales; it shares its weights with this one. Raises ValueError if positions
        are learned, so that they have no meaning on other maps."""
        if scales.plain(patch_nums) == self.patch_nums:
            return self
        if not isinstance(self.position, CoordinatePositions):
            raise ValueError(
                f"this network knows the positions of patch_nums {self.patch_nums} only, not of {scales.plain(patch_nums)}: train one"
                " with model.position=coordinates"
            )
        num_start = self.start_position.shape[1]
        if len(patch_nums) != len(self.patch_nums) or scales.step_bounds(patch_nums, self.order)[0][1] != num_start:
            raise ValueError(
                f"patch_nums={list(patch_nums)}: give as many scales as {self.patch_nums}, and the same coarsest one"
            )
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.arguments = {**self.arguments, "patch_nums": scales.plain(patch_nums)}
        other.set_patch_nums(patch_nums)
        return other

    def resolved(self) -> dict[str, Any]:
        names = ("width", "num_heads", "drop_path", "shared_adaln", "init_adaln_gamma")
        return {name: getattr(self, name) for name in names}

    @property
    def null_label(self) -> int:
        """The class label that means "no class"."""
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
        if isinstance(self.position, nn.Parameter):
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

    def embed(
        self,
        inputs: Float[Tensor, "B l C"] | None,
        vector: Float[Tensor, "B D"],
        k_first: int,
        k_last: int,
        added: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B m D"]:
        """Embeddings of steps k_first..k_last; step 0 comes from the conditioning vector, the others from `inputs`. `added`: what
        the condition adds to all tokens."""
        first, last = self.step_bounds[k_first][0], self.step_bounds[k_last][1]
        parts = [vector[:, None] + self.start_position] if k_first == 0 else []
        if inputs is not None and inputs.shape[1]:
            parts.append(self.word_embed(inputs))
        if isinstance(self.position, CoordinatePositions):
            position = self.position(self.waves[first:last].to(self.scale_embedding.weight.dtype))
        else:
            position = self.position[:, first:last]
        place = self.scale_embedding(self.scale_of_token[first:last]) + position
        if added is not None:
            place = place + added[:, first:last]
        return torch.cat([part.float() for part in parts], dim=1) + place

    def predict(self, x: Float[Tensor, "B l D"], vector: Float[Tensor, "B D"]) -> Float[Tensor, "B l S"]:
        """Logits of the last hidden states, fp32; the matrix product itself runs in the autocast dtype."""
        return self.logits(x, self.head_modulation(vector))

    def logits(self, x: Float[Tensor, "B l D"], modulation: Float[Tensor, "B 2 D"]) -> Float[Tensor, "B l S"]:
        """The same, given scale and shift of the head."""
        scale, shift = modulation[:, :, None].unbind(dim=1)  # each B 1 D
        return self.head(modulate(self.head_norm(x), scale, shift)).float()

    def within_scales(self, logits: Float[Tensor, "B l S"], first: int = 0) -> Float[Tensor, "B l S"]:
        """Logits of the tokens from `first` on, `LOWEST` for codes that their scale does not have."""
        if self.codes_by_scale is None:
            return logits
        return logits.masked_fill(self.beyond[first : first + logits.shape[1]], LOWEST)

    def forward(
        self, inputs: Float[Tensor, "B l C"], condition: Tensor, returns_hidden: bool = False
    ) -> Float[Tensor, "B m S"] | HiddenStates:
        """Logits of the L tokens by teacher forcing, or, with `returns_hidden`, the inputs of `predict`.

        `inputs`: teacher-forcing inputs of steps 1..K-1, B (L - l_0) C. A shorter sequence that ends at a step boundary
        gives the logits of the steps it covers. `condition`: class labels (B), or what the embedder takes.
        """
        length = inputs.shape[1] + self.step_bounds[0][1]
        ends = [end for _, end in self.step_bounds]
        if length not in ends:
            raise ValueError(
                f"inputs hold {inputs.shape[1]} tokens, which does not end at a scale boundary of patch_nums {self.patch_nums}"
            )
        condition = self.embedder.drop(condition)
        vector = self.embedder(condition)
        cond = vector if self.shared_modulation is None else self.shared_modulation(vector)
        added = self.embedder.at_tokens(condition, self.patch_nums)
        x = self.embed(inputs, vector, 0, ends.index(length), added)
        if self.num_prefix:
            x = torch.cat([self.embedder.prefix(condition).float(), x], dim=1)
        visible = self.visible(length)
        for block in self.blocks:
            x = block(x, cond, visible)
        x = x[:, self.num_prefix :]
        return HiddenStates(x, vector) if returns_hidden else self.within_scales(self.predict(x, vector))

    def visible(self, length: int) -> Tensor | Split | BlockMask:
        """The attention mask of the first `length` tokens and of the prefix before them."""
        before = self.num_prefix
        bounds = [(first + before, last + before) for first, last in self.step_bounds if last <= length]
        if self.attention == "flex":
            return flex_mask((*([before] if before else []), *(last for _, last in bounds)), self.mask.device)
        apart = tuple((first, last) for first, last in bounds if last - first >= MIN_SPLIT_TOKENS)
        if self.attention == "masked" or not apart:
            return self.mask[: length + before, : length + before]
        coarse = apart[0][0]
        return Split(self.mask[:coarse, :coarse], apart)

    def start_cache(self, condition: Tensor, dtype: torch.dtype = torch.float32) -> ScaleCache:
        """The cache for `predict_scale`, with room for all scales; keys and values are stored in `dtype`."""
        vector = self.embedder(condition)
        cond = vector if self.shared_modulation is None else self.shared_modulation(vector)
        num_tokens = self.num_prefix + self.step_bounds[-1][1]
        shape = (vector.shape[0], self.num_heads, num_tokens, self.width // self.num_heads)
        blocks = [
            BlockCache(vector.new_empty(shape, dtype=dtype), vector.new_empty(shape, dtype=dtype)) for _ in self.blocks
        ]
        if self.num_prefix:
            x = self.embedder.prefix(condition).float()
            for block, block_cache in zip(self.blocks, blocks, strict=True):
                x = block(x, cond, cache=block_cache)
        added = self.embedder.at_tokens(condition, self.patch_nums)
        return ScaleCache(vector, cond, added, self.head_modulation(vector), blocks)

    def predict_scale(self, k: int, inputs: Float[Tensor, "B l C"] | None, cache: ScaleCache) -> Float[Tensor, "B m S"]:
        """Logits of step k alone, given steps 0..k-1 in `cache`, to which it adds step k. No mask is needed: step k
        attends to everything cached. `inputs` is None at step 0."""
        x = self.embed(inputs, cache.vector, k, k, cache.added)
        for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
            x = block(x, cache.cond, cache=block_cache)
        return self.within_scales(self.logits(x, cache.head), self.step_bounds[k][0])

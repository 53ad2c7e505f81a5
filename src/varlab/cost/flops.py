"""Parameters and floating point operations of a VAR from its sizes alone.

"6ND" can be too high or too low for VAR: AdaLN acts once per image, not once per token, attention is block-causal, and
the head dominates at small width. So FLOPs are counted term by term, and 6ND is reported for comparison. A multiply-add
is two FLOPs; a training step costs three forward passes.
"""

from typing import TYPE_CHECKING, Any

from varlab.models import scales

if TYPE_CHECKING:
    from varlab.models.msvqvae import MSVQVAE

Sizes = dict[str, Any]


def parameter_counts(sizes: Sizes) -> dict[str, int]:
    """`params_total`; `params_main`: the blocks (about 18 d D^2, the N of the paper's fits); `params_token`: parameters
    that act on every token, 12 d D^2 and the head."""
    depth, width, vocabulary = sizes["depth"], sizes["width"], num_logits(sizes)
    lengths = step_lengths(sizes)
    hidden = round(width * sizes["mlp_ratio"])
    token_weights = 4 * width**2 + 2 * width * hidden
    temperatures = sizes["num_heads"] if sizes["qk_norm"] else 0
    biases = (
        3 * width + hidden + width + temperatures
    )  # q, v, projection; both Linears of the feed-forward; temperatures
    adaln = 6 * width if sizes["shared_adaln"] else 6 * width**2 + 6 * width
    blocks = depth * (token_weights + biases + adaln)
    head = vocabulary * width + vocabulary
    around = (
        head
        + 2 * width**2
        + 2 * width
        + sizes.get("embedder_params", (sizes["num_classes"] + 1) * width)
        + (lengths[0] + num_positions(sizes)) * width
        + len(sizes["patch_nums"]) * width
        + (sizes["codebook_dim"] + 1) * width
    )
    shared = 6 * width**2 + 6 * width if sizes["shared_adaln"] else 0
    return {
        "params_total": blocks + around + shared,
        "params_main": blocks + shared,
        "params_token": depth * token_weights + head,
    }


def num_positions(sizes: Sizes) -> int:
    """Vectors that positions are made of: one for each token, or for each wave of its coordinates."""
    return 4 * sizes["num_waves"] if "num_waves" in sizes else scales.num_tokens(sizes["patch_nums"])


def num_logits(sizes: Sizes) -> int:
    """Outputs of the head per token: codes, or values of all digits."""
    return sum(sizes.get("bases", [sizes["codebook_size"]]))


def step_lengths(sizes: Sizes) -> list[int]:
    """Tokens predicted at each step: those of each scale, or 1 per token in raster order."""
    return [last - first for first, last in scales.step_bounds(sizes["patch_nums"], sizes.get("order", "scales"))]


def training_flops(sizes: Sizes) -> int:
    """FLOPs of forward and backward for one image, attention counted block-causal, tokenizer not included."""
    depth, width, vocabulary, codebook_dim = (
        sizes["depth"],
        sizes["width"],
        num_logits(sizes),
        sizes["codebook_dim"],
    )
    lengths = step_lengths(sizes)
    hidden = round(width * sizes["mlp_ratio"])
    length, num_prefix = sum(lengths), sizes.get("num_prefix", 0)
    seen, pairs = 0, 0
    for tokens in [num_prefix, *lengths]:
        seen += tokens
        pairs += tokens * seen
    linear = seen * depth * 2 * (4 * width**2 + 2 * width * hidden) + length * 2 * width * vocabulary
    embedding = (length - lengths[0]) * 2 * codebook_dim * width
    adaln = (1 if sizes["shared_adaln"] else depth) * 12 * width**2 + 4 * width**2
    attention = 4 * width * depth * pairs
    return 3 * (linear + embedding + adaln + attention)


def six_nd(sizes: Sizes) -> int:
    """The common estimate 6 * params_main * tokens for one image."""
    return 6 * parameter_counts(sizes)["params_main"] * scales.num_tokens(sizes["patch_nums"])


def tokenizer_flops(tokenizer: "MSVQVAE") -> dict[str, int]:
    """FLOPs per image of the convolutional parts of a tokenizer, forward only: `encode` and `decode`.

    Counted by torch on a copy on the meta device; the quantizer, below a thousandth, is left out.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from varlab.models.custom_classes import rebuilt

    with torch.device("meta"), torch.no_grad():
        tokenizer = rebuilt(tokenizer)
        flops = {}
        for name, network, shape in [
            ("encode", tokenizer.features, (1, 3, *tokenizer.image_size)),
            (
                "decode",
                tokenizer.decode_features,
                (1, tokenizer.quantizer.codebook_dim, *tokenizer.quantizer.sides[-1]),
            ),
        ]:
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(shape))
            flops[name] = counter.get_total_flops()
    return flops

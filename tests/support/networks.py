"""Tiny networks, each built in milliseconds."""

import torch

from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR

PATCH_NUMS = [1, 2, 3, 4]


QUANTIZER = (
    "patch_nums", "codebook_size", "codebook_dim", "num_phis", "phi_ratio", "lookup", "beta", "gradient", "scale_dropout", "dropout_from",
)  # fmt: skip


def make_tokenizer(**sizes) -> MSVQVAE:
    """16 px, downsample 4, 12 codes of 6 dims, with codes large enough to matter."""
    defaults = {
        "patch_nums": PATCH_NUMS,
        "codebook_size": 12,
        "codebook_dim": 6,
        "channels": 8,
        "channel_mult": (1, 1, 2),
        "num_groups": 4,
    }
    given = {**defaults, **sizes}
    quantizer = MultiScaleQuantizer(**{name: given.pop(name) for name in QUANTIZER if name in given})
    tokenizer = MSVQVAE(quantizer, **given)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer


def make_var(**sizes) -> VAR:
    """Two blocks of width 32; gates open, so that every weight shows in the logits."""
    defaults = {
        "depth": 2,
        "width": 32,
        "num_heads": 2,
        "patch_nums": PATCH_NUMS,
        "codebook_size": 12,
        "codebook_dim": 6,
        "num_classes": 3,
    }
    return VAR(**{**defaults, "init_adaln_gamma": 0.5, "init_head": 1.0, **sizes})


def make_pair(quantizer, **sizes) -> tuple[MSVQVAE, VAR]:
    """A tokenizer with these codes, large enough to matter, and a VAR for them."""
    tokenizer = MSVQVAE(quantizer, channels=8, channel_mult=(1, 1, 2), num_groups=4)
    with torch.no_grad():
        for name, value in quantizer.named_parameters():
            if "codebook" in name:
                value.normal_(std=0.5)
    given = {"codebook_size": quantizer.codebook_size, "codebook_dim": quantizer.codebook_dim}
    return tokenizer.eval(), make_var(**given, **quantizer.head_arguments(), **sizes).eval()


CLASS_NAMES = ["tench, Tinca tinca", "golden retriever", "tabby cat"]

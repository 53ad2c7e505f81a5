"""Tiny networks, each built in milliseconds."""

import pytest
import torch

from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

PATCH_NUMS = [1, 2, 3, 4]


def make_tokenizer(**sizes) -> MSVQVAE:
    """16 px, downsample 4, 12 codes of 6 dims, with codes large enough to matter."""
    defaults = {"patch_nums": PATCH_NUMS, "codebook_size": 12, "codebook_dim": 6, "channels": 8, "channel_mult": (1, 1, 2), "num_groups": 4}
    tokenizer = MSVQVAE(**{**defaults, **sizes})
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    return tokenizer


def make_var(**sizes) -> VAR:
    """Two blocks of width 32; gates open, so that every weight shows in the logits."""
    defaults = {"depth": 2, "width": 32, "num_heads": 2, "patch_nums": PATCH_NUMS, "codebook_size": 12, "codebook_dim": 6, "num_classes": 3}
    return VAR(**{**defaults, "init_adaln_gamma": 0.5, "init_head": 1.0, **sizes})


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> MSVQVAE:
    return make_tokenizer().eval()


@pytest.fixture
def var() -> VAR:
    return make_var().eval()


@pytest.fixture
def token_maps() -> list[torch.Tensor]:
    return [torch.randint(12, (2, pn * pn)) for pn in PATCH_NUMS]


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 2])

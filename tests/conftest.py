"""What tests share: tiny networks, and small runs made once."""

import os
from pathlib import Path

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var

from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"  # processes that tests start run this checkout


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


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """48 + 11 real digits as shards."""
    from support.shards import make_shards

    return make_shards(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory, digits_folder):
    """A tokenizer trained for nine steps."""
    from support.runs import SHORT, TOKENIZER, fit

    folder = tmp_path_factory.mktemp("tokenizer_run")
    fit(folder, *TOKENIZER, *SHORT, f"data.path={digits_folder}")
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory, digits_folder, tokenizer_run):
    """The digits encoded by it, in two views."""
    from support.runs import config

    from varlab.commands import tokenize

    folder = tmp_path_factory.mktemp("tokens")
    checkpoint = tokenizer_run / "checkpoints/last.ckpt"
    settings = [
        f"tokenizer={checkpoint}",
        f"shards={digits_folder}",
        f"out={folder}",
        "resize_ratio=1.0",
        "flips=true",
        "batch_size=7",
    ]
    tokenize.run(config(folder, *settings, verb="tokenize"))
    return folder


@pytest.fixture(scope="session")
def var_overrides(tokenizer_run, token_cache):
    """Settings of a tiny VAR on the token cache."""
    from support.runs import SHORT, VAR

    return [*VAR, *SHORT, f"data.path={token_cache}", f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}"]


@pytest.fixture
def still(var_overrides):
    """Nothing that draws other numbers on other ranks."""
    return [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]

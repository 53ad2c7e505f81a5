"""What tests share: tiny networks, and small runs made once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from support import runs, warm
from support.docs import ROOT, code
from support.networks import CLASS_NAMES, PATCH_NUMS, make_tokenizer, make_var
from support.runs import SHORT, TOKENIZER, command, config, fit, kill_at
from support.scaling_runs import make_runs
from support.servers import free_port
from support.shards import make_shards

from varlab.checkpoints.export_folder import save_pretrained
from varlab.commands import tokenize
from varlab.models.conditioning import TextEmbedder
from varlab.models.msvqvae import MSVQVAE
from varlab.models.text_encoder import TextEncoder
from varlab.models.var import VAR

TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"  # processes that tests start run this checkout


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make test-all` passes without a GPU; `make gpu` runs what needs one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
    return make_shards(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tokenizer_run(tmp_path_factory, digits_folder):
    """A tokenizer trained for nine steps."""
    folder = tmp_path_factory.mktemp("tokenizer_run")
    fit(folder, *TOKENIZER, *SHORT, f"data.path={digits_folder}")
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory, digits_folder, tokenizer_run):
    """The digits encoded by it, in two views."""
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
    return [*runs.VAR, *SHORT, f"data.path={token_cache}", f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}"]


@pytest.fixture
def still(var_overrides):
    """Nothing that draws other numbers on other ranks."""
    return [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]


@pytest.fixture(scope="module")
def page_models(tmp_path_factory):
    """Two export folders of untrained networks with named classes."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        save_pretrained(folder / name, make_tokenizer(), make_var(), ["cat", "dog", "owl"], {})
    return folder


@pytest.fixture(scope="module")
def page_sweep(tmp_path_factory):
    """Runs of three depths."""
    folder = tmp_path_factory.mktemp("sweep")
    make_runs(folder, depths=(1, 2, 3))
    return folder


@contextmanager
def served(*settings: str) -> Iterator[str]:
    """Address of a page, served as a user would; nothing may have failed when it ends."""
    port = free_port()
    command = [sys.executable, "-m", "varlab", "app", *settings, f"port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    said = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in said, said
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    rest = server.communicate(timeout=30)[0]
    assert server.returncode == 0, rest
    assert "a request to the page failed" not in rest and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def page_url(page_models, page_sweep):
    """Address of the page with two models of classes and a sweep."""
    models = [f"checkpoint={page_models / 'first'}", f"compare={page_models / 'second'}"]
    with served(*models, f"runs={page_sweep}", "refresh_s=1", "max_upload_mb=0.5") as url:
        yield url


@pytest.fixture(scope="module")
def text_page_url(tmp_path_factory):
    """Address of the page with a model of texts."""
    folder = tmp_path_factory.mktemp("words") / "words"
    told = {"dim": 384, "encoder": "minilm", "fingerprint": TextEncoder("minilm").fingerprint}
    save_pretrained(folder, make_tokenizer(), make_var(embedder=partial(TextEmbedder, **told)), None, {})
    with served(f"checkpoint={folder}") as url:
        yield url


@pytest.fixture
def export_folder(tmp_path, tokenizer, var):
    """Untrained networks with named classes, exported."""
    save_pretrained(tmp_path / "model", tokenizer, var, CLASS_NAMES, {"val_loss": 3.2})
    return tmp_path / "model"


@pytest.fixture
def broken_shards(tmp_path):
    """Shards of its own for a test that breaks them."""
    return make_shards(tmp_path / "broken")


@pytest.fixture(scope="module")
def resumed_once(tmp_path_factory, var_overrides):
    """Killed after step 5, continued from step 3, with W&B offline beside the local log."""
    tmp_path = tmp_path_factory.mktemp("resumed")
    settings = [override for override in var_overrides if override != "logger=csv"]
    settings += ["logger=default", "logger.wandb.mode=offline", "ckpt_path=last"]
    command(tmp_path / "run", *settings, *kill_at(5))
    fit(tmp_path / "run", *settings)
    return tmp_path / "run"


@pytest.fixture
def resumed(tmp_path, resumed_once):
    """A copy of that run."""
    return Path(shutil.copytree(resumed_once, tmp_path / "run"))


@pytest.fixture
def study(still):
    """The sweep's own settings at test size; 40 steps, warm-up of 2."""
    wanted = {"experiment": "depth_scaling", "model.drop_path": 0.0}
    kept = [setting for setting in still if setting.split("=")[0] not in wanted]
    settings = [f"{key}={value}" for key, value in wanted.items()]
    return [*settings, *kept, "steps=40", "val_every=20", "save_every=10", "module.warmup_tokens=1.0"]


@pytest.fixture
def extend_page(tmp_path, monkeypatch):
    """The page's files, importable by name."""
    for title, text in code(ROOT / "docs/extend.md", "python"):
        (tmp_path / title).write_text(text)
        monkeypatch.delitem(sys.modules, title.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__


@pytest.fixture
def sweep(tmp_path, var_overrides):
    """Starts `varlab VERB ...` in a folder of its own."""

    def start(*arguments, verb="train", **variables) -> subprocess.Popen:
        environment = {**os.environ, **variables}
        command = [sys.executable, "-m", "varlab", verb, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )

    def run(*arguments, verb="train", **variables) -> tuple[int, str]:
        words = [sys.executable, "-m", "varlab", verb, *arguments]
        answer = warm.run(words, timeout=280, env={**os.environ, **variables}, cwd=tmp_path)
        return answer.returncode, answer.stdout + answer.stderr

    run.start = start
    run.settings = ["--multirun", *var_overrides, "name=sweep", "callbacks.pictures=null", "val_every=${steps}"]
    return run

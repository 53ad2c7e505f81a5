"""What runs on a GPU keeps its tensors there, and the host does not wait for them: on fake CUDA tensors."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support import fake_cuda
from support.runs import SHORT, TOKENIZER

ADVERSARIAL = [
    "adversarial=patch", "adversarial.discriminator.num_layers=1", "adversarial.discriminator.channels=8",
    "adversarial.discriminator_start=0.0", "adversarial.adversarial_start=0.0", "adversarial.lecam_weight=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, var_overrides, digits_folder):
    """The outcome of all cases, made in one process."""
    if not torch.backends.cuda.is_built() and shutil.which("g++") is None:
        pytest.skip("a CPU build of torch needs g++ for fake CUDA tensors")
    folder = tmp_path_factory.mktemp("fake_cuda")
    images = [f"data.path={digits_folder}", "data.num_workers=0"]
    on_images = [*var_overrides, "data=images", "resolution=16px", *images]
    given = {
        "var": var_overrides,
        "var_on_images": on_images,
        "tokenizer": [*TOKENIZER, *SHORT, *images, *ADVERSARIAL],
        "checkpoint": next(o for o in var_overrides if o.startswith("tokenizer=")).removeprefix("tokenizer="),
        "ema": "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}",
    }
    (folder / "given.json").write_text(json.dumps(given))
    library = fake_cuda.build(folder)
    environment = {**os.environ, **({} if library is None else {"LD_PRELOAD": str(library)})}
    ended = subprocess.run(
        [sys.executable, "-m", "support.fake_cuda", folder / "given.json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "given.json.out").read_text())


CHECK_OF_LABELS = {"conditioning.py:check": 12}  # four calls for three labels, before the first kernel
UNIFORM_NUMBERS = {"token_sampling.py:to": 4}
INTENDED = {  # where the host waits, and where it sends something to the device
    "training_from_tokens": ({}, {"apply_func.py:batch_to": 15}),
    "training_from_tokens_in_bf16": ({}, {"apply_func.py:batch_to": 6}),
    "training_from_images": ({}, {"apply_func.py:batch_to": 8}),
    "training_of_a_tokenizer": ({}, {"apply_func.py:batch_to": 8}),
    "sampling_in_fp32": (CHECK_OF_LABELS, UNIFORM_NUMBERS),
    "sampling_in_bf16": (CHECK_OF_LABELS, UNIFORM_NUMBERS),
    "sampling_in_raster_order": (CHECK_OF_LABELS, UNIFORM_NUMBERS),
    "what_a_cuda_graph_captures": ({}, {}),
    "editing": (
        {"msvqvae.py:encode": 2, "conditioning.py:check": 4},  # the images' values are checked
        {"token_sampling.py:to": 2, "generate.py:choose": 2},  # and the mask of each scale
    ),
    "likelihood": ({"likelihood.py:<dictcomp>": 3, "likelihood.py:error": 5}, {}),  # once, at the end
    "validation": ({}, {"losses.py:over_tokens": 1}),
    "loading_a_checkpoint": ({}, {"elsewhere": 173}),  # a tensor each
}


@pytest.mark.parametrize("name", fake_cuda.CASES)
def test_the_host_waits_for_the_device_only_where_it_is_meant_to(name, found):
    assert "error" not in found[name], found[name]["error"]
    assert (found[name]["syncs"], found[name]["uploads"]) == INTENDED[name]

"""Three lines from a folder to images."""

import subprocess
import sys

import torch

from varlab.pipeline import VARPipeline
from varlab.sampling.generate import generate


def test_the_pipeline_needs_neither_lightning_nor_hydra(export_folder):
    code = f"""
import sys
from varlab.pipeline import VARPipeline
images = VARPipeline.from_pretrained({str(export_folder)!r})(labels=["golden retriever", 2, "tench"], cfg_scale=4.0, seed=0)
assert [image.size for image in images] == [(16, 16)] * 3
found = [name for name in ("lightning", "hydra", "omegaconf", "wandb", "pickle5") if name in sys.modules]
assert not found, found
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_pipeline_draws_what_generate_draws(export_folder, tokenizer, var):
    images = VARPipeline.from_pretrained(export_folder)(
        [0, "tabby cat", 1], cfg_scale=2.0, top_k=5, seed=3, batch_size=2
    )
    expected = generate(var, tokenizer, torch.tensor([0, 2, 1]), cfg_scale=2.0, top_k=5, seed=3)
    for image, pixels in zip(images, expected, strict=True):
        levels = torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1)
        assert (levels - 255 * pixels).abs().max() <= 0.51

"""The models that are installed with varlab."""

import copy

import numpy as np
import pytest
import torch
from support.networks import make_tokenizer, make_var

from varlab.checkpoints.export_folder import load_pretrained, read_config, save_pretrained, tokenizer_fingerprint
from varlab.checkpoints.load import PRETRAINED, contains_var, load, load_tokenizer, pretrained_models
from varlab.pipeline import VARPipeline


def test_all_together_are_small():
    size = sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file())
    assert {"glyphs32", "fashion32"} <= set(pretrained_models()) and size < 15e6


@pytest.mark.parametrize("name", pretrained_models())
def test_a_pretrained_model_draws_its_classes(name):
    pipeline = VARPipeline.from_pretrained(name, device="cpu")
    images = pipeline([pipeline.class_names[0], pipeline.class_names[-1]], cfg_scale=1.5, seed=0)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert all(np.asarray(image).std() > 30 for image in images) and images[0].tobytes() != images[1].tobytes()
    card = (PRETRAINED / name / "README.md").read_text(encoding="utf-8")
    assert "trained on:" in card and "classifier" in card
    assert read_config(PRETRAINED / name)["tokenizer_fingerprint"] == tokenizer_fingerprint(pipeline.tokenizer)


def test_a_path_comes_before_a_name(tmp_path, monkeypatch, export_folder):
    monkeypatch.chdir(tmp_path)
    assert contains_var("glyphs32") and len(load("glyphs32")[2]) == 62
    (tmp_path / "glyphs32").symlink_to(export_folder)
    assert load("glyphs32")[2] == load(export_folder)[2]


def test_an_unknown_name_is_refused_with_the_known_ones():
    for read in (load, load_tokenizer, contains_var, VARPipeline.from_pretrained):
        with pytest.raises(ValueError, match=r"checkpoint glyphs31 does not exist; pretrained models are .*glyphs32"):
            read("glyphs31")


def test_weights_in_bf16_take_half_the_space_and_are_those_that_the_fingerprint_describes(tmp_path):
    tokenizer, var = make_tokenizer(), make_var()
    for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)):
        save_pretrained(tmp_path / name, copy.deepcopy(tokenizer), copy.deepcopy(var), None, {}, dtype)
    sizes = [(tmp_path / name / "var.safetensors").stat().st_size for name in ("full", "half")]
    numbers = sum(value.numel() for value in var.state_dict().values() if value.is_floating_point())
    assert abs(sizes[0] - sizes[1] - 2 * numbers) < 100  # bytes of the header
    full, half = (load_pretrained(tmp_path / name) for name in ("full", "half"))
    for name, value in full[1].named_parameters():
        loaded = half[1].get_parameter(name)
        assert loaded.dtype == torch.float32 and torch.equal(loaded, value.to(torch.bfloat16).float())
    assert read_config(tmp_path / "half")["tokenizer_fingerprint"] == tokenizer_fingerprint(half[0])

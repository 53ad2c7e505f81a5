"""Evaluation of a VAR."""

import json

import pytest
from support.runs import score


def test_a_var_is_evaluated_on_images_and_on_tokens_alike(
    tmp_path, var_overrides, digits_folder, token_cache, tokenizer_run
):
    from support.runs import fit

    fit(tmp_path / "run", *var_overrides)
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    found = []
    for data in (token_cache, digits_folder):
        score(tmp_path, checkpoint, f"shards={data}")
        found.append(json.loads((tmp_path / "scores/likelihood.json").read_text()))
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert found[0]["loss"] == pytest.approx(row["val_loss"], rel=1e-4)
    assert found[0]["error"] == pytest.approx(row["val_err"], rel=1e-4) and found[0]["num_images"] == 11
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.05)  # images: another resize, so other tokens
    assert (tmp_path / "scores/likelihood.png").read_bytes()[:4] == b"\x89PNG"

"""Training of the tokenizer."""

import json

import pytest
import torch
from hydra.utils import instantiate
from support.golden_rule import golden
from support.runs import (
    config,
    fit,
    images_overrides,
    log_to,
    logged_losses,
    weights,
)

from varlab.checkpoints.released_layout import to_released
from varlab.data import images as image_data


def test_released_weights_are_fine_tuned(tmp_path, digits_folder):
    wide = [*images_overrides(digits_folder), "model.channels=32", "model.num_groups=32"]
    released = instantiate(config(tmp_path, *wide).model)
    torch.save(to_released(released), tmp_path / "released.pth")
    tuned = [*wide, f"module.init_from={tmp_path / 'released.pth'}", "model.dropout=0.1"]
    fit(tmp_path / "still", *tuned, "module.base_lr=0.0")
    for name, value in released.state_dict().items():
        if "hits" not in name and "num_updates" not in name:
            assert torch.equal(weights(tmp_path / "still")[f"net.{name}"], value), name
    fit(tmp_path / "tuned", *tuned)
    assert not torch.equal(weights(tmp_path / "tuned")["net.decoder.conv_out.weight"], released.decoder.conv_out.weight)
    assert json.loads((tmp_path / "tuned/run.json").read_text())["init_from"].endswith("released.pth")
    with pytest.raises(
        Exception, match=r"released.pth holds a tokenizer with codebook_size=12, but this run has codebook_size=16"
    ):
        fit(tmp_path / "other", *tuned, "model.quantizer.codebook_size=16")
    (tmp_path / "released.pth").unlink()
    fit(tmp_path / "tuned", *tuned, "steps=12", "ckpt_path=last")  # a run that continues does not need it
    assert json.loads((tmp_path / "tuned/run.json").read_text())["init_from"].endswith("released.pth")


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_training_losses_are_the_recorded_ones(kind, tmp_path, digits_folder, var_overrides, monkeypatch):
    """A refactor changes none of them; a deliberate change writes tests/golden/losses.json anew, in its own commit.

    With Pillow's resize, which every version of torch can do."""
    monkeypatch.setattr(image_data, "HAS_LANCZOS", False)
    overrides = images_overrides(digits_folder) if kind == "tokenizer" else var_overrides
    fit(tmp_path, *overrides, *log_to(tmp_path / "log"))
    losses = [float.fromhex(loss) for loss in logged_losses(tmp_path / "log").values()]
    assert losses == pytest.approx(golden("losses")[kind], rel=2e-4)

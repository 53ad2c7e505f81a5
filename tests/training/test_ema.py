"""The exponential moving average of the weights."""

import json
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningModule, Trainer
from support.runs import (
    fit,
    weights,
)
from torch import nn

from varlab.checkpoints.load import load
from varlab.training.ema import EMA


class Weight(LightningModule):
    """One trained number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def at(step: int) -> Trainer:
    """A trainer that has taken `step` optimizer steps."""
    return Mock(spec=Trainer, global_step=step)


def averages(decay: float, num_steps: int) -> list[float]:
    """The average of a weight whose value at step n is n, after each step."""
    module, ema, found = Weight(), EMA(decay), []
    ema.on_train_start(at(0), module)
    for step in range(1, num_steps + 1):
        module.weight.data.fill_(step)
        ema.on_train_batch_end(at(step), module, None, None, step)
        found.append(float(ema.average["weight"]))
    return found


def test_the_decay_rises_from_2_11_to_its_value():
    expected, average = [], 0.0
    for step in range(1, 41):
        decay = min(0.7, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        expected.append(average)
    assert averages(0.7, 40) == pytest.approx(expected, rel=1e-5)
    assert averages(0.7, 1) == pytest.approx([9 / 11])


def test_a_batch_that_only_accumulates_changes_nothing():
    module, ema = Weight(), EMA(0.5)
    ema.on_train_start(at(0), module)
    before = ema.average["weight"].clone()
    module.weight.data += 1
    ema.on_train_batch_end(at(0), module, None, None, 0)
    assert torch.equal(ema.average["weight"], before)
    ema.on_train_batch_end(at(1), module, None, None, 1)
    assert not torch.equal(ema.average["weight"], before)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match=f"EMA decay={decay}: must be between 0 and 1"):
        EMA(decay)


def test_averaged_weights_validate_and_are_loaded(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides, "callbacks.ema={_target_:varlab.training.ema.EMA,decay:0.5}")
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    name = "net.head.weight"
    assert not torch.equal(saved["ema"][name], saved["state_dict"][name])
    assert torch.equal(load(tmp_path / "checkpoints/last.ckpt")[1].head.weight, saved["ema"][name])
    assert torch.equal(
        load(tmp_path / "checkpoints/last.ckpt", use_ema=False)[1].head.weight, saved["state_dict"][name]
    )


AVERAGED = ["callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}"]


def test_raw_weights_are_validated_beside_their_average(tmp_path, still):
    beside = "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9, is_raw_validated: true}"
    fit(tmp_path / "both", *still, beside)
    fit(tmp_path / "average", *still, *AVERAGED)
    fit(tmp_path / "raw", *still)
    both, average, raw = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("both", "average", "raw"))
    assert both["val_loss"] == average["val_loss"] != raw["val_loss"] == both["val_raw_loss"]
    assert both["val_raw_err_last"] == raw["val_err_last"]
    for (name, a), b in zip(weights(tmp_path / "both").items(), weights(tmp_path / "raw").values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_holds_the_raw_weights_also_while_the_averages_are_validated():
    module, ema = Weight(), EMA(0.5)
    assert not ema.is_raw_validated
    ema.on_train_start(at(0), module)
    module.weight.data.fill_(4)
    ema.on_train_batch_end(at(1), module, None, None, 0)
    ema.on_validation_start(at(1), module)
    checkpoint = {"state_dict": module.state_dict()}
    ema.on_save_checkpoint(at(1), module, checkpoint)
    assert (
        float(checkpoint["state_dict"]["weight"]) == 4.0 != float(module.weight) == float(checkpoint["ema"]["weight"])
    )
    ema.on_validation_end(at(1), module)
    assert float(module.weight.detach()) == 4.0 and not ema.raw

"""What follows from compute and other runs before training."""

import pytest
from support.networks import make_var
from support.runs import config, fit

from varlab.checkpoints.load import load_tokenizer
from varlab.commands import train
from varlab.cost.flops import training_flops


def test_a_branch_that_would_not_share_its_first_steps_is_refused(tmp_path, study):
    for wrong in (
        "schedule@module.schedule=linear",
        "module.weight_decay_end=0.1",
        "steps=-1",
        "module.warmup_tokens=null",
    ):
        with pytest.raises(ValueError, match=r"branch=0.5: a branch shares its first steps|needs the length"):
            fit(tmp_path, *study, "branch=0.5", "epochs=1", wrong)
    with pytest.raises(ValueError, match=r"branch=1.5: give the length"):
        fit(tmp_path, *study, "branch=1.5")


def test_compute_buys_steps(tmp_path, study):
    cfg = config(tmp_path, *study, "compute=2e9")
    train.set_steps(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    var = make_var(codebook_size=tokenizer.quantizer.codebook_size, patch_nums=tokenizer.patch_nums, num_classes=10)
    flops = training_flops(var.sizes) * cfg.data.global_batch_size
    assert cfg.steps == round(2e9 / flops) > 2
    with pytest.raises(ValueError, match="less than one step"):
        train.set_steps(config(tmp_path, *study, "compute=1e3"))

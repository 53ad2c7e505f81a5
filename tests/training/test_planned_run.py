"""What follows from compute and other runs before training."""

import pytest
from support.networks import make_pair, make_var
from support.runs import config, fit

from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.load import load_tokenizer
from varlab.commands import train
from varlab.cost.flops import training_flops
from varlab.models.codes.binary import BinarySphericalQuantizer


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


def test_a_plan_has_the_head_of_the_tokenizers_codes(tmp_path, study):
    tokenizer, _ = make_pair(BinarySphericalQuantizer([1, 2, 3, 4], bits=20))
    save_pretrained(tmp_path / "bits", tokenizer, None, None, {})
    sizes = train.planned(config(tmp_path, *study, f"tokenizer={tmp_path / 'bits'}")).sizes
    assert sizes["bases"] == [2] * 20 and sizes["codebook_size"] == 2**20

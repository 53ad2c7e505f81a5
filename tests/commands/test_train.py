"""`varlab train`: plans and refusals."""

import subprocess
import sys
import time

import pytest
from support.runs import (
    command,
    config,
    fit,
)

from varlab.commands import train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("module.base_lr=1e-3x", r"module.base_lr='1e-3x' has type str"),
        ("model.depth=abc", r"model.depth='abc' has type str"),
        ("+model.dpeth=3", r"dpeth: varlab.models.var.VAR has no such setting"),
        ("+module.schedule.shape=cosine", r"shape: varlab.training.schedules.Linear has no such setting"),
        ("data.global_batch_size=96", "48 images, fewer than one step of 1 x 96"),
        ("steps=-1", "the run has no length: give epochs=N or steps=N"),
        ("epochs=null", "epochs=None: give an integer"),
        ("module.recompute=some", "module.recompute='some': choose one of none, selective, all"),
        ("module.loss_chunks=0", "module.loss_chunks=0: give 1 or more"),
        ("module.attention=dense", "module.attention='dense': choose one of masked, split, flex"),
        ("accumulate=3", "global_batch_size=8 is not divisible by 1 devices x 3"),
        ("tokenizer=nowhere.ckpt", "checkpoint nowhere.ckpt does not exist"),
        ("data.path=nowhere", r"nowhere/manifest.json does not exist: make it with `varlab tokenize`"),
        ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt does not exist"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(change, message, tmp_path, var_overrides):
    with pytest.raises(Exception, match=message) as caught:
        fit(tmp_path, *var_overrides, change)
    causes = [caught.value, caught.value.__cause__]
    assert any(isinstance(cause, ValueError) for cause in causes)


def test_a_wrong_type_or_key_ends_with_code_1_and_no_traceback(tmp_path, var_overrides):
    answer = command(tmp_path, *var_overrides, "module.base_lr=1e-3x")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stdout + answer.stderr
    assert "module.base_lr='1e-3x'" in answer.stdout + answer.stderr
    answer = command(tmp_path, *var_overrides, "modul.base_lr=1")
    assert answer.returncode == 1
    assert "modul" in answer.stderr


def test_the_plan_of_the_paper_says_what_the_run_will_count(tmp_path, capsys):
    train.run(config(tmp_path, "experiment=var_d16", "trainer=ddp", "plan=true"))
    said = capsys.readouterr().out
    assert "VAR of depth 16, width 1024, 310.3 M parameters" in said
    assert "680 tokens per image" in said and "333,600 steps of 768 images = 256.2 M images = 200 epochs" in said
    assert "896 GFLOP per image, 2.29e+20 FLOP in total" in said
    assert not (tmp_path / "checkpoints").exists()


def test_the_plan_counts_with_the_tokenizer_and_data_given(tmp_path, capsys, var_overrides):
    train.run(config(tmp_path, *var_overrides, "plan=true"))
    said = capsys.readouterr().out
    assert (
        "30 tokens per image on maps of 1, 2, 3, 4" in said and "9 steps of 8 images" in said and "assumed" not in said
    )


def test_a_plan_that_fits_no_gpu_is_refused_with_one_that_does(tmp_path):
    alone = ["experiment=var_d30", "trainer=gpu", "plan=true"]
    with pytest.raises(
        ValueError,
        match=r"needs [\d.]+ GB of the 77.0 GB on each h100 .*: the cheapest layout that fits is trainer=gpu",
    ):
        train.run(config(tmp_path, *alone))
    with pytest.raises(ValueError, match="does not fit 1 x h100 .80 GB. in any layout: use more devices"):
        train.run(config(tmp_path, *alone, "model.depth=60"))
    with pytest.raises(ValueError, match="planned_gpu='v100': choose one of a100, h100, h200"):
        train.run(config(tmp_path, *alone, "planned_gpu=v100"))


def test_two_runs_at_once_do_not_share_a_folder(tmp_path, var_overrides):
    settings = [f"run_dir={tmp_path}", "name=test", f"hydra.run.dir={tmp_path}", *var_overrides, "ckpt_path=last"]
    first = subprocess.Popen([sys.executable, "-m", "varlab", "train", *settings, "steps=100000"])
    while not (tmp_path / "checkpoints/last.ckpt").is_file():
        assert first.poll() is None
        time.sleep(0.2)
    second = command(tmp_path, *var_overrides, "ckpt_path=last")
    assert second.returncode == 1 and f"{tmp_path} is in use by `varlab train` (process {first.pid}" in second.stdout
    first.kill()
    first.wait()

"""A resumed run names what changed, keeps it in its record, and refuses a length that is already behind it."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from support.runs import config, fit

from varlab.training.run_settings import changes, deciding, in_force


def settings_of(tmp_path, *overrides):
    return deciding(
        OmegaConf.to_container(config(tmp_path, "experiment=var_digits", "tokenizer=t", *overrides), resolve=True)
    )


@pytest.mark.parametrize(
    "override",
    [
        *("module.base_lr=1e-3", "module.schedule.final_ratio=0.5", "schedule@module.schedule=cosine"),
        *("module.loss.label_smoothing=0.1", "model.drop_path=0.3", "model.label_dropout=0.2", "steps=7", "seed=3"),
        *(
            "data.global_batch_size=8",
            "module.weight_decay=0.1",
            "optimizer@module.optimizer=sgd",
            "module.frozen=[head.*]",
        ),
        *(
            "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}",
            "trainer.precision=bf16-mixed",
            "data.window=8",
        ),
        *("module.gradient_clip_val=1.0", "+callbacks.mine={_target_: mine.Callback}"),
    ],
)
def test_a_setting_that_decides_the_result_is_noticed(tmp_path, override):
    before, now = settings_of(tmp_path, "data.path=a"), settings_of(tmp_path, "data.path=a", override)
    assert changes(before, now)


@pytest.mark.parametrize(
    "override",
    [
        *("name=other", "devices=2", "val_every=7", "save_every=7", "log_every=7", "logger=csv", "accumulate=2"),
        *(
            "data.num_workers=3",
            "data.keep=memory",
            "module.recompute=all",
            "callbacks.pictures=null",
            "trainer.devices=2",
        ),
        *("ckpt_path=last", "module.init_from=x", "module.loss_chunks=2", "callbacks.progress=null"),
    ],
)
def test_where_and_how_it_runs_is_no_change(tmp_path, override):
    before, now = settings_of(tmp_path, "data.path=a"), settings_of(tmp_path, "data.path=a", override)
    assert changes(before, now) == {}


def test_settings_in_force_are_those_of_all_stretches():
    stretches = [
        {"first_step": 0, "settings": {"a": 1, "b": 2}},
        {"first_step": 5, "settings": {"a": 3, "c": 4}},
        {"first_step": 9, "settings": {"c": None}},
    ]
    assert in_force(stretches) == {"a": 3, "b": 2, "c": None}
    assert changes(in_force(stretches), {"a": 3, "b": 2}) == {}
    assert changes({"a": 1, "b": 2}, {"a": 1}) == {"b": None}


def test_a_run_prolonged_with_other_settings_says_so_and_records_both(tmp_path, var_overrides, capsys):
    fit(tmp_path, *var_overrides)
    peak = json.loads((tmp_path / "run.json").read_text())["lr_peak"]
    capsys.readouterr()
    fit(tmp_path, *var_overrides, "ckpt_path=last", "steps=12", "val_every=12", "module.loss.label_smoothing=0.1")
    said = capsys.readouterr().out
    assert "continues with other settings" in said and "steps: 9 before, now 12" in said
    assert "module.loss.label_smoothing: 0.0 before, now 0.1" in said
    words = said.split("learning rate goes from ")[1].split()
    used, now = float(words[0]), float(words[6])
    assert used == pytest.approx(peak * 0.1, rel=1e-2), "the schedule of 9 steps ended at a tenth"
    assert now > 2 * used, "within 12 steps, it is not that far down yet"
    first, second = json.loads((tmp_path / "run.json").read_text())["stretches"]
    assert first["first_step"] == 0 and first["settings"]["module.loss.label_smoothing"] == 0.0
    assert second == {"first_step": 9, "settings": {"steps": 12, "module.loss.label_smoothing": 0.1}}
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert len(next(state["stretches"] for state in saved.values() if "stretches" in state)) == 2


def test_a_run_that_continues_unchanged_records_no_other_setting(resumed_once):
    """But for the callback that killed it."""
    first, *others = json.loads((resumed_once / "run.json").read_text())["stretches"]
    assert first["first_step"] == 0
    assert {name for stretch in others for name in stretch["settings"]} == {
        "callbacks.kill._target_",
        "callbacks.kill.batch",
    }


def test_a_length_behind_the_checkpoint_is_an_error(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match="has 6 steps, but its checkpoint is already at step 9"):
        fit(tmp_path, *var_overrides, "ckpt_path=last", "steps=6", "val_every=6")
    assert (tmp_path / "run.json").read_text() == before
    fit(tmp_path / "longer", *var_overrides, "steps=12", "val_every=6", "callbacks.best.save_top_k=-1")
    middle = tmp_path / "longer/checkpoints/best-0000006.ckpt"
    with pytest.raises(ValueError, match="has 6 steps, but its checkpoint is already at step 6"):
        fit(tmp_path / "cut", *var_overrides, f"ckpt_path={middle}", "steps=6", "val_every=6")

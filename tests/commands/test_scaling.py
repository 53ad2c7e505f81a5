"""`varlab scaling`."""

import json
import subprocess
import sys

import pytest
from support.scaling_runs import make_runs, scale


@pytest.mark.parametrize("key", ["tokenizer_id", "dataset_id", "patch_nums"])
def test_runs_of_different_tokenizers_or_data_are_not_fitted_together(key, tmp_path):
    make_runs(tmp_path / "sweep", **{key: "another"})
    with pytest.raises(ValueError, match=f"runs of different {key} cannot be fitted together .*d1-38400: .another"):
        scale(tmp_path, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("floor=deep", "floor='deep'"),
        ("form=round", "form='round'"),
        ("unfinished=guess", "unfinished='guess'"),
        ("report=fax", "report='fax'"),
        ("ask=why", "'why': choose"),
        ("ask=predict", "needs depth=..."),
        ("ask=optimal", "needs compute=..."),
    ],
)
def test_a_setting_out_of_range_is_named(setting, message, tmp_path):
    make_runs(tmp_path / "sweep")
    with pytest.raises(ValueError, match=message):
        scale(tmp_path, tmp_path / "sweep", setting)


BUDGETS = (5000, 10000, 20000, 40000)


def test_the_verb_answers(tmp_path, capsys):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5), budgets=BUDGETS, noise=0.002)
    scale(tmp_path, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert "L(N, D) = E + A / N^alpha + B / D^beta" in printed and "with the other loss" in printed
    for name in ("surface", "scaling", "extrapolation"):
        assert (tmp_path / f"fit/{name}.png").is_file()
    held = json.loads((tmp_path / "fit/fits.json").read_text())["held_out_error_percent"]
    assert len(held) == 8
    quick = ["form=free_huber", "bootstraps=10"]
    for ask, given, expected in [
        ("predict", ["depth=8", "images=1e5"], "depth 8"),
        ("optimal", ["compute=1e15"], "95 % of bootstraps"),
        ("compare", ["run=d3-20000"], "L(N, D) of the others predicts"),
        ("next", [], "as wide as now"),
    ]:
        scale(tmp_path, tmp_path / "sweep", f"ask={ask}", *quick, *given)
        assert expected in capsys.readouterr().out, ask


def test_questions_are_words_on_the_command_line(tmp_path):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5), budgets=BUDGETS, noise=0.002)
    command = [sys.executable, "-m", "varlab", "scaling", "predict", f"source={tmp_path / 'sweep'}", "depth=8"]
    answer = subprocess.run(
        [*command, "images=1e5", "form=free_huber", "bootstraps=5"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0 and answer.stdout.startswith("depth 8"), answer.stderr
    unnamed = subprocess.run(command[:-1], capture_output=True, text=True, check=False)
    assert unnamed.returncode == 1 and "varlab scaling predict needs depth=..." in unnamed.stdout

"""`varlab scaling`."""

import json
import sys

import pytest
from support import warm
from support.runs import config
from support.scaling_runs import make_runs, scale

from varlab.commands import scaling


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
        ("ask=predict", "needs depth=... or n=..."),
        ("outliers=maybe", "outliers='maybe'"),
        ("bootstraps=abc", "bootstraps='abc': must be a whole number"),
        ("bootstraps=5", "bootstraps=5: an interval needs at least 20 draws"),
        ("seed=-1", "seed=-1: must be a whole number"),
        ("order=foo", "order='foo'"),
        ("columns=loss", "columns='loss': give names as in"),
        ("floor=-1", "floor=-1"),
        ("repeated=often", "repeated='often'"),
        ("max_extrapolation=0.5", "max_extrapolation=0.5"),
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
    assert "does not describe" not in printed
    assert "L(N, D) = E + A / N^alpha + B / D^beta" in printed and "with the other loss" in printed
    for name in ("surface", "scaling", "extrapolation"):
        assert (tmp_path / f"fit/{name}.png").is_file()
    held = json.loads((tmp_path / "fit/fits.json").read_text())["held_out_error_percent"]
    assert len(held) == 4
    quick = ["form=free_huber", "bootstraps=20"]
    for ask, given, expected in [
        ("predict", ["depth=8", "images=1e5"], "depth 8"),
        ("optimal", ["compute=5e13"], "95 % interval: depth"),
        ("compare", ["run=d3-20000"], "L(N, D) of the others predicts"),
        ("next", [], "as wide as now"),
    ]:
        scale(tmp_path, tmp_path / "sweep", f"ask={ask}", *quick, *given)
        assert expected in capsys.readouterr().out, ask


def test_questions_are_words_on_the_command_line(tmp_path):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5), budgets=BUDGETS, noise=0.002)
    command = [sys.executable, "-m", "varlab", "scaling", "predict", f"source={tmp_path / 'sweep'}", "depth=6"]
    answer = warm.run([*command, "images=1e5", "form=free_huber", "bootstraps=20"])
    assert answer.returncode == 0 and answer.stdout.startswith("depth 6"), answer.stderr
    unnamed = warm.run(command[:-1])
    assert unnamed.returncode == 1 and "varlab scaling: predict needs depth=... or n=..." in unnamed.stdout


def test_two_recipes_are_compared_in_one_sentence_and_a_figure(tmp_path, capsys):
    make_runs(tmp_path / "plain", depths=(1, 2, 3, 4, 5), noise=0.001)
    make_runs(tmp_path / "idea", depths=(1, 2, 3, 4, 5), noise=0.001)
    for file in (tmp_path / "idea").glob("*/run.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps({**row, "flops_exact": row["flops_exact"] / 2}))
    recipes = [f"a={tmp_path / 'idea'}", f"b={tmp_path / 'plain'}", f"out={tmp_path / 'fit'}", "floor=2", "ask=compare"]
    scaling.run(config(tmp_path, *recipes, "bootstraps=100", verb="scaling"))
    told = json.loads((tmp_path / "fit/recipes.json").read_text())
    assert told["interval"][0] < 2 < told["interval"][1] and told["is_paired"] and len(told["by_pair"]) == 5
    assert f"needs {told['multiplier']:.3f} times the compute" in capsys.readouterr().out
    assert (tmp_path / "fit/recipes.png").is_file()
    with pytest.raises(ValueError, match="needs a=RUNS and b=RUNS"):
        scaling.run(config(tmp_path, recipes[0], "ask=compare", verb="scaling"))


def test_a_source_is_needed(tmp_path):
    with pytest.raises(ValueError, match="source=RUNS is missing"):
        scaling.run(config(tmp_path, f"out={tmp_path}", verb="scaling"))


def test_a_table_of_somebody_else_becomes_a_report(tmp_path, capsys):
    """Names of its own, no depth, every D once."""
    lines = [
        f"{n},{1e15 / (6 * n)},{2 + (1e6 / n) ** 0.3 + (6 * n * 3e5 / 1e15) ** 0.3}"
        for n in (1e6, 2e6, 4e6, 8e6, 2e7, 5e7)
    ]
    (tmp_path / "theirs.csv").write_text("params,tokens,loss\n" + "\n".join(lines) + "\n")
    scale(tmp_path, tmp_path / "theirs.csv", "columns={params: N, tokens: D, loss: L}")
    printed = capsys.readouterr().out
    assert "6 sizes, N 1e+06 to 5e+07" in printed and "IsoFLOP, 1e+15 FLOP: best N" in printed
    assert "not fitted: L(N): needs 4 sizes that saw equally many tokens" in printed
    report = (tmp_path / "fit/report.md").read_text()
    assert (
        "| D counts | tokens seen in training" in report
        and "| C counts | 6 N D, since the table has no FLOPs |" in report
    )

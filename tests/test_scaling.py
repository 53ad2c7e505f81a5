"""Fits against synthetic truth; the table keeps apart what does not belong together."""

import json

import numpy as np
import pytest
from runs import config

from varlab import scaling_law
from varlab.scaling.fit import fit, frontier
from varlab.scaling.runs import read_runs, write_csv

SIZES = np.array([2.0, 3, 4, 6, 8, 10, 12, 16]) ** 3 * 73728


def truth(sizes, alpha=0.2, floor=5.0, scale=1e9):
    return floor + (scale / sizes) ** alpha


@pytest.mark.parametrize(("floor", "given"), [(5.0, 5.0), (5.0, None), (0.0, 0.0), (0.0, None)])
def test_exact_points_give_back_their_law(floor, given):
    law = fit(SIZES, truth(SIZES, floor=floor), floor=given, bootstraps=0)
    assert law.alpha == pytest.approx(0.2, abs=2e-3)
    assert law.floor == pytest.approx(floor, abs=0.02)
    assert law(1e9) == pytest.approx(floor + 1, abs=5e-3)
    assert law.r == pytest.approx(-1, abs=1e-4)


def test_a_wrong_floor_changes_the_exponent_and_hardly_the_correlation():
    low, right, high = (fit(SIZES, truth(SIZES), floor=floor, bootstraps=0) for floor in (4.5, 5.0, 5.3))
    assert low.alpha < 0.17 < right.alpha < 0.22 < high.alpha
    assert min(abs(law.r) for law in (low, right, high)) > 0.99


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered, rng = 0, np.random.default_rng(0)
    xs = np.repeat(SIZES, 2)
    for draw in range(200):
        ys = 5 + (truth(xs) - 5) * np.exp(rng.normal(0, 0.02, len(xs)))
        low, high = fit(xs, ys, floor=5.0, bootstraps=200, seed=draw).alpha_interval
        covered += low <= 0.2 <= high
    assert 180 <= covered <= 198


def test_few_sizes_give_no_interval_and_too_few_no_fit():
    assert fit(SIZES[:3], truth(SIZES[:3]), floor=5.0).alpha_interval is None
    with pytest.raises(ValueError, match="needs more than 2 different sizes"):
        fit(SIZES[:2], truth(SIZES[:2]), floor=None)
    with pytest.raises(ValueError, match=r"floor=9.0 is not below all values"):
        fit(SIZES, truth(SIZES), floor=9.0)
    with pytest.raises(ValueError, match="diverged"):
        fit(SIZES, np.where(SIZES > 1e7, np.nan, 5.5), floor=None)


def test_the_frontier_is_what_nothing_beats_with_less_compute():
    assert frontier([1, 2, 3, 4, 2.5], [5, 6, 4, 4.5, 5]) == [0, 2]


def make_runs(folder, depths=(1, 2, 3, 4), **changes):
    for i, depth in enumerate(depths):
        size = 73728 * depth**3
        loss = float(truth(np.array(size), floor=2.0, scale=1e6))
        row = {
            "name": f"d{depth}", "kind": "var", "state": "finished", "depth": depth, "step": 10, "params_main": size,
            "flops_exact": size * 6e6, "tokenizer_id": "t", "dataset_id": "d", "patch_nums": [1, 2], "val_loss": loss,
            "val_loss_last": loss + 0.1, "val_err": 80 - depth, "val_err_last": 82 - depth,
        }  # fmt: skip
        (folder / f"d{depth}").mkdir(parents=True)
        row.update({key: value for key, value in changes.items() if i == 0})
        (folder / f"d{depth}" / "run.json").write_text(json.dumps(row))


def scale(folder, source, *overrides):
    scaling_law.run(
        config(folder, f"source={source}", f"out={folder / 'fit'}", "bootstraps=50", *overrides, verb="scaling")
    )


def test_a_sweep_becomes_a_table_fits_and_a_figure(tmp_path, capsys):
    make_runs(tmp_path / "sweep")
    scale(tmp_path, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert "val_loss" in printed and "[paper, ImageNet 256: 0.2]" in printed
    for name in ("runs.csv", "fits.json", "scaling.png", "scaling.svg"):
        assert (tmp_path / "fit" / name).stat().st_size > 0
    laws = {(law["y"], law["x"]): law for law in json.loads((tmp_path / "fit/fits.json").read_text())}
    assert laws["val_loss", "params_main"]["alpha"] == pytest.approx(0.2, abs=0.01)
    assert (tmp_path / "fit/runs.csv").read_text().splitlines()[0].count("[nat/token]") == 2
    again = read_runs(tmp_path / "fit/runs.csv")
    assert [row["params_main"] for row in again] == [73728 * depth**3 for depth in (1, 2, 3, 4)]
    scale(tmp_path / "csv", tmp_path / "fit/runs.csv")
    assert (tmp_path / "csv/fit/fits.json").read_text() == (tmp_path / "fit/fits.json").read_text()


def test_an_unfinished_run_is_named_and_left_out(tmp_path, capsys):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5), state="failed")
    scale(tmp_path, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert "left out: d1 (depth 1, failed at step 10)" in printed
    assert "4 runs, depths [2, 3, 4, 5]" in printed


@pytest.mark.parametrize("key", ["tokenizer_id", "dataset_id"])
def test_runs_of_different_tokenizers_or_data_are_not_fitted_together(key, tmp_path):
    make_runs(tmp_path / "sweep", **{key: "another"})
    with pytest.raises(ValueError, match=f"runs of different {key} cannot be fitted together"):
        scale(tmp_path, tmp_path / "sweep")


def test_a_floor_that_is_no_number_is_named(tmp_path):
    make_runs(tmp_path / "sweep")
    with pytest.raises(ValueError, match="floor='deep'"):
        scale(tmp_path, tmp_path / "sweep", "floor=deep")


def test_the_table_survives_a_round_trip(tmp_path):
    rows = [{"name": "a", "kind": "var", "val_loss": 1.5, "patch_nums": [1, 2], "git_commit": None}]
    write_csv(rows, tmp_path / "runs.csv")
    assert read_runs(tmp_path / "runs.csv") == rows

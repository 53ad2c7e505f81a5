"""Fits against synthetic truth; the table keeps apart what does not belong together."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.scaling_runs import make_row, make_runs, scale, sizes

from varlab.cost.flops import parameter_counts
from varlab.scaling import plot
from varlab.scaling.analysis import lack_of_fit, seed_noise
from varlab.scaling.frontier import candidates, frontier, isoflop
from varlab.scaling.parametric import CHINCHILLA, ParametricLaw
from varlab.scaling.power_law import exponents_by_floor, fit
from varlab.scaling.runs import collect, read_table, write_csv

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


def test_a_sweep_becomes_tables_fits_figures_and_a_page(tmp_path, capsys):
    make_runs(tmp_path / "sweep")
    scale(tmp_path, tmp_path / "sweep", "floor=2.5")
    printed = capsys.readouterr().out
    assert "val_loss" in printed and "[paper, ImageNet 256: 0.2]" in printed
    for name in ("scaling", "scales", "floors", "extrapolation"):
        for kind in ("png", "svg", "pdf"):
            assert (tmp_path / f"fit/{name}.{kind}").stat().st_size > 1000, (name, kind)
    laws = {(law["y"], law["x"]): law for law in json.loads((tmp_path / "fit/fits.json").read_text())["laws"]}
    assert laws["val_loss", "params_main"]["floor"] == 2.5
    page = (tmp_path / "fit/report.html").read_text()
    assert "<title>d3-38400 | depth 3 | 38,400 images" in page and "http" not in page.replace(
        "http://www.w3.org", ""
    ).replace("https://matplotlib.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    header = (tmp_path / "fit/runs.csv").read_text().splitlines()[0]
    assert header.count("[nat/token]") == 4 and "flops_exact [FLOP]" in header
    curves = read_table(tmp_path / "fit/curves.csv")
    assert [point["images"] for point in curves[:2]] == [19200, 38400]
    scale(tmp_path / "csv", tmp_path / "fit/runs.csv", "floor=2.5")
    assert (tmp_path / "csv/fit/fits.json").read_text() == (tmp_path / "fit/fits.json").read_text()
    assert (tmp_path / "csv/fit/curves.csv").read_text() == (tmp_path / "fit/curves.csv").read_text()


def test_an_unfinished_run_is_left_out_or_used_up_to_where_it_came(tmp_path, capsys):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5), state="failed", val_loss=9.0)
    scale(tmp_path, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert "d1-38400 (depth 1, failed at step 10): left out" in printed
    assert "4 runs, depths [2, 3, 4, 5]" in printed
    (tmp_path / "sweep/d1-38400/metrics.csv").write_text(
        "step,val/loss,val/loss_last,val/err,count/images_seen,count/flops_exact\n7,8.0,8.1,90,26880,1e9\n"
    )
    used = collect([str(tmp_path / "sweep")], use_unfinished=True)
    row = next(row for row in used.rows if row["depth"] == 1)
    assert (row["step"], row["val_loss"], row["images_seen"], row["flops_exact"]) == (7, 8.0, 26880, 1e9)
    assert "used up to step 7" in used.left_out[0]


def test_a_run_whose_loss_is_not_finite_is_left_out(tmp_path):
    make_runs(tmp_path / "sweep", val_loss=float("nan"))
    runs = collect([str(tmp_path / "sweep")])
    assert len(runs.rows) == 3 and "not finite" in runs.left_out[0]


@pytest.mark.parametrize("key", ["tokenizer_id", "dataset_id", "patch_nums"])
def test_runs_of_different_tokenizers_or_data_are_not_fitted_together(key, tmp_path):
    make_runs(tmp_path / "sweep", **{key: "another"})
    with pytest.raises(ValueError, match=f"runs of different {key} cannot be fitted together .*d1-38400: .another"):
        scale(tmp_path, tmp_path / "sweep")


def test_raster_networks_are_fitted_by_themselves(tmp_path):
    make_runs(tmp_path / "sweep", order="raster")
    assert [row["depth"] for row in collect([str(tmp_path / "sweep")]).rows] == [2, 3, 4]
    assert [row["depth"] for row in collect([str(tmp_path / "sweep")], order="raster").rows] == [1]


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


def test_several_sources_make_one_table_each_run_once(tmp_path):
    make_runs(tmp_path / "a", depths=(1, 2))
    make_runs(tmp_path / "b", depths=(2, 3, 4))
    runs = collect([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [row["depth"] for row in runs.rows] == [1, 2, 3, 4] and len(runs.curves) == 8
    with pytest.raises(ValueError, match="nowhere holds no VAR runs"):
        collect([str(tmp_path / "a"), str(tmp_path / "nowhere")])


def test_the_table_survives_a_round_trip(tmp_path):
    rows = [
        {
            "run_id": "00012e34",
            "name": "a",
            "val_loss": 1.5,
            "patch_nums": [1, 2],
            "git_commit": None,
            "sizes": {"a": 1},
        }
    ]
    write_csv(rows, tmp_path / "runs.csv")
    assert read_table(tmp_path / "runs.csv") == rows


def test_the_profile_of_the_floor_passes_through_the_truth():
    profile = exponents_by_floor(SIZES, truth(SIZES))
    floors, exponents, correlations = zip(*profile, strict=True)
    assert np.interp(5.0, floors, exponents) == pytest.approx(0.2, abs=5e-3)
    assert list(exponents) == sorted(exponents) and max(correlations[:-4]) < -0.98


def test_a_prediction_holds_what_a_further_run_gives():
    """Fits of eight sizes, twice each; the interval for the next size holds a new run's loss as often as it says."""
    held, rng = 0, np.random.default_rng(1)
    xs = np.repeat(SIZES, 2)
    for draw in range(200):
        ys = 5 + (truth(xs) - 5) * np.exp(rng.normal(0, 0.02, len(xs)))
        low, high = fit(xs, ys, floor=5.0, bootstraps=100, seed=draw).interval(3e9, seed=draw)
        held += low <= 5 + (truth(3e9) - 5) * np.exp(rng.normal(0, 0.02)) <= high
    assert 180 <= held <= 199


def test_curves_count_where_the_rate_is_constant_and_past_the_warm_up():
    row = {
        "run_id": "a",
        "depth": 1,
        "flops_exact": 10,
        "images_seen": 10,
        "val_loss": 3.0,
        "warmup": 2,
        "schedule": "constant",
    }
    curve = [
        {"run_id": "a", "images": images, "flops_exact": images, "val_loss": 9.0 - images / 2} for images in (1, 4, 8)
    ]
    assert [p["flops_exact"] for p in candidates([row], curve)] == [10, 4, 8]
    assert [p["flops_exact"] for p in candidates([{**row, "schedule": "lin0"}], curve)] == [10]


def iso_rows(optimum, budgets=(1e15, 4e15, 16e15), depths=(2, 3, 4, 5, 6, 8, 10)):
    """Parabolas in ln N whose minimum lies at `optimum` times C^0.5."""
    return [
        make_row(depth, name=f"{depth}-{compute:g}", flops_exact=compute, images_seen=compute / depth**3,
                 val_loss=3 + 0.05 * np.log(size / (optimum * compute**0.5)) ** 2)
        for compute in budgets for depth in depths for size in [parameter_counts(sizes(depth))["params_main"]]
    ]  # fmt: skip


def test_parabolas_find_the_best_size_and_its_power_of_compute():
    found = isoflop(iso_rows(0.15), bootstraps=0)
    assert len(found.parabolas) == 3 and not found.refused
    for parabola in found.parabolas:
        assert parabola.best == pytest.approx(0.15 * parabola.compute**0.5, rel=0.01)
    assert found.size_law.alpha == pytest.approx(-0.5, abs=0.01)


def test_a_minimum_at_the_edge_is_refused():
    found = isoflop(iso_rows(100.0), bootstraps=0)
    assert not found.parabolas and "the minimum is at the largest of 7 sizes" in found.refused[0]


def test_the_published_lines_are_those_of_the_paper(tmp_path):
    """d16 after 200 epochs: N = 0.302 billion, 2.3e5 PFLOP; both namings of the lines against compute."""
    floor, laws = plot.PUBLISHED["val_loss", "params_main"]
    ((factor, alpha),) = laws.values()
    assert floor + (factor * 0.302) ** -alpha == pytest.approx(6.058, abs=1e-3)
    text, legend = plot.PUBLISHED["val_loss", "flops_exact"][1].values()
    assert (text, legend) == tuple(reversed(plot.PUBLISHED["val_loss_last", "flops_exact"][1].values()))
    make_runs(tmp_path / "sweep")
    scale(tmp_path, tmp_path / "sweep", "published=true")
    drawn = (tmp_path / "fit/scaling.svg").read_text()
    assert drawn.count("published, ImageNet 256") == 2 and drawn.count("published (figure 6)") == 2


def test_a_run_that_learns_its_images_by_heart_is_told_from_where_on(tmp_path, capsys):
    make_runs(tmp_path / "sweep", unique_images=10_000)
    file = tmp_path / "sweep/d1-38400/metrics.csv"
    header, first, last = (line.split(",") for line in file.read_text().splitlines())
    first[2] = str(float(first[2]) * 0.95)  # validation loss half way
    last[1] = str(float(last[2]) * 0.9)  # training loss at the end
    file.write_text("\n".join(",".join(line) for line in (header, first, last)) + "\n")
    scale(tmp_path, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert (
        "d1-38400: validation loss was lowest" in printed
        and "19,200 images (1.92 passes) and ended 5.3 % higher" in printed
    )
    assert "d1-38400: train and validation loss diverge after 38,400 images (3.84 passes)" in printed
    assert "ends 11.1 % above training loss" in printed
    assert "d2-38400: " not in printed


def test_the_spread_of_seeds_is_told_apart_from_that_of_the_law():
    rows = [make_row(depth, val_loss=loss, seed=seed) for depth in (1, 2) for seed, loss in enumerate((3.0, 3.03))]
    assert seed_noise(rows) == pytest.approx(np.log(1.01) / np.sqrt(2))
    assert seed_noise(rows[::2]) is None
    law = ParametricLaw(CHINCHILLA, 0.3, 1.0, 0.3, 1.0, 0.0, noise=0.1, objective=0.0)
    assert "14 times that" in lack_of_fit(rows, law)[0]
    assert lack_of_fit(rows, replace(law, noise=0.02)) == [] == lack_of_fit(rows[::2], law)

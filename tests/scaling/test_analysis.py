"""Each law is fitted alone; what cannot be fitted is named, the rest is there."""

import numpy as np
import pytest
from support.coverage import TIED, branch_grid, isoflop_grid, noisy, rows_of, runs_of
from support.scaling_runs import make_row

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.parametric import Form, effective_data, evaluate
from varlab.scaling.runs import Runs


def test_a_sweep_without_equal_images_has_every_law_but_that_of_size():
    """IsoFLOP, and D in proportion to N: every run saw another number of images."""
    size, images = isoflop_grid(7)
    found = analyse(runs_of(size, images, noisy(size, images, 0.002, 0)), FitSettings(bootstraps=50))
    assert (
        found.surface is not None
        and len(found.isoflop.parabolas) >= 3
        and set(found.laws) == {("val_loss", "flops_exact")}
    )
    assert "L(N): needs 4 sizes that saw equally many images (within 2 %), found 1" in found.missing
    size = np.geomspace(1e6, 1e8, 8)
    found = analyse(runs_of(size, 20 * size, noisy(size, 20 * size, 0.002, 0)), FitSettings(bootstraps=50))
    assert ("val_loss", "flops_exact") in found.laws and found.surface is None
    assert any(
        "D follows from N in these runs, so their effects cannot be told apart" in line for line in found.missing
    )


def test_free_exponents_are_used_where_tied_ones_do_not_fit():
    """Chinchilla's law, whose exponents differ: the tied form extrapolates about as well, but its residuals curve."""
    truth = np.array([0.34, np.log(406.4), 0.28, np.log(410.7), 1.69, 0.0, 0.0])
    rng = np.random.default_rng(0)
    size, images = (
        np.exp(rng.uniform(np.log(1e7), np.log(1e10), 240)),
        np.exp(rng.uniform(np.log(1e8), np.log(3e11), 240)),
    )
    loss = evaluate(truth, size, images) * np.exp(rng.normal(0, 0.005, 240))
    surface = analyse(runs_of(size, images, loss), FitSettings(bootstraps=100)).surface
    assert surface.law.form.exponents == "free" and not surface.lack_of_fit
    low, high = surface.law.intervals()["beta"]
    assert low < 0.28 < high


def test_losses_of_any_size_have_a_floor():
    """Of a mean squared error, say."""
    size, images, _ = branch_grid(6)
    small, large = (
        analyse(
            runs_of(size, images, unit * noisy(size, images, 0.001, 0, truth=TIED)), FitSettings(bootstraps=0)
        ).surface.law
        for unit in (1e-4, 1.0)
    )
    assert small.floor == pytest.approx(1e-4 * large.floor, rel=0.01) and small.alpha == pytest.approx(
        large.alpha, abs=1e-3
    )


def test_equal_losses_and_a_floor_above_all_are_told(tmp_path):
    size, images, _ = branch_grid(5)
    found = analyse(runs_of(size, images, np.full(20, 3.0)), FitSettings(bootstraps=20))
    assert found.floors == {} and found.laws["val_loss", "params_main"].alpha == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="floor=5 is not below all losses: the smallest is 3"):
        analyse(runs_of(size, images, np.full(20, 3.0)), FitSettings(floor=5.0))


def test_two_sizes_that_saw_equally_many_images_by_chance_are_no_law():
    size = np.array([1e6, 3e6, 1e7, 3e7, 1e8])
    images = np.array([1e7, 1.01e7, 4e7, 8e7, 2e8])
    found = analyse(runs_of(size, images, noisy(size, images, 0.001, 0)), FitSettings(bootstraps=20))
    assert found.fixed == [] and ("val_loss", "params_main") not in found.laws and "found 2" in found.missing[-1]


def test_a_metric_that_some_runs_lack_costs_these_runs_and_no_other_law():
    rows = [make_row(depth) for depth in (1, 2, 3, 4, 5)]
    rows[1]["val_err"], rows[2]["val_loss_scale_00"] = float("nan"), None
    found = analyse(Runs(rows, [], []), FitSettings(floor=0.0, bootstraps=20))
    assert (
        found.laws["val_err", "params_main"].num_points == 4 and found.laws["val_loss", "params_main"].num_points == 5
    )
    assert found.laws["val_loss_scale_00", "params_main"].num_points == 4
    assert "val_err: 1 of 5 runs have no usable value of it" in found.missing


@pytest.mark.parametrize(("inside", "last"), [(True, 1.0), (False, 1.02)])
def test_the_extrapolation_says_whether_the_largest_run_lies_inside_its_interval(inside, last):
    size = np.geomspace(1e6, 1e8, 7)
    loss = noisy(size, np.full(7, 1e9), 0.001, 1)
    loss[-1] *= last
    found = analyse(runs_of(size, np.full(7, 1e9), loss), FitSettings(floor=2.0, bootstraps=200, outliers="keep"))
    assert found.extrapolation["inside"] is inside


def test_the_constant_of_repeated_images_is_fitted_given_or_named_as_unknown():
    size, images, _ = branch_grid(6)
    unique = np.where(np.arange(len(size)) % 2, 2e6, 1e9)
    loss = evaluate(TIED, size, effective_data(images, unique, 8.0))
    rows = [{**row, "unique_images": float(one)} for row, one in zip(rows_of(size, images, loss), unique, strict=True)]
    found = analyse(Runs(rows, [], []), FitSettings(repeated=True, form=Form("tied"), bootstraps=0))
    assert found.surface.repeat_decay == pytest.approx(8.0, rel=0.05)
    assert found.surface.law.alpha == pytest.approx(0.34, abs=0.01)
    given = analyse(Runs(rows, [], []), FitSettings(repeated=15.0, bootstraps=0))
    assert given.surface.repeat_decay == 15.0 and given.surface.effective(1e9, 1e6) == pytest.approx(16e6, rel=1e-3)
    fresh = [{**row, "unique_images": 1e12} for row in rows]
    unknown = analyse(Runs(fresh, [], []), FitSettings(repeated=True, bootstraps=0))
    assert unknown.surface is None and any("give it as in repeated=15" in line for line in unknown.missing)


def test_points_of_constant_curves_are_fitted_on_demand():
    """The run that they belong to is drawn as a whole."""
    size, images, _ = branch_grid(5)
    rows = rows_of(size, images, noisy(size, images, 0.001, 0, truth=TIED), schedule="constant")
    curves = [
        {"run_id": row["run_id"], "images": share * row["images_seen"], "flops_exact": share * row["flops_exact"],
         "val_loss": float(evaluate(TIED, row["params_main"], share * row["images_seen"]))}
        for row in rows for share in (0.3, 0.6)
    ]  # fmt: skip
    ends, all_of_it = (
        analyse(Runs(rows, curves, []), FitSettings(bootstraps=30, intermediate=given)) for given in (False, True)
    )
    assert len(ends.surface.points) == 20 and len(all_of_it.surface.points) == 60
    assert all_of_it.surface.law.alpha == pytest.approx(0.34, abs=0.02)


def test_an_interaction_is_offered_where_the_additive_form_does_not_fit():
    truth = np.array([0.3, 0.3 * np.log(1e6), 0.1, 0.1 * np.log(3e5), 2.0, 1.2, 0.07])
    size, images, runs = branch_grid(7)
    found = analyse(runs_of(size, images, noisy(size, images, 0.001, 0, truth=truth), runs), FitSettings(bootstraps=0))
    surface = found.surface
    assert surface.lack_of_fit and surface.interaction.noise < 0.5 * surface.law.noise
    assert {held.form.exponents for held in surface.held_out} == {"tied", "free", "interaction"}

"""A normal run is called normal, another one not, with the step from which and a reason."""

import csv

import numpy as np
import pytest
from support.scaling_runs import noisy_run

from varlab.training.reference_curves import (
    band,
    compare_to_bands,
    read_band,
    reason,
    references,
    report,
    smooth,
    write_band,
)


@pytest.fixture
def bands():
    return band([noisy_run(seed) for seed in range(3)])


def test_most_runs_of_the_same_kind_lie_in_the_band():
    """Five fresh runs for each of 30 bands of three runs, both metrics."""
    comparisons = []
    for first in range(0, 240, 8):
        bands = band([noisy_run(first + i) for i in range(3)])
        comparisons += [comparison for i in range(3, 8) for comparison in compare_to_bands(noisy_run(first + i), bands)]
    assert sum(comparison.is_normal for comparison in comparisons) / len(comparisons) > 0.9


def test_a_run_that_leaves_the_band_is_named_with_side_step_and_reason(bands):
    (loss,) = [v for v in compare_to_bands(noisy_run(7, offset=0.5, from_step=1000), bands) if not v.is_normal]
    assert (loss.metric, loss.side) == ("train/loss", "above")
    assert loss.first_outside == pytest.approx(1000, abs=60) and 0.4 < loss.share_inside < 0.6
    assert "learning rate" in reason(loss)
    (loss,) = [v for v in compare_to_bands(noisy_run(8, offset=-0.5), bands) if v.metric == "train/loss"]
    assert loss.side == "below" and loss.share_inside < 0.05 and "easier task" in reason(loss)


def test_a_loss_that_is_not_a_number_is_out_of_band(bands):
    broken = noisy_run(3)
    broken["train/loss"] = {step: value if step < 500 else np.nan for step, value in broken["train/loss"].items()}
    assert [v.metric for v in compare_to_bands(broken, bands) if not v.is_normal] == ["train/loss"]


def test_smoothing_keeps_a_straight_line():
    steps, values = smooth({i: 2.0 * i for i in range(0, 100, 5)})
    np.testing.assert_allclose(values[4:-4], 2 * steps[4:-4])
    assert len(smooth({3: 1.0})[1]) == 1


def test_a_reference_survives_its_file(tmp_path, bands):
    write_band(tmp_path / "some.csv", bands, {"seeds": [0, 1, 2]})
    read = read_band(tmp_path / "some.csv")
    assert read.keys() == bands.keys()
    np.testing.assert_allclose(read["train/loss"].high, bands["train/loss"].high, rtol=1e-4)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv is not a reference: its columns are \['a', 'b'\]"):
        read_band(tmp_path / "other.csv")


def test_the_shipped_references_are_whole():
    found = sorted(references().glob("*.csv"))
    assert {file.stem for file in found} >= {"tokenizer_tiny", "var_digits"}
    for file in found:
        for metric, lies in read_band(file).items():
            assert (lies.low <= lies.mean).all() and (lies.mean <= lies.high).all(), (file, metric)
            assert (np.diff(lies.steps) > 0).all() or len(lies.steps) == 1


def test_an_imagenet_run_is_held_against_published_facts_marked_as_such(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/hydra.yaml").write_text("hydra: {runtime: {choices: {experiment: var_d16}}}\n")
    with open(tmp_path / "metrics.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "val/loss", "val/err"], [1000, 6.0, 95.0], [2000, 5.5, 80.0]])
    said = report(tmp_path)
    assert "there is no reference run; published" in said and "issue 143" in said
    assert "out of band: val/err, below from step 2000" in said and "in band: 1 of 2" in said

"""Two recipes at equal compute."""

import re

import numpy as np
import pytest
from support.coverage import NUM_SIZES

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.parametric import Form
from varlab.scaling.recipes import multiplier, paired
from varlab.scaling.runs import Runs


def two(num_sizes, noise, gain, seed, is_paired=True, cost=1.0):
    """Runs of recipe a, whose compute counts `gain` times, and of b; half of a run's noise belongs to its seed."""
    rng = np.random.default_rng(seed)
    shared, found = rng.standard_normal(num_sizes), []
    for recipe, worth in enumerate((gain, 1.0)):
        rows = []
        for i, size in enumerate(np.geomspace(1e6, 3e8, num_sizes)):
            compute = 6 * size * 20 * size
            own = rng.standard_normal()
            loss = (2 + (1e19 / (compute * worth)) ** 0.15) * np.exp(noise * np.sqrt(0.5) * (shared[i] + own))
            row = {"run_id": f"{i}", "name": f"{i}", "params_main": float(size), "images_seen": 20.0 * size}
            row |= {"flops_exact": compute * (cost if recipe == 0 else 1), "val_loss": float(loss)}
            rows.append({**row, "seed": 0 if is_paired else recipe})
        found.append(
            analyse(Runs(rows, [], []), FitSettings(bootstraps=200, seed=seed, form=Form("tied"), outliers="keep"))
        )
    return found


@pytest.mark.parametrize("is_paired", [True, False])
def test_an_exact_gain_is_found(is_paired):
    """Also where the recipe costs 10 % more FLOPs: the multiplier is at equal compute."""
    assert multiplier(*two(6, 0.0, 1.5, 0, is_paired)).value == pytest.approx(1.5, rel=1e-3)
    assert multiplier(*two(6, 0.0, 1.5, 0, is_paired, cost=1.1)).value == pytest.approx(1.5 / 1.1, rel=1e-3)


def test_a_gain_of_any_size_is_found():
    """The search begins where the losses meet."""
    assert multiplier(*two(8, 0.0, 1e4, 0, is_paired=False)).value == pytest.approx(1e4, rel=1e-2)


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES)
@pytest.mark.parametrize("is_paired", [True, False])
def test_the_interval_holds_the_gain_as_often_as_it_says(num_sizes, noise, is_paired):
    held = 0
    for seed in range(60):
        found = multiplier(*two(num_sizes, noise, 1.5, seed, is_paired))
        assert found.is_paired == is_paired
        held += found.interval[0] <= 1.5 <= found.interval[1]
    assert held >= 51


def test_pairs_say_more_than_the_same_runs_apart():
    widths = [np.ptp(multiplier(*two(16, 0.003, 1.5, 3, is_paired)).interval) for is_paired in (True, False)]
    assert widths[0] < 0.9 * widths[1]
    found = multiplier(*two(16, 0.003, 1.5, 3))
    assert len(found.by_pair) == 16 and np.median([gain for _, gain in found.by_pair]) == pytest.approx(1.5, rel=0.05)


def test_seeds_of_a_size_are_averaged_before_pairs_are_compared():
    """Instead of the luckiest seed standing for its size."""
    rows = {
        name: [
            {"run_id": f"{i}-{seed}", "name": f"{i}-{seed}", "params_main": 10.0**i, "images_seen": 1e9, "flops_exact": 6e9 * 10.0**i,
             "val_loss": 2 + 3 * 0.8**i * off, "seed": seed}
            for i in range(5) for seed, off in ((0, first), (1, second))
        ]
        for name, first, second in (("a", 1.2, 1.0), ("b", 1.1, 1.1))
    }  # fmt: skip
    found = paired(rows["a"], rows["b"], "val_loss")
    assert len(found) == 5
    for i, (one, two_) in enumerate(found):
        assert one["val_loss"] == pytest.approx(np.sqrt((2 + 3.6 * 0.8**i) * (2 + 3 * 0.8**i)))
        assert two_["val_loss"] == pytest.approx(2 + 3.3 * 0.8**i)


def test_losses_of_different_tokenizers_or_data_are_not_compared():
    a, b = two(6, 0.001, 1.5, 0)
    for key in ("tokenizer_id", "dataset_id", "patch_nums"):
        other = Runs([{**row, key: "another"} for row in b.runs.rows], [], [])
        with pytest.raises(ValueError, match=f"runs of different {key}"):
            multiplier(a, analyse(other, b.settings))
    tokens = Runs(b.runs.rows, [], [], counts="tokens")
    with pytest.raises(ValueError, match="D counts images in a and tokens in b"):
        multiplier(a, analyse(tokens, b.settings))


def test_the_result_is_one_sentence():
    better, same, worse = (multiplier(*two(8, 0.001, gain, 1)) for gain in (1.5, 1.0, 0.7))
    found = re.match(
        r"At equal loss, plain needs ([\d.]+) times the compute of idea \(95 %: ", better.sentence("idea", "plain")
    )
    assert float(found[1]) == pytest.approx(1.5, rel=0.02)
    assert better.sentence("idea", "plain").endswith("8 pairs of runs): idea is better at equal compute.")
    assert "not shown to differ" in same.sentence("idea", "plain") and "idea is worse" in worse.sentence(
        "idea", "plain"
    )
    assert "too few for an interval" in multiplier(*two(3, 0.001, 1.5, 1)).sentence("idea", "plain")
    with pytest.raises(ValueError, match=r"no loss in common \(a: 2.9.* b: 8"):
        a, b = two(6, 0.001, 1.5, 1)
        worse = Runs([{**row, "val_loss": row["val_loss"] * 3} for row in b.runs.rows], [], [])
        multiplier(a, analyse(worse, b.settings))
    with pytest.raises(ValueError, match="needs at least 3 runs on each frontier"):
        multiplier(*two(2, 0.001, 1.5, 1))

"""Which point of a grid is best, how sure that is, and which points are on the front."""

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from varlab.evaluation.sampling_grid import evaluate_grid, front, plot, stability


def test_the_front_are_the_points_that_no_other_beats_in_both():
    coordinates = np.array([[0.1, 0.9], [0.5, 0.5], [0.4, 0.5], [0.9, 0.1], [0.5, 0.5]])
    assert front(coordinates).tolist() == [True, True, False, True, True]


def test_stability_counts_how_often_a_point_is_lowest_and_what_could_be_as_good():
    random = np.random.default_rng(0)
    common = random.normal(0, 5, 200)  # of the real images: the same for all points
    resampled = np.array([10, 10.3, 14])[:, None] + common + random.normal(0, 0.5, (3, 200))
    lowest, not_worse = stability(np.array([10, 10.3, 14]), resampled)
    assert lowest.sum() == 1 and 0.5 < lowest[0] < 0.9 and lowest[2] == 0
    assert not_worse.tolist() == [True, True, False]


def test_a_point_is_clearly_worse_in_one_of_twenty_cases_by_chance():
    """Two points of equal truth: in 300 repetitions, the interval of their difference misses 0 about 15 times."""
    random, missed = np.random.default_rng(0), 0
    for _ in range(300):
        measured = random.normal(10, 1, 2)
        resampled = measured[:, None] + random.normal(0, 1, (2, 100))
        missed += not stability(measured, resampled)[1].all()
    assert 5 <= missed <= 30


def scored(distance: float, seed: int, bootstraps: int = 50) -> dict:
    noise = np.random.default_rng(seed).normal(0, 0.1, bootstraps)
    return {
        "frechet_distance/net": distance, "frechet_distance/net/low": distance - 1, "frechet_distance/net/high": distance + 1,
        "precision/net": distance / 20, "recall/net": 1 - distance / 20,
        "resampled_distances": (distance + noise).tolist(), "warnings": [],
    }  # fmt: skip


def test_the_best_point_is_told_with_how_sure_it_is(tmp_path):
    found = {"0": scored(9.0, 0), "1": scored(6.0, 1), "2": scored(6.01, 2)}
    sampled = []

    def sample(folder, point):
        folder.mkdir()
        sampled.append(point)
        made[folder] = found[f"{point['cfg_scale']:g}"]

    made = {}
    points = {"cfg_scale": [0.0, 1.0, 2.0], "top_k": [0], "top_p": [0.0]}
    text = evaluate_grid(points, sample, made.get, tmp_path)
    assert text.startswith("lowest frechet_distance/net 6 at cfg_scale=1, top_k=0, top_p=0, in ")
    assert text.endswith("% of resamplings; not clearly worse: cfg_scale=2, top_k=0, top_p=0")
    rows = list(csv.DictReader((tmp_path / "grid.csv").open()))
    assert [row["on_front"] for row in rows] == ["True"] * 3
    assert [row["not_worse"] for row in rows] == ["False", "True", "True"]
    assert sum(float(row["lowest"]) for row in rows) == pytest.approx(1) and float(rows[0]["lowest"]) == 0
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG" and len(sampled) == 3


def test_ranks_but_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    points = {"cfg_scale": [0.0], "top_k": [0], "top_p": [0.0]}
    assert evaluate_grid(points, lambda *_: None, lambda _: None, tmp_path) == "" and not list(tmp_path.iterdir())


def test_a_grid_without_points_or_distances_is_refused(tmp_path):
    points = {"cfg_scale": [0.0], "top_k": [0], "top_p": [0.0]}
    with pytest.raises(ValueError, match="give at least one value"):
        evaluate_grid({**points, "top_k": []}, lambda *_: None, lambda _: {}, tmp_path)
    with pytest.raises(ValueError, match="need at least 2 images"):
        evaluate_grid(points, lambda *_: None, lambda _: {"density/net": 1.0}, tmp_path)


def test_stability_uses_the_measured_distances_not_the_biased_ones():
    """Resampling raises distances; a point whose distance is raised more is not worse for that."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 100))
    resampled = np.array([[10.0], [12.0]]) + noise
    assert stability(np.array([10.0, 10.0 + 1e-6]), resampled)[1][1]
    assert not stability(np.array([10.0, 12.0]), resampled)[1][1]


def test_without_resamplings_nothing_is_said_about_how_sure_it_is(tmp_path):
    plain = {"fid": 3.0, "precision": 0.5, "precision/low": 0.4, "precision/high": 0.6, "recall": 0.2, "warnings": []}
    text = evaluate_grid(
        {"cfg_scale": [1.0, 2.0], "top_k": [0], "top_p": [0.0]}, lambda *_: None, lambda _: plain, tmp_path
    )
    assert text == "lowest fid 3 at cfg_scale=1, top_k=0, top_p=0"
    assert [row["on_front"] for row in csv.DictReader((tmp_path / "grid.csv").open())] == ["True", "True"]


def test_the_figure_shows_the_scores(tmp_path, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **how: saved.append(self) or save(self, *a, **how))
    rows = [
        {
            "top_k": k,
            "top_p": 0.0,
            "cfg_scale": cfg,
            "fid": k + cfg,
            "fid/real_against_real": 2.5,
            "recall": 0.1 * cfg,
            "precision": 0.5,
        }
        for k in (0, 9)
        for cfg in (3.0, 1.0)
    ]
    rows[0] |= {"precision/low": 0.4, "precision/high": 0.7}
    plot(rows, "fid", ["recall", "precision"], 1, tmp_path / "grid.png")
    left, right = saved[0].axes
    first, second, star, floor = left.lines
    assert first.get_xydata().tolist() == [[1.0, 1.0], [3.0, 3.0]] and second.get_ydata().tolist() == [10.0, 12.0]
    assert star.get_xydata().tolist() == [[1.0, 1.0]]
    assert list(floor.get_ydata()) == [2.5, 2.5] and floor.get_linestyle() == "--"
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[0.1, 0.5], [0.3, 0.5]])
    bars = [segment for collection in right.collections for segment in collection.get_segments()]
    assert any(len(segment) and np.allclose(segment, [[0.3, 0.4], [0.3, 0.7]]) for segment in bars)

"""Figures of the laws."""

import itertools
import json

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.coverage import noisy, runs_of
from support.scaling_runs import make_row, make_runs, scale

from varlab.scaling import plot
from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.runs import collect


def test_the_published_lines_are_those_of_the_paper(tmp_path):
    """d16 after 200 epochs: N = 0.302 billion, 2.3e5 PFLOP; both namings of the lines against compute."""
    floor, laws = plot.PUBLISHED["val_loss", "params_main"]
    ((factor, alpha),) = laws.values()
    assert floor + (factor * 0.302) ** -alpha == pytest.approx(6.058, abs=1e-3)
    text, legend = plot.PUBLISHED["val_loss", "flops_exact"][1].values()
    assert (text, legend) == tuple(reversed(plot.PUBLISHED["val_loss_last", "flops_exact"][1].values()))
    make_runs(tmp_path / "small")
    scale(tmp_path / "small", tmp_path / "small", "published=true")
    assert "published" not in (tmp_path / "small/fit/scaling.svg").read_text()  # smaller than any published size
    make_runs(tmp_path / "sweep", depths=(6, 8, 12, 16), budgets=(10**8,), val_loss=6.5)
    file = tmp_path / "sweep/d16-100000000/run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "val_loss": 5.9, "val_loss_last": 5.2}))
    for depth, loss in ((6, 6.23), (12, 7.3)):
        row = {**make_row(depth, 10**8), "val_loss": loss, "val_loss_last": loss - 0.1}
        (tmp_path / f"sweep/d{depth}-100000000/run.json").write_text(json.dumps(row))
    scale(tmp_path, tmp_path / "sweep", "published=true", "outliers=keep")
    drawn = (tmp_path / "fit/scaling.svg").read_text()
    assert drawn.count("published, ImageNet 256") == 2 and drawn.count("published (figure 6)") == 2


def test_axes_are_those_of_the_runs_and_labels_do_not_overlap(tmp_path):
    """Bands and published lines do not stretch them; every text lies inside of the figure and beside the others."""
    make_runs(tmp_path / "sweep", depths=(6, 8, 12, 16), budgets=(10**8, 5 * 10**7, 2 * 10**7), noise=0.002)
    analysis = analyse(collect([str(tmp_path / "sweep")]), FitSettings(bootstraps=50))
    with matplotlib.rc_context(plot.STYLE):
        for draw in (
            lambda one: plot.scaling_panels(one, is_published_shown=True),
            plot.scales_panels,
            plot.surface_panels,
        ):
            figure = plot.tidy(draw(analysis))
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            assert figure.get_size_inches()[0] == plot.WIDTH
            for panel in figure.axes:
                for axis in (panel.xaxis, panel.yaxis):
                    boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
                    inside = [box for box in boxes if figure.bbox.x0 <= box.x1 and box.x0 <= figure.bbox.x1]
                    assert not any(one.overlaps(two) for one, two in itertools.combinations(inside, 2))
            legends = [
                one for one in [*figure.legends, *[panel.get_legend() for panel in figure.axes]] if one is not None
            ]
            for legend in legends:
                box = legend.get_window_extent()
                assert (
                    figure.bbox.x0 <= box.x0
                    and box.x1 <= figure.bbox.x1
                    and figure.bbox.y0 <= box.y0
                    and box.y1 <= figure.bbox.y1
                )
    losses = [row["val_loss"] for row in analysis.fixed]
    low, high = plot.scaling_panels(analysis, is_published_shown=True).axes[0].get_ylim()
    assert low > min(losses) - 0.2 * np.ptp(losses) and high < max(losses) + 0.2 * np.ptp(losses)


def test_many_sizes_are_drawn_and_a_few_of_them_named(tmp_path):
    rng = np.random.default_rng(0)
    size, images = np.exp(rng.uniform(14, 20, 120)), np.exp(rng.uniform(16, 22, 120))
    analysis = analyse(runs_of(size, images, noisy(size, images, 0.003, 0)), FitSettings(bootstraps=0))
    with matplotlib.rc_context(plot.STYLE):
        figure = plot.tidy(plot.scaling_panels(analysis))
        FigureCanvasAgg(figure).draw()
        [legend] = figure.legends
        box = legend.get_window_extent()
        assert len(legend.get_texts()) == plot.MAX_NAMES and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.axes[0].get_window_extent().height > 0.5 * figure.bbox.height
    assert plot.some(list(range(100)))[::7] == [0, 99] and plot.some([1, 2]) == [1, 2]


def test_figures_of_an_earlier_fit_do_not_stay(tmp_path):
    make_runs(tmp_path / "sweep")
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit/isoflop.png").write_bytes(b"old")
    scale(tmp_path, tmp_path / "sweep", "floor=2.5")
    assert not (tmp_path / "fit/isoflop.png").exists() and (tmp_path / "fit/floors.png").exists()


def test_a_long_curve_is_thinned():
    line = [(float(c), 1.0 / c) for c in range(1, 200001)]
    kept = plot.thinned(line)
    assert len(kept) <= plot.MAX_POINTS and kept[0] == line[0] and kept[-1] == line[-1]
    assert plot.thinned(line[:300]) == line[:300]


def test_a_figure_has_a_caption_with_the_settings_of_its_fits(tmp_path):
    make_runs(tmp_path / "sweep")
    scale(tmp_path, tmp_path / "sweep", "floor=2.5")
    captions = (tmp_path / "fit/captions.md").read_text()
    assert (
        "**scaling.** Left: runs of 38,400 images" in captions and "floor 2.5" in captions and "**floors.**" in captions
    )
    drawn = (tmp_path / "fit/scaling.svg").read_text()
    assert "error, all tokens" not in drawn and "error, all tokens" in (tmp_path / "fit/errors.svg").read_text()
    assert "**errors.** The same for the share of wrong tokens. Dashed" in captions
    assert "exponent" not in drawn and ">frontier<" in drawn  # text is text, and settings are in the caption

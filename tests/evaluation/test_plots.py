"""Figures of scores: their points are the scores."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from varlab.evaluation.plots import curve_by_scale, curves_of_grid


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: saved.append(self) or save(self, *args, **kwargs)
    )
    return saved


def test_a_panel_for_each_score_by_scale(figures, tmp_path):
    curve_by_scale({"psnr": [9.0, 12.0], "ssim": [0.1, 0.5]}, ["1x1", "2x2"], tmp_path / "scales.png")
    psnr, ssim = figures[0].axes
    assert psnr.get_title() == "PSNR (dB)" and psnr.lines[0].get_ydata().tolist() == [9.0, 12.0]
    assert ssim.get_title() == "SSIM" and ssim.lines[0].get_ydata().tolist() == [0.1, 0.5]
    assert Image.open(tmp_path / "scales.png").format == "PNG"


def test_a_line_for_each_pair_of_filters_and_the_real_images_dashed(figures, tmp_path):
    rows = [
        {"top_k": k, "top_p": 0.0, "cfg_scale": cfg, "frechet": k + cfg, "frechet/real_against_real": 2.5}
        for k in (0, 9)
        for cfg in (3.0, 1.0)
    ]
    curves_of_grid(rows, "frechet", tmp_path / "grid.png")
    first, second, floor = figures[0].axes[0].lines
    assert first.get_xydata().tolist() == [[1.0, 1.0], [3.0, 3.0]] and second.get_ydata().tolist() == [10.0, 12.0]
    assert list(floor.get_ydata()) == [2.5, 2.5] and floor.get_linestyle() == "--"

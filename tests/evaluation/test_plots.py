"""Figures of scores: their points are the scores."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from varlab.evaluation.plots import curve_by_scale


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

"""Figures of the laws."""

import pytest
from support.scaling_runs import make_runs, scale

from varlab.scaling import plot


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

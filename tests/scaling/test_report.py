"""The page of a study."""

import json
import re

import pytest
from support.coverage import isoflop_grid, noisy, runs_of
from support.scaling_runs import make_runs, scale

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.report import summary_lines
from varlab.scaling.tables import read_table


def test_a_sweep_becomes_tables_fits_figures_and_a_page(tmp_path, capsys):
    make_runs(tmp_path / "sweep", depths=(1, 2, 3, 4, 5))
    scale(tmp_path, tmp_path / "sweep", "floor=2.5")
    printed = capsys.readouterr().out
    assert "val_loss" in printed and "[paper, ImageNet 256: 0.2]" in printed
    for name in ("scaling", "errors", "scales", "floors", "extrapolation"):
        for kind in ("png", "svg", "pdf"):
            assert (tmp_path / f"fit/{name}.{kind}").stat().st_size > 1000, (name, kind)
    laws = {(law["y"], law["x"]): law for law in json.loads((tmp_path / "fit/fits.json").read_text())["laws"]}
    assert laws["val_loss", "params_main"]["floor"] == 2.5
    page = (tmp_path / "fit/report.html").read_text()
    assert "<title>d3-38400 | depth 3 | 38,400 images" in page and "http" not in page.replace(
        "http://www.w3.org", ""
    ).replace("https://matplotlib.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and all(f'id="{name}"' in page for name in re.findall(r"url\(#([^)]*)\)", page))
    assert all(f'id="{name}"' in page for name in re.findall(r'href="#([^"]*)"', page))
    assert "How it was fitted" in page and "| Fit of L(N) and L(C) |" in (tmp_path / "fit/report.md").read_text()
    header = (tmp_path / "fit/runs.csv").read_text().splitlines()[0]
    assert header.count("[nat/token]") == 4 and "flops_exact [FLOP]" in header
    curves, _ = read_table(tmp_path / "fit/curves.csv")
    assert [point["images"] for point in curves[:2]] == [19200, 38400]
    scale(tmp_path / "csv", tmp_path / "fit/runs.csv", "floor=2.5")
    assert (tmp_path / "csv/fit/fits.json").read_text() == (tmp_path / "fit/fits.json").read_text()
    assert (tmp_path / "csv/fit/curves.csv").read_text() == (tmp_path / "fit/curves.csv").read_text()


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


def test_a_report_names_the_optimum_of_both_methods_and_what_speaks_against_a_fit():
    size, images = isoflop_grid(8)
    loss = noisy(size, images, 0.001, 0)
    lines = summary_lines(analyse(runs_of(size, images, loss), FitSettings(bootstraps=40)))
    both = [line for line in lines if line.startswith("IsoFLOP, ") and "; by L(N, D): " in line]
    assert len(both) >= 4
    for line in both:
        best, other = float(line.split("best N ")[1].split()[0]), float(line.split("by L(N, D): ")[1])
        low, _, high = line.split("(95 %: ")[1].split(")")[0].partition(" to ")
        assert float(low) < best < float(high) and other == pytest.approx(best, rel=0.3)
    assert any(line.startswith("IsoFLOP: best N grows as C^0.4") and "(95 %: " in line for line in lines)
    loss[4] *= 1.1
    told = summary_lines(analyse(runs_of(size, images, loss), FitSettings(bootstraps=0)))
    assert told[1].startswith("outlier, left out: r4, its loss is +")
    assert (
        "outlier, kept: r4"
        in summary_lines(analyse(runs_of(size, images, loss), FitSettings(bootstraps=0, outliers="keep")))[1]
    )

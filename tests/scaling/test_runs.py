"""Which runs are fitted together."""

import pytest
from hypothesis import given
from support.fuzz import FUZZ, damaged, forged, is_read_or_refused, write
from support.scaling_runs import make_row, make_runs, scale

from varlab.scaling.runs import collect


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
    assert len(runs.rows) == 3 and "left out, val_loss is nan" in runs.left_out[0]


def test_raster_networks_are_fitted_by_themselves(tmp_path):
    make_runs(tmp_path / "sweep", order="raster")
    assert [row["depth"] for row in collect([str(tmp_path / "sweep")]).rows] == [2, 3, 4]
    assert [row["depth"] for row in collect([str(tmp_path / "sweep")], order="raster").rows] == [1]


def test_several_sources_make_one_table_each_run_once(tmp_path):
    make_runs(tmp_path / "a", depths=(1, 2))
    make_runs(tmp_path / "b", depths=(2, 3, 4))
    runs = collect([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [row["depth"] for row in runs.rows] == [1, 2, 3, 4] and len(runs.curves) == 8
    with pytest.raises(ValueError, match="nowhere: there is no such file or folder"):
        collect([str(tmp_path / "a"), str(tmp_path / "nowhere")])


TABLE = ("name,kind,state,step,depth,params_main,images_seen,flops_exact [FLOP],val_loss [nat/token]\n" + "".join(
    f"d{depth},var,finished,10,{depth},{depth * 10**6},1000,1e12,{4 - depth / 10}\n" for depth in (1, 2, 3)
)).encode()  # fmt: skip


@FUZZ
@given(content=damaged(TABLE))
def test_damaged_tables(content, tmp_path):
    (tmp_path / "runs.csv").write_bytes(content)
    assert is_read_or_refused(lambda: collect([str(tmp_path / "runs.csv")]), tmp_path / "runs.csv")


@FUZZ
@given(row=forged(make_row(2)))
def test_forged_rows(row, tmp_path):
    if not (tmp_path / "sweep").is_dir():
        make_runs(tmp_path / "sweep", depths=(1, 2))
    write(tmp_path / "sweep/d2-38400/run.json", row)
    try:
        assert len(collect([str(tmp_path / "sweep")]).rows) <= 2
    except ValueError as error:  # also: runs of different tokenizers
        assert len(str(error).splitlines()) == 1


LOG = b"step,val/loss,val/loss_last,count/images_seen\n1,3.0,3.1,100\n2,2.9,3.0,200\n"


@FUZZ
@given(content=damaged(LOG))
def test_damaged_logs(content, tmp_path):
    if not (tmp_path / "sweep").is_dir():
        make_runs(tmp_path / "sweep", depths=(1, 2))
    (tmp_path / "sweep/d2-38400/metrics.csv").write_bytes(content)
    assert is_read_or_refused(lambda: collect([str(tmp_path / "sweep")]), tmp_path / "sweep/d2-38400/metrics.csv")

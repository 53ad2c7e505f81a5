"""Tables of runs that somebody else wrote."""

import math

import pytest
from support.coverage import TIED, branch_grid, noisy
from support.scaling_runs import make_row

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.runs import collect
from varlab.scaling.tables import factor_of, read_runs, read_table, unit, write_csv

COLUMNS = {"params": "N", "tokens": "D", "loss": "L"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_table_survives_a_round_trip(tmp_path):
    rows = [
        {
            "run_id": "00012e34",
            "name": "a",
            "val_loss": 1.5,
            "patch_nums": [1, 2],
            "git_commit": None,
            "sizes": {"a": 1},
        }
    ]
    write_csv(rows, tmp_path / "runs.csv")
    assert read_table(tmp_path / "runs.csv")[0] == rows


def test_a_value_that_a_step_lacks_is_no_text(tmp_path):
    """Steps between validations have a training loss only."""
    write_csv([{"run_id": "a", "step": 1, "train_loss": 2.0, "val_loss": None, "lr": None}], tmp_path / "curves.csv")
    assert read_table(tmp_path / "curves.csv")[0][0].get("val_loss") is None


def test_a_table_of_somebody_else_is_fitted(tmp_path):
    """Three columns with names of their own; compute is 6 N D, D counts tokens, nobody says depth or state."""
    size, images, _ = branch_grid(6)
    loss = noisy(size, images, 0.001, 0, truth=TIED)
    lines = [f"{n},{d},{y}" for n, d, y in zip(size, images, loss, strict=True)]
    file = write(tmp_path / "theirs.csv", "params,tokens,loss\n" + "\n".join(lines) + "\n")
    runs = collect([str(file)], columns=COLUMNS)
    assert runs.counts == "tokens" and runs.notes == ["C is 6 N D where the table has no flops_exact"]
    assert runs.rows[0]["flops_exact"] == pytest.approx(6 * size[0] * images.min())
    assert analyse(runs, FitSettings(bootstraps=0)).surface.law.alpha == pytest.approx(0.34, abs=0.02)


def test_a_table_without_data_but_with_compute_has_them_by_six_n_d(tmp_path):
    """As the points that were read off Chinchilla's figure."""
    file = write(tmp_path / "theirs.csv", "Model Size,Training FLOP,loss\n1e9,6e19,3\n2e9,6e19,2.9\n")
    runs = collect([str(file)], columns={"Model Size": "N", "Training FLOP": "C", "loss": "L"})
    assert [row["images_seen"] for row in runs.rows] == pytest.approx([1e10, 5e9]) and runs.counts == "tokens"
    assert runs.notes == ["D is C / (6 N) where the table has no images_seen"]


def test_one_check_names_every_column_that_is_missing_or_unusable(tmp_path):
    file = write(tmp_path / "theirs.csv", "params [stones],tokens,bpb\n1,2,3\n")
    with pytest.raises(ValueError, match=r"theirs.csv: ") as told:
        read_runs(file, {"params": "N", "loss": "L"})
    said = str(told.value)
    assert "columns=loss: there is no such column" in said and "params [stones]: [stones] is no unit of it" in said
    assert "no column for D (images_seen) or C (flops_exact)" in said and "no column for L (val_loss)" in said
    assert (
        "the columns are params [stones], tokens, bpb: name them, without their units, as in columns={params: N, tokens: D, loss: L}"
        in said
    )


@pytest.mark.parametrize(
    ("column", "given", "factor"),
    [
        ("val_loss", "nat/token", 1.0), ("val_loss", "bits", math.log(2)), ("val_err", "fraction", 100.0), ("params_main", "M", 1e6),
        ("params_main", "billions", 1e9), ("images_seen", "B tokens", 1e9), ("images_seen", "1e6 images", 1e6),
        ("flops_exact", "EFLOP", 1e18), ("flops_exact", "1e21", 1e21), ("flops_exact", "PF-days", 8.64e19), ("device_seconds", "h", 3600.0),
    ],
)  # fmt: skip
def test_units_are_converted(column, given, factor):
    assert factor_of(column, given) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("column", "given"),
    [("val_loss", "bit/byte"), ("val_loss", "M"), ("params_main", "nat"), ("flops_exact", "x"), ("val_err", "1e3")],
)
def test_a_unit_that_is_none_is_refused(column, given):
    with pytest.raises(ValueError, match="is no unit of it"):
        factor_of(column, given)


def test_bits_are_not_read_as_nats(tmp_path):
    file = write(tmp_path / "theirs.csv", "N [M],D [B tokens],loss [bit]\n2,3,4\n")
    [row], counts = read_runs(file, {"N": "N", "D": "D", "loss": "L"})
    assert counts == "tokens"
    assert (row["params_main"], row["images_seen"]) == (2e6, 3e9) and row["val_loss"] == pytest.approx(4 * math.log(2))


def test_semicolons_and_decimal_commas(tmp_path):
    file = write(tmp_path / "theirs.csv", "\ufeffparams;tokens;loss\n1000000;2e9;3,25\n2000000;4e9;3,125\n")
    rows, _ = read_runs(file, COLUMNS)
    assert [row["val_loss"] for row in rows] == [3.25, 3.125] and rows[0]["params_main"] == 1000000


def test_what_pandas_writes_for_nothing_is_nothing(tmp_path):
    """nan, inf and empty cells: a run without a loss is named and left out, one without an accuracy is not."""
    file = write(
        tmp_path / "theirs.csv",
        "name,params_main,images_seen,val_loss,val_err\na,1e6,1e6,3,nan\nb,2e6,1e6,inf,50\nc,3e6,1e6,,50\nd,-4e6,1e6,2.8,50\ne,5e6,0,2.7,\n",
    )
    runs = collect([str(file)])
    assert [row["name"] for row in runs.rows] == ["a"] and "val_err" not in runs.rows[0]
    said = "\n".join(runs.left_out)
    assert "b (N 2000000.0, finished at step 0): left out, val_loss is 'inf'" in said and "c (" in said
    assert "params_main is -4000000.0" in said and "images_seen is 0" in said


def test_the_web_export_of_wandb(tmp_path):
    """Quoted cells, its own names and words for states, columns that nobody asked for."""
    header = '"Name","State","Notes","User","Tags","Created","Runtime","kind","depth","params_main","images_seen","flops_exact","val_loss"'
    lines = [
        f'"run {i}","{state}","-","me","","2026-11-24T02:18:05.000Z","100","var","{i}","{i}000000","5000","{i}e12","{5 - i / 10}"'
        for i, state in ((1, "finished"), (2, "finished"), (3, "crashed"))
    ]
    runs = collect([str(write(tmp_path / "wandb_export.csv", "\n".join([header, *lines])))])
    assert [row["name"] for row in runs.rows] == ["run 1", "run 2"] and runs.rows[1]["val_loss"] == 4.8
    assert runs.left_out == ["run 3 (depth 3, failed at step 0): left out (unfinished=use uses it)"]
    assert len(collect([str(tmp_path / "wandb_export.csv")], use_unfinished=True).rows) == 3


def test_a_named_column_is_used_instead_of_one_of_our_name(tmp_path):
    file = write(tmp_path / "theirs.csv", "params_main,images_seen,eval,val_loss\n1e6,1e9,3,4\n")
    assert read_runs(file, {"eval": "L"})[0][0]["val_loss"] == 3.0
    with pytest.raises(ValueError, match="columns=FLOPS: there is no such column"):
        read_runs(file, {"eval": "L", "FLOPS": "C"})


def test_thousands_separators_are_not_read_as_decimals(tmp_path):
    file = write(tmp_path / "theirs.csv", 'params,tokens,loss\n"1,100",1e9,3\n316,1e9,2.9\n10M,1e9,2.8\n')
    runs = collect([str(file)], columns=COLUMNS)
    assert (
        len(runs.rows) == 1
        and runs.left_out[0].endswith("left out, params_main is '1,100'")
        and "'10M'" in runs.left_out[1]
    )


def test_units_in_parentheses(tmp_path):
    file = write(tmp_path / "theirs.csv", "params (B),tokens (B),loss (nats),acc (top 1)\n1,20,3,50\n")
    rows, counts = read_runs(file, COLUMNS)
    assert (
        rows[0]["params_main"] == 1e9
        and rows[0]["images_seen"] == 2e10
        and counts == "tokens"
        and rows[0]["acc (top 1)"] == 50
    )


def test_runs_of_one_name_or_one_id_are_still_apart(tmp_path):
    file = write(
        tmp_path / "theirs.csv",
        "name,run_id,params_main,images_seen,val_loss\nsame,x,1e6,1e9,3\nsame,x,2e6,1e9,2.9\nsame,y,3e6,1e9,2.8\n",
    )
    rows = collect([str(file)]).rows
    assert len(rows) == 3 and len({row["name"] for row in rows}) == 3 and len({row["run_id"] for row in rows}) == 3


def test_the_same_table_twice_counts_once(tmp_path):
    file = write(tmp_path / "a.csv", "params,tokens,loss\n1e6,1e9,3\n2e6,1e9,2.9\n")
    write(tmp_path / "b.csv", file.read_text())
    runs = collect([str(file), str(tmp_path / "b.csv")], columns=COLUMNS)
    assert len(runs.rows) == 2 and len(runs.left_out) == 2 and "it is there twice" in runs.left_out[0]


def test_images_and_tokens_do_not_mix(tmp_path):
    write_csv([make_row(1)], tmp_path / "ours.csv")
    theirs = write(tmp_path / "theirs.csv", "params,tokens,loss\n1e6,1e9,3\n")
    with pytest.raises(ValueError, match="D counts images in one source and tokens in another"):
        collect([str(tmp_path / "ours.csv"), str(theirs)], columns=COLUMNS)


def test_a_table_of_other_runs_needs_no_columns_of_laws(tmp_path):
    file = write(tmp_path / "runs.csv", "name,kind,state,step\nt,msvqvae,finished,10\n")
    with pytest.raises(ValueError, match="holds no VAR runs"):
        collect([str(file)])


def test_our_units():
    units = {
        "val_loss_last": "nat/token",
        "val_err": "percent",
        "entropy_marginal_scale_00": "nat",
        "flops_6nd": "FLOP",
        "batch": "images",
    }
    assert {name: unit(name) for name in [*units, "params_main", "name"]} == {**units, "params_main": "", "name": ""}

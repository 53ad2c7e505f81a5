"""The local log survives restarts and new columns."""

import csv

import pytest

from varlab.training.loggers import CSVLog, run_id, wandb_logger


def rows(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_of_one_step_share_a_row_and_new_columns_keep_old_rows(tmp_path):
    log = CSVLog(str(tmp_path))
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"b": 2.0}, step=1)
    log.log_metrics({"a": 3.0}, step=2)
    log.log_metrics({"c": 4.0}, step=3)
    log.finalize("success")
    assert [(row["step"], row["a"], row["b"], row["c"]) for row in rows(tmp_path)] == [
        ("1", "1.0", "2.0", ""),
        ("2", "3.0", "", ""),
        ("3", "", "", "4.0"),
    ]


def test_a_restart_appends_also_after_half_a_row(tmp_path):
    first = CSVLog(str(tmp_path))
    for step in (1, 2):
        first.log_metrics({"a": float(step)}, step=step)
    first.finalize("success")
    with open(tmp_path / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("3,17")
    second = CSVLog(str(tmp_path))
    second.log_metrics({"a": 3.0}, step=3)
    second.finalize("success")
    assert [row["a"] for row in rows(tmp_path)] == ["1.0", "2.0", None, "3.0"]


def test_a_run_keeps_its_identity(tmp_path):
    assert run_id(tmp_path) == run_id(tmp_path)
    assert run_id(tmp_path) != run_id(tmp_path / "other")


def test_wandb_stays_offline_without_a_login(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_logger(str(tmp_path), "varlab", "group")._offline
    with pytest.raises(ValueError, match="mode='sometimes'"):
        wandb_logger(str(tmp_path), "varlab", "group", mode="sometimes")

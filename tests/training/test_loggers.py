"""The local log survives restarts and new columns."""

import csv

import pytest
from support.runs import SHORT, TOKENIZER, fit

from varlab.training.loggers import CSVLog, MLflowLog, run_id, wandb_logger


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


def test_a_run_that_continues_is_one_run_of_mlflow(tmp_path, digits_folder, monkeypatch):
    from mlflow.tracking import MlflowClient

    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    settings = [setting for setting in SHORT if not setting.startswith(("logger=", "steps="))]
    for steps in (4, 6):
        fit(
            tmp_path / "run",
            *TOKENIZER,
            *settings,
            f"data.path={digits_folder}",
            "logger=mlflow",
            f"steps={steps}",
            "ckpt_path=last",
        )
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("varlab")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    history = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "train/loss")}
    logged = {int(row["step"]): float(row["train/loss"]) for row in rows(tmp_path / "run") if row["train/loss"]}
    assert len(history) == 6 and history == pytest.approx(logged)
    with pytest.raises(ValueError, match=r"has no run .*: give the tracking_uri that the run began with"):
        MLflowLog(str(tmp_path / "run"), "varlab", f"sqlite:///{tmp_path / 'other.db'}")


def test_without_mlflow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_SKINNY_AVAILABLE", False, raising=False)
    with pytest.raises(ValueError, match=r"pip install 'varlab\[mlflow\]'"):
        MLflowLog(str(tmp_path), "varlab", "sqlite:///none.db")

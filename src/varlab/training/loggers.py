"""Loggers: the CSV in the run's folder is authoritative, W&B or MLflow mirrors it."""

import csv
import os
import secrets
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from varlab.files import atomic_write, reason_of


def run_id(folder: str | Path) -> str:
    """The id of a run, stored in its folder by rank 0 so that a resumed run keeps it. An agent of a W&B sweep provides
    its own id."""
    file = Path(folder) / "run_id"
    if not file.is_file():
        if rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
            return ""  # only rank 0 logs
        with atomic_write(file) as partial:
            partial.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def has_wandb_login() -> bool:
    """Whether W&B can log in without prompting."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8"))


def wandb_logger(folder: str, project: str, group: str, mode: str = "auto") -> WandbLogger:
    """A W&B logger under the run's own id. `mode`: online, offline, or auto (offline without a login)."""
    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"logger.wandb.mode={mode!r}: choose auto, online or offline")
    is_offline = mode == "offline" or (
        mode == "auto" and (not has_wandb_login() or os.environ.get("WANDB_MODE") == "offline")
    )
    if is_offline:
        os.environ.setdefault("WANDB_SILENT", "true")  # no banner
    return WandbLogger(
        project=project,
        name=Path(folder).name,
        group=group,
        id=run_id(folder),
        save_dir=folder,
        offline=is_offline,
        resume="allow",
    )


class MLflowLog(MLFlowLogger):
    """One MLflow run per run folder: a run that continues is continued there, too."""

    def __init__(self, folder: str, experiment: str, tracking_uri: str) -> None:
        """`tracking_uri`: a server, or a database such as sqlite:///mlflow.db. Raises ValueError if MLflow is not installed."""
        file = Path(folder) / "mlflow_run_id"
        self.is_continued = file.is_file()
        known = file.read_text(encoding="utf-8").strip() if self.is_continued else None
        try:
            super().__init__(experiment, run_name=Path(folder).name, tracking_uri=tracking_uri, run_id=known)
        except ModuleNotFoundError:
            raise ValueError("logger=mlflow needs: pip install 'varlab[mlflow]'") from None
        if known is not None:
            try:
                self._mlflow_client.get_run(known)
            except Exception as error:  # MlflowException, which can be imported only where MLflow is
                raise ValueError(
                    f"{file}: MLflow at {tracking_uri} has no run {known} ({reason_of(error)}): give the tracking_uri that the run"
                    " began with, or remove the file to log to a new run"
                ) from None
        if known is None and not rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
            with atomic_write(file) as partial:
                partial.write_text(str(self.run_id), encoding="utf-8")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Those of the first start: MLflow refuses changes. run.json has the settings of each stretch of steps."""
        if not self.is_continued:
            super().log_hyperparams(params, *args, **kwargs)


class CSVLog(Logger):
    """`metrics.csv`, one row per logged step, appended to across restarts.

    A step that a resumed run repeats appears twice; readers use the later row. When a new metric appears, the file is
    rewritten with the additional column.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self.columns: list[str] = []
        self.pending: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's configuration is in `.hydra/config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.pending and self.pending["step"] != step:
            self.save()
        self.pending = {**self.pending, "step": step, "time": round(time.time(), 3), **metrics}

    @rank_zero_only
    def save(self) -> None:
        if not self.pending:
            return
        row, self.pending = self.pending, {}
        if not self.columns and self.file.is_file():
            text = self.file.read_text(encoding="utf-8")
            self.columns = next(csv.reader(text.splitlines()), [])
            if not text.endswith("\n"):  # killed while writing a row
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write("\n")
        if new := [key for key in row if key not in self.columns]:
            rows = list(csv.DictReader(self.file.open(newline=""))) if self.file.is_file() else []
            self.columns += new
            with atomic_write(self.file) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows([*rows, row])
        else:
            with open(self.file, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

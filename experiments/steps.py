"""Steps of a study: commands, whether a training run has finished, tables, intervals over seeds."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t


def varlab(*command: str) -> None:
    """Prints and runs one command."""
    print("varlab", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "varlab", *command], check=True)


def finished(folder: Path) -> bool:
    """Whether a training run reached its end."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text())["state"] == "finished"


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the columns of the first one, as CSV."""
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds (Student's t)."""
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3g} ± {half:.1g}"

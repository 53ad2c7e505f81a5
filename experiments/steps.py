"""Steps of a study: commands, and whether a training run has finished."""

import json
import subprocess
import sys
from pathlib import Path


def varlab(*command: str) -> None:
    """Prints and runs one command."""
    print("varlab", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "varlab", *command], check=True)


def finished(folder: Path) -> bool:
    """Whether a training run reached its end."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text())["state"] == "finished"

"""The files that version 0.1.0 made."""

from pathlib import Path

OLD = Path(__file__).parents[1] / "fixtures/v0.1.0"

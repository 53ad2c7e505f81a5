"""docs/logs.md lists what a run logs."""

import re
from pathlib import Path

from support.runs import fit

PAGE = Path(__file__).parents[2] / "docs/logs.md"


def documented() -> list[re.Pattern]:
    keys = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            keys += re.findall("`([^`]+)`", line.split("|")[1])
    parts = [
        re.escape(key).replace("KK", r"\d\d").replace("NAME", "[a-z0-9_]+").replace(r"\.\.\.", ".+") for key in keys
    ]
    return [re.compile(part) for part in parts]


def unknown(folder: Path) -> list[str]:
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert len(header) > 20
    return [key for key in header if not any(pattern.fullmatch(key) for pattern in documented())]


def test_every_key_of_a_tokenizer_run_is_documented(tokenizer_run):
    assert unknown(tokenizer_run) == []


def test_every_key_of_a_var_run_is_documented(tmp_path, var_overrides):
    ema = "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9, is_raw_validated: true}"
    progressive = "module.progressive={_target_: varlab.training.schedules.Progressive, share: 0.5, first_scales: 2}"
    fit(tmp_path / "run", *var_overrides, ema, progressive)
    assert unknown(tmp_path / "run") == []

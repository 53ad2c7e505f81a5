"""A class built in Python and one composed from conf/ have the same defaults."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("model", "quantizer", "module", "data", "optimizer", "schedule")
USES = ("reconstruction_losses",)  # parts of an object whose arguments are a choice of the whole


def targets(node: Any) -> Iterator[dict]:
    """All mappings below `node` that name a class of varlab."""
    if not isinstance(node, dict):
        return
    if str(node.get("_target_")).startswith("varlab."):
        yield node
    for name, value in node.items():
        if name not in USES:
            yield from targets(value)


FILES = [file for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
NAMED = [
    file for file in FILES if file.stem not in ("raster", "msvqvae_tiny", "residual_tiny") and "var_d" not in file.stem
]


def test_the_files_are_found():
    found = [node for file in NAMED for node in targets(yaml.safe_load(file.read_text()))]
    assert len(found) >= 12


@pytest.mark.parametrize("file", NAMED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_defaults_of_conf_are_those_of_the_constructor(file):
    for node in targets(yaml.safe_load(file.read_text())):
        module, _, name = node["_target_"].rpartition(".")
        parameters = inspect.signature(getattr(import_module(module), name).__init__).parameters
        for key, value in node.items():
            known = parameters.get(key)
            if (
                known is None
                or known.default is inspect.Parameter.empty
                or isinstance(value, dict)
                or "${" in str(value)
            ):
                continue
            default = list(known.default) if isinstance(known.default, tuple) else known.default
            assert (value if isinstance(value, type(default)) else type(default)(value)) == default, (key, value)

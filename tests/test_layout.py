"""The layout that docs/design.md promises: few files at the root, tests that stand alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src/varlab"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_the_root_holds_at_most_eight_files():
    assert len(list(SRC.glob("*.py"))) <= 8


def test_tests_import_nothing_from_each_other():
    for test in TESTS:
        for node in ast.walk(ast.parse(test.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[-1].startswith(("test_", "conftest")) for name in names), test


def test_processes_that_tests_start_run_this_checkout():
    script = "import varlab, support.runs; print(varlab.__file__)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert Path(answer.stdout.strip()).is_relative_to(ROOT)


def test_every_place_that_contributing_names_exists():
    rows = [
        line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ") and ".py" in line
    ]
    assert len(rows) >= 20
    for row in rows:
        for name in row.split("|")[2].replace("`", "").replace(";", ",").split(","):
            assert (SRC / name.strip()).is_file(), name


def test_every_module_has_a_test_of_its_name():
    for module in SRC.rglob("*.py"):
        test = ROOT / "tests" / module.relative_to(SRC).with_name(f"test_{module.name}")
        assert test.is_file() or module.name.startswith("__"), f"{test} is missing"


def test_text_files_are_read_and_written_as_utf_8():
    """Whatever the locale; ruff sees this only where it knows the type."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "encoding" in [keyword.arg for keyword in node.keywords], (file, node.lineno)

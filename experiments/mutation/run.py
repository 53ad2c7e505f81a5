"""Mutation testing: inserts small faults into a module one at a time; a test of that module must fail for each.

    python experiments/mutation/run.py                      all targets -> results.csv, prints survivors
    python experiments/mutation/run.py models/quantizer     one of them
    python experiments/mutation/run.py --sample 40          at most 40 mutants per module, chosen at random (seed 0)

Mutants: an arithmetic, comparison or boolean operator replaced, a number changed, a condition negated, a call of a
function with one argument replaced by the argument, an assignment or expression removed. Each runs in a forked process
on a copy of src/, with the tests that TARGETS names, until the first failure; a mutant that takes longer than five
times the tests' usual time counts as killed.
"""

import argparse
import ast
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGETS = {  # module: tests
    "models/quantizer": ["tests/models/test_quantizer.py", "tests/test_golden.py"],
    "models/var": ["tests/models/test_var.py", "tests/test_golden.py"],
    "models/transformer": [
        "tests/models/test_transformer.py",
        "tests/models/test_var.py",
        "tests/cost/test_plan.py",
        "tests/test_golden.py",
    ],
    "models/conditioning": ["tests/models/test_conditioning.py", "tests/models/test_custom_classes.py"],
    "models/losses": ["tests/models/test_losses.py", "tests/test_golden.py"],
    "models/scales": ["tests/models/test_scales.py", "tests/test_golden.py"],
    "data/order": ["tests/data/test_order.py"],
    "sampling/token_sampling": ["tests/sampling/test_token_sampling.py", "tests/test_golden.py"],
    "sampling/generate": ["tests/sampling/test_generate.py", "tests/training/test_branches.py", "tests/test_golden.py"],
    "scaling/power_law": ["tests/scaling/test_power_law.py"],
    "scaling/frontier": ["tests/scaling/test_frontier.py"],
    "scaling/parametric": ["tests/scaling/test_parametric.py"],
    "training/schedules": ["tests/training/test_schedules.py", "tests/test_golden.py"],
    "training/optimizers": ["tests/training/test_optimizers.py", "tests/test_golden.py"],
    "training/ema": ["tests/training/test_ema.py"],
}
SWAPS: dict[type, list[type]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult], ast.Lt: [ast.LtE], ast.LtE: [ast.Lt], ast.Gt: [ast.GtE], ast.GtE: [ast.Gt], ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq], ast.And: [ast.Or], ast.Or: [ast.And], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
}  # fmt: skip


def is_annotation_or_doc(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a node is part of a type annotation, a docstring, a decorator, or an error message."""
    while node in parents:
        parent = parents[node]
        if isinstance(parent, ast.AnnAssign) and node is parent.annotation:
            return True
        if isinstance(parent, ast.arg | ast.Raise | ast.JoinedStr | ast.Assert):
            return True
        if isinstance(parent, ast.FunctionDef | ast.ClassDef) and (
            node in parent.decorator_list or node is getattr(parent, "returns", None)
        ):
            return True
        node = parent
    return False


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was changed, mutated source) of each mutant of a module."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in list(ast.walk(tree)):
        if is_annotation_or_doc(node, parents):
            continue
        for what, mutate, restore in changes(node, parents):
            before = ast.unparse(node) if not isinstance(node, ast.Module) else ""
            mutate()
            try:
                yield getattr(node, "lineno", 0), f"{what}: {before.splitlines()[0][:90]}", ast.unparse(tree)
            finally:
                restore()


def changes(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple]:
    """(name, function that changes the tree, function that changes it back) of each mutation of one node."""

    def swap(target: ast.AST, name: str, new) -> tuple:
        old = getattr(target, name)
        return (lambda: setattr(target, name, new)), (lambda: setattr(target, name, old))

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        for kind in SWAPS.get(type(node.op), []):
            yield (f"{type(node.op).__name__} -> {kind.__name__}", *swap(node, "op", kind()))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for kind in SWAPS.get(type(node.ops[0]), []):
            yield (f"{type(node.ops[0]).__name__} -> {kind.__name__}", *swap(node, "ops", [kind()]))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield (f"{node.value} -> {node.value + 1}", *swap(node, "value", node.value + 1))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield (f"{node.value} -> {not node.value}", *swap(node, "value", not node.value))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield ("condition negated", *swap(node, "test", ast.UnaryOp(ast.Not(), node.test)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield ("minus removed", *swap(node, "op", ast.UAdd()))
    parent = parents.get(node)
    is_step = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if parent is not None and (is_step or isinstance(node, ast.AugAssign)):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(parent, name, None)
            if isinstance(body, list) and node in body:
                i = body.index(node)
                yield (
                    "removed",
                    lambda b=body, i=i: b.__setitem__(i, ast.Pass()),
                    lambda b=body, i=i, n=node: b.__setitem__(i, n),
                )


def run_tests(module: str, source: str | None, tests: list[str], limit: float | None) -> tuple[str, float]:
    """("killed" or "survived", seconds) of a mutant (None: the module as it is), in a forked process."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        code = 2
        try:
            for name in ("src", "tests", "conf", "docs"):
                if name == "src":
                    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    (folder / name).symlink_to(ROOT / name)
            shutil.copy(ROOT / "pyproject.toml", folder)
            if source is not None:
                (folder / f"src/varlab/{module}.py").write_text(source)
            os.chdir(folder)
            import pytest

            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-m",
                "not slow and not gpu",
                f"--rootdir={folder}",
            ]
            code = int(pytest.main([*options, *tests]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0 if code == 0 else 1)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if done:
            return ("survived" if status == 0 else "killed"), seconds
        if limit is not None and seconds > limit:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "killed", seconds
        time.sleep(0.02)


def main() -> None:
    """Runs the mutants of the chosen modules; several processes may run different modules."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", default=list(TARGETS))
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    given = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy  # noqa: F401  # once for all mutants
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    rows = []
    for module in given.modules:
        tests = [test for test in TARGETS[module] if (ROOT / test).is_file()]
        verdict, seconds = run_tests(module, None, tests, None)
        if verdict != "survived":
            sys.exit(f"{module}: its tests fail without a mutant")
        chosen = list(mutants((ROOT / f"src/varlab/{module}.py").read_text()))
        if given.sample and len(chosen) > given.sample:
            chosen = random.Random(0).sample(chosen, given.sample)
        counts = {"killed": 0, "survived": 0}
        for line, change, source in chosen:
            verdict, _ = run_tests(module, source, tests, 5 * seconds + 10)
            counts[verdict] += 1
            rows.append({"module": module, "line": line, "change": change, "verdict": verdict})
            if verdict == "survived":
                print(f"{module}:{line} survived: {change}", flush=True)
        print(f"{module}: {counts}", flush=True)
        with open(given.out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["module", "line", "change", "verdict"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

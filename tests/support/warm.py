"""Commands in processes that are forked from one that has imported torch, Lightning and Hydra: as `python -m varlab ...`, but
without the seconds that their imports take. What varlab itself does at import, each process does anew."""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    "torch", "lightning", "hydra", "omegaconf", "torchmetrics", "matplotlib.figure", "scipy.stats", "PIL.Image", "pydantic",
    "einops", "jaxtyping", "safetensors.torch", "torch.distributed.fsdp", "torch.nn.attention.flex_attention",
)  # fmt: skip


class Begin(BaseException):
    """Raised in a forked process, to leave the server's loop and run a command instead."""


def run(words: list[str], timeout: float = 300, **settings: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured text; a command `python -m varlab ...` is forked from the warm process."""
    if words[:3] != [sys.executable, "-m", "varlab"]:
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **settings)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        files = [Path(folder) / name for name in ("out", "err")]
        connection.settimeout(timeout)
        connection.connect(server())
        request = {
            "argv": words[2:],
            "cwd": str(settings.get("cwd") or os.getcwd()),
            "env": dict(settings.get("env") or os.environ),
            "files": [str(file) for file in files],
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile()
        pid = int(answers.readline())
        try:
            code = int(answers.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout) from None
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(words, code, out, err)


@cache
def server() -> str:
    """The address of the warm process, started once; it ends with this one."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    address = f"{folder.name}/socket"
    process = subprocess.Popen([sys.executable, "-m", "support.warm", address], cwd=Path(__file__).parents[1])
    atexit.register(process.kill)
    for _ in range(1200):
        if os.path.exists(address):
            return address
        time.sleep(0.1)
    raise TimeoutError("the warm process did not start")


def serve(address: str) -> NoReturn:
    """Forks a process for each request, as long as the process that started this one lives."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(8)
    os.rename(f"{address}.new", address)  # only now does it answer
    listener.settimeout(1)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            answer(connection)
        connection.close()
    sys.exit()


def answer(connection: socket.socket) -> NoReturn:
    """Starts one command, tells its number and, when it has ended, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.setblocking(True)
    request = json.loads(connection.makefile().readline())
    if (pid := os.fork()) == 0:
        connection.close()
        become(request)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(request: dict[str, Any]) -> NoReturn:
    """Takes on folder, environment, output and arguments of a command, and runs it."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    numbers = [os.open(os.devnull, os.O_RDONLY)]
    numbers += [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for file in request["files"]]
    for target, number in enumerate(numbers):
        os.dup2(number, target)
        os.close(number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = request["argv"]
    sys.path[0:1] = [request["cwd"], *request["env"].get("PYTHONPATH", "").split(os.pathsep)]
    raise Begin


def run_to_the_end(module: str) -> NoReturn:
    """Runs a module as the interpreter would, but leaves without taking down all that was imported."""
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    except Begin:
        run_to_the_end(sys.argv[0])

"""From yaml to objects: the config folder, type checks against constructors, user errors in one sentence."""

import inspect
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)
OmegaConf.register_new_resolver("max", max, replace=True)  # for conf/ and the command line
OmegaConf.register_new_resolver("mul", operator.mul, replace=True)


def conf_dir() -> str:
    """The folder `conf/`, in the installed package or at the root of the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if folder.is_dir():
            return str(folder)
    raise FileNotFoundError(f"no conf folder in {package} or {package.parents[1]}: the installation is incomplete")


def hydra_command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turns a function of the composed config into a Hydra app on `conf/<name>.yaml`.

    A user error (ValueError, OSError) is one line and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(run: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @wraps(run)
        def job(cfg: DictConfig) -> Any:
            with report_user_errors(name):
                return run(cfg)

        app = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(job)

        @wraps(run)
        def main() -> None:
            try:
                if {"-h", "--help"} & set(sys.argv[1:]):
                    print(examples(name))
                check_names(sys.argv[1:])
                sys.argv[1:] = [override_of(argument) for argument in sys.argv[1:]]
                app()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)

        return main

    return decorate


def check_names(arguments: list[str]) -> None:
    """Ends with a sentence if a name is longer than file systems allow: Hydra makes its folder before a command starts."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if (
            key in ("name", "out", "run_dir")
            and (longest := max(len(part.encode()) for part in re.split("[/,]", value))) > 240
        ):
            sys.exit(f"varlab: {key}={value[:20]}... has {longest} bytes in one file name: give a name of at most 240")


def override_of(argument: str) -> str:
    """An override whose value Hydra cannot parse, such as a path with spaces or umlauts, with its value in quotes, and a text
    always, whatever it holds; a resolution given as numbers as a setting of the data, because a word names a file of
    conf/resolution; any other argument as it is."""
    name, sign, value = argument.partition("=")
    if name == "resolution" and re.fullmatch(r"\d+|\[.*\]", value):
        return f"data.{argument}"
    if not sign or argument.startswith("-"):
        return argument
    quoted = name + "='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    is_text = name == "text" and value != "null" and value[:1] not in ("[", "'", '"')
    for candidate in (quoted,) if is_text else (argument, quoted):
        with suppress(HydraException):
            OverridesParser.create().parse_override(candidate)
            return candidate
    return argument


def argument_command(name: str, usage: str, run: Callable[[list[str]], None]) -> Callable[[], None]:
    """Turns a function of plain arguments into a command without Hydra settings. Without arguments it prints `usage`; a
    user error is one line and exit code 1."""

    def main() -> None:
        arguments = sys.argv[1:]
        if not arguments or {"-h", "--help"} & set(arguments):
            print(usage)
            return
        try:
            run(arguments)
        except (ValueError, OSError) as error:
            sys.exit(f"varlab {name}: {error}")

    return main


def is_sweep() -> bool:
    """Whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def report_user_errors(name: str) -> Iterator[None]:
    """Reports user errors in one sentence."""
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe: `varlab ... | head`
        raise SystemExit(1) from None
    except Exception as error:
        reported = reported_error(error)
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or reported is None:
            raise
        log.error("varlab %s: %s", name, one_sentence(reported))
        if is_sweep():  # the sweep runs its other jobs and fails at the end
            raise CompactHydraException(str(reported)) from None
        raise SystemExit(1) from None


def reported_error(error: BaseException) -> BaseException | None:
    """The error that a user is told: a user error, a dead or hanging process, or full memory; None for a fault of the code.

    A DataLoader raises the death of a worker in a signal handler, that is inside any code, which may wrap it in an error of
    its own (as `inspect` does). The errors behind the last one are searched for it.
    """
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    for link in chain:
        if is_lost_worker(link) or is_out_of_memory(link) or is_lost_process(link):
            return link
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    is_user_error = isinstance(error, (ValueError, OSError, OmegaConfBaseException, InstantiationException))
    return cause if is_user_error else None


def is_lost_worker(error: BaseException) -> bool:
    """Whether a data worker died or did not answer in time."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU has no memory left. By name, since the command line starts without torch."""
    return type(error).__name__ == "OutOfMemoryError"


def is_lost_process(error: BaseException) -> bool:
    """Whether another process of a distributed run ended, or did not answer in time."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Application timeout")
    is_of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return is_of_torch or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def one_sentence(error: BaseException) -> str:
    """An error's message in one line: of a data worker's traceback the last, of OmegaConf's errors with the full key."""
    if str(error).startswith("Caught "):
        return str(error).rstrip().splitlines()[-1].partition(": ")[2]
    if is_lost_worker(error):
        return (
            f"a data worker died or hangs ({str(error).splitlines()[0]}): out of memory, or a file system that stalls"
        )
    if is_out_of_memory(error):
        return (
            f"the GPU's memory is full ({str(error).splitlines()[0]}): to train, use accumulate=2, module.loss_chunks=8,"
            " module.recompute=selective or trainer=fsdp, which change no result (plan=true tells what fits); for other"
            " commands, a smaller batch_size"
        )
    if is_lost_process(error):
        return (
            f"another process of this run died or hangs ({str(error).splitlines()[0].partition('. ')[0]}): see its output;"
            " ckpt_path=last continues from the last checkpoint"
        )
    key = getattr(error, "full_key", None)
    return f"{str(error).splitlines()[0]} (setting {key})" if key else str(error)


def examples(name: str) -> str:
    """The comment at the top of a command's yaml: what it does and how to call it."""
    lines = (Path(conf_dir()) / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines)) + "\n"


def check_types(cfg: DictConfig) -> None:
    """Raises ValueError for a value whose type does not match the constructor's annotation, or for an unknown key.

    Hydra itself would pass `lr=1e-3x` as a string. Every node with a `_target_` is checked.
    """
    check_node(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), key_path="")


def check_node(node: Any, key_path: str) -> None:
    """Checks one node of the plain config and all below it."""
    from beartype.door import is_bearable

    if isinstance(node, list):
        for i, value in enumerate(node):
            check_node(value, f"{key_path}[{i}]")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        check_node(value, f"{key_path}.{key}".lstrip("."))
    if "_target_" not in node:
        return
    target = get_object(node["_target_"])
    constructor = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(constructor).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        hints = get_type_hints(constructor)
    except (NameError, TypeError):  # annotations in third-party code that exist only for a type checker
        hints = {}
    for key, value in node.items():
        if key.startswith("_") and key.endswith("_"):
            continue
        if key not in parameters and not takes_any:
            raise ValueError(
                f"{key_path}.{key}: {node['_target_']} has no such setting, only {', '.join(list(parameters)[1:])}"
            )
        is_built = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
        )
        if key in hints and not is_built and not fits(value, hints[key], is_bearable):
            if get_origin(hints[key]) is Literal:
                choices = ", ".join(str(choice) for choice in get_args(hints[key]))
                raise ValueError(f"{key_path}.{key}={value!r}: choose one of {choices}")
            expected = getattr(hints[key], "__name__", None) or str(hints[key])
            raise ValueError(
                f"{key_path}.{key}={value!r} has type {type(value).__name__}, but {node['_target_']} expects {expected}"
            )


def fits(value: Any, hint: Any, is_bearable: Callable[[Any, Any], bool]) -> bool:
    """Whether a yaml value can be used for a type: an int for a float, a list for a tuple."""
    candidates = [value]
    if isinstance(value, int) and not isinstance(value, bool):
        candidates.append(float(value))  # pyright: ignore[reportArgumentType]
    if isinstance(value, list):
        candidates.append(tuple(value))  # pyright: ignore[reportArgumentType]
        candidates.append(tuple(float(v) if isinstance(v, int) else v for v in value))  # pyright: ignore[reportArgumentType]
    return any(is_bearable(candidate, hint) for candidate in candidates)

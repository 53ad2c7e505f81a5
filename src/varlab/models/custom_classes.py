"""Networks that a checkpoint can rebuild: their classes record the arguments they were constructed with.

A custom class subclasses VAR, MSVQVAE, ResidualQuantizer, ... and takes whatever arguments it needs. `describe`
turns a network into plain values for a checkpoint, `build` turns them back into a newly initialized network.
"""

import inspect
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from varlab.files import reason_of

Network = TypeVar("Network", bound=nn.Module)
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Trust:
    """Which classes outside of varlab may be imported because a file names them: importing runs their code.

    `source`: the file that is being loaded; code inside its folder is never imported. `trust_code`: all others may be.
    `classes`: import paths that this process uses anyway.
    """

    source: str = "the checkpoint"
    trust_code: bool = False
    classes: Set[str] = frozenset()

    def check(self, path: str) -> None:
        """Raises ValueError for a class that may not be imported."""
        if path.startswith("varlab.") or path in self.classes:
            return
        if not self.trust_code:
            raise ValueError(
                f"{self.source} names the class {path}, which is not part of varlab: loading it would run its code. If you trust"
                " that code, load it with trust_code=true (in Python trust_code=True)"
            )
        package, *rest = path.split(".")[:-1] or [""]
        spec = find_spec(package) if package else None  # of a package at the top: nothing is run
        places = (
            [] if spec is None else [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
        )
        source = Path(self.source).resolve()
        own = source if source.is_dir() else source.parent
        for place in places if source.is_dir() or own != Path.cwd() else []:
            if Path(place).joinpath(*rest).resolve().is_relative_to(own):
                raise ValueError(
                    f"{self.source} names the class {path}, whose code lies in its own folder: it is not run"
                )


class RecordArguments(type):
    """Metaclass: an instance keeps the arguments of its outermost constructor, defaults included, in `arguments`.

    Raises ValueError before construction for a value that an argument's `Literal[...]` does not list.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(cls.__init__)
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])  # all but self
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
            if parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(name, ()):
                raise TypeError(
                    f"{cls.__qualname__}(*{name}): pass these arguments by name, a checkpoint stores them by name"
                )
        for name, hint in literal_hints(cls).items():
            if name in arguments and arguments[name] not in get_args(hint):
                choices = ", ".join(repr(choice) for choice in get_args(hint))
                raise ValueError(f"{name}={arguments[name]!r}: choose one of {choices}")
        instance = super().__call__(*args, **kwargs)
        instance.arguments = arguments
        return instance


def literal_hints(cls: type) -> dict[str, Any]:
    """Arguments of the constructors of a class and its bases whose type is a `Literal[...]`."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and issubclass(base, nn.Module):
            try:
                hints = get_type_hints(base.__init__)
            except (NameError, TypeError):  # annotations that exist for a type checker only
                continue
            found |= {name: hint for name, hint in hints.items() if get_origin(hint) is Literal}
    return found


class RecordedModule(nn.Module, metaclass=RecordArguments):
    """A network whose arguments a checkpoint stores.

    `changeable`: arguments that may differ between a checkpoint and the run that resumes it, because they do not change
    the shape or meaning of any weight: rates, loss weights, initialization.
    """

    arguments: dict[str, Any]
    changeable: ClassVar[frozenset[str]] = frozenset()

    def resolved(self) -> dict[str, Any]:
        """Values of arguments that were None and that the constructor derived from others."""
        return {}


def class_of(network: nn.Module) -> type:
    """The original class of a network: FSDP2 replaces it with a subclass."""
    return next(cls for cls in type(network).__mro__ if not cls.__module__.startswith("torch.distributed."))


def class_path(cls: type) -> str:
    """The name under which a class is imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(network: nn.Module) -> dict[str, Any]:
    """A network as plain values: {"class": its import path, argument: value, ...}; arguments that are networks are
    described the same way.

    Raises ValueError naming class and argument for a value that a checkpoint cannot hold.
    """
    if not isinstance(network, RecordedModule):
        raise ValueError(
            f"{class_path(type(network))} does not record its arguments, so a checkpoint cannot rebuild it: make it a subclass of"
            " varlab.models.custom_classes.RecordedModule"
        )
    arguments = {**network.arguments, **network.resolved()}
    where = class_path(class_of(network))
    return {"class": where, **{name: as_plain(value, f"{where}({name}=...)") for name, value in arguments.items()}}


def named_classes(description: Any) -> set[str]:
    """Import paths of all classes in a description."""
    if isinstance(description, list):
        return {path for entry in description for path in named_classes(entry)}
    if not isinstance(description, dict):
        return set()
    own = {description[key] for key in ("class", "partial") if isinstance(description.get(key), str)}
    return own | {path for entry in description.values() for path in named_classes(entry)}


def as_plain(value: Any, where: str) -> Any:
    """One argument as plain values."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [as_plain(entry, where) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: as_plain(entry, where) for key, entry in value.items()}
    if isinstance(value, RecordedModule):
        return describe(value)
    if isinstance(value, type):
        return {"partial": class_path(value)}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return {"partial": class_path(value.func), **as_plain(value.keywords, where)}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: pass numbers, strings, lists, a network that records its"
        " arguments, or a class"
    )


def build(base: type[Network], description: dict[str, Any], trust: Trust | None = None) -> Network:
    """The network of a description, newly initialized. Raises ValueError if its class is not part of varlab and not
    trusted, cannot be imported, or is not a subclass of `base`."""
    trust = trust or Trust()
    found = find_class(description.get("class", class_path(base)), base, trust)
    given = {name: from_plain(value, trust) for name, value in description.items() if name != "class"}
    try:
        return found(**given)
    except Exception as error:  # whatever a constructor raises for arguments that it did not expect
        raise ValueError(f"{class_path(found)} cannot be built from {trust.source}: {reason_of(error)}") from error


def rebuilt(network: Network) -> Network:
    """A newly initialized network with the classes and arguments of this one."""
    description = describe(network)
    return build(class_of(network), description, Trust(classes=named_classes(description)))


def from_plain(value: Any, trust: Trust) -> Any:
    """The inverse of `as_plain`."""
    if isinstance(value, list):
        return [from_plain(entry, trust) for entry in value]
    if not isinstance(value, dict):
        return value
    if "class" in value:
        return build(RecordedModule, value, trust)
    rest = {key: from_plain(entry, trust) for key, entry in value.items() if key != "partial"}
    return partial(find_class(value["partial"], nn.Module, trust), **rest) if "partial" in value else rest


def find_class(path: str, base: type[Network], trust: Trust) -> type[Network]:
    """The class at an import path. Raises ValueError if it is not trusted, cannot be imported, or is not a subclass of
    `base`."""
    trust.check(path)
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint holds {path}, which cannot be imported ({error}): run in the folder of its file, or add that folder to"
            " PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"the checkpoint holds {path}, which is not a subclass of {base.__name__}")
    return found

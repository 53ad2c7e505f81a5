"""Networks of your own: subclasses of VAR and MSVQVAE, which checkpoints name and loading finds again."""

from importlib import import_module
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def named(network: nn.Module, base: type) -> dict[str, str]:
    """What `sizes` says of the class, if it is not `base` itself: {"class": "module.Class"}."""
    own = type(network)
    return {} if own is base else {"class": f"{own.__module__}.{own.__qualname__}"}


def build(base: type[Network], sizes: dict[str, Any]) -> Network:
    """The network of these sizes, fresh. What `class` names must be importable and a subclass of `base`: ValueError else."""
    given = dict(sizes)
    name = given.pop("class", None)
    if name is None:
        return base(**given)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint holds a {name}, which cannot be imported ({error}): run where its file lies, or put its folder on PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"the checkpoint holds a {name}, which is no {base.__name__}")
    return found(**given)

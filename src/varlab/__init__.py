"""varlab: training, scaling and measuring visual autoregression by next-scale prediction (VAR, arXiv 2404.02905).

The names below are the public interface; they are imported on first use, so that `import varlab` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varlab.checkpoints.load import load
    from varlab.checkpoints.released_layout import load_released, to_released
    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR
    from varlab.pipeline import VARPipeline
    from varlab.sampling.editing import edit
    from varlab.sampling.generate import generate

__version__ = "0.2.0"
__all__ = ["MSVQVAE", "VAR", "VARPipeline", "edit", "generate", "load", "load_released", "to_released"]
PUBLIC = {
    "MSVQVAE": "models.msvqvae",
    "VAR": "models.var",
    "VARPipeline": "pipeline",
    "edit": "sampling.editing",
    "generate": "sampling.generate",
    "load": "checkpoints.load",
    "load_released": "checkpoints.released_layout",
    "to_released": "checkpoints.released_layout",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'varlab' has no attribute {name!r}")
    value = getattr(import_module(f"varlab.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

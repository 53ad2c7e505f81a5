"""The released VAR code for comparison: its networks with our weights. The user gives its folder; it is not part of
this project."""

import sys
from types import ModuleType
from typing import Any

import torch

from varlab.checkpoints.released_layout import to_released
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR


def make_importable(folder: str) -> None:
    """Makes the released `models` importable, without the imports of its __init__ and with a stub of the hub class."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules.setdefault("models", ModuleType("models")).__path__ = [f"{folder}/models"]
    sys.modules.setdefault("huggingface_hub", ModuleType("huggingface_hub")).PyTorchModelHubMixin = object


def released_tokenizer(folder: str, ours: MSVQVAE) -> Any:
    """The released tokenizer with our weights, on the CPU."""
    make_importable(folder)
    from models.vqvae import VQVAE  # pyright: ignore[reportMissingImports]

    theirs = VQVAE(
        vocab_size=ours.quantizer.codebook_size,
        z_channels=ours.quantizer.codebook_dim,
        ch=ours.arguments["channels"],
        share_quant_resi=4,
        v_patch_nums=tuple(ours.patch_nums),
        test_mode=True,
    )
    theirs.load_state_dict(to_released(ours), strict=False)
    return theirs.eval()


def released_var(folder: str, tokenizer: Any, ours: VAR) -> torch.nn.Module:
    """The released transformer with our weights, on the CPU; `tokenizer` is a released one."""
    make_importable(folder)
    from models.var import VAR as TheirVAR  # pyright: ignore[reportMissingImports]

    theirs = TheirVAR(
        tokenizer,
        depth=ours.depth,
        embed_dim=ours.width,
        num_heads=ours.num_heads,
        patch_nums=tuple(ours.patch_nums),
        attn_l2_norm=True,
        cond_drop_rate=0.0,
        drop_path_rate=0.0,
    )
    theirs.load_state_dict(to_released(ours), strict=True)
    return theirs.eval()

"""Conversion from and to the layout of the released weights: `vae_ch160v4096z32.pth`, `var_d{16,20,24,30,36}.pth`.

Strict in both directions: a missing or unknown key, or one with the wrong shape, is an error that names it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from varlab.models import scales
from varlab.models.conditioning import ClassEmbedder
from varlab.models.msvqvae import MSVQVAE
from varlab.models.positions import CoordinatePositions
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR
from varlab.models.weight_files import read_state_dict

State = Mapping[str, Tensor]
Network = TypeVar("Network", MSVQVAE, VAR)

# ours -> released; applied to the whole key, first match wins
TOKENIZER_KEYS = [
    (r"(en|de)coder\.(conv_in|conv_out|norm_out)\.(.*)", r"\1coder.\2.\3"),
    (r"(en|de)coder\.middle\.0\.skip\.(.*)", r"\1coder.mid.block_1.nin_shortcut.\2"),
    (r"(en|de)coder\.middle\.0\.(.*)", r"\1coder.mid.block_1.\2"),
    (r"(en|de)coder\.middle\.1\.proj\.(.*)", r"\1coder.mid.attn_1.proj_out.\2"),
    (r"(en|de)coder\.middle\.1\.(.*)", r"\1coder.mid.attn_1.\2"),
    (r"(en|de)coder\.middle\.2\.(.*)", r"\1coder.mid.block_2.\2"),
    (r"encoder\.levels\.(\d+)\.resample\.(.*)", r"encoder.down.\1.downsample.conv.\2"),
    (r"decoder\.levels\.(\d+)\.resample\.(.*)", r"decoder.up.\1.upsample.conv.\2"),
    (r"encoder\.levels\.(\d+)\.(.*)", r"encoder.down.\1.\2"),
    (r"decoder\.levels\.(\d+)\.(.*)", r"decoder.up.\1.\2"),
    (r"pre_conv\.(.*)", r"quant_conv.\1"),
    (r"post_conv\.(.*)", r"post_quant_conv.\1"),
    (r"quantizer\.codebook\.weight", r"quantize.embedding.weight"),
    (r"quantizer\.hits", r"quantize.ema_vocab_hit_SV"),
]
LEVEL_PARTS = [
    (".blocks.", ".block."),
    (".attentions.", ".attn."),
    (".skip.", ".nin_shortcut."),
    (".proj.", ".proj_out."),
]
VAR_KEYS = [
    (r"start_position", r"pos_start"),
    (r"position", r"pos_1LC"),
    (r"embedder\.embedding\.(.*)", r"class_emb.\1"),
    (r"scale_embedding\.(.*)", r"lvl_embed.\1"),
    (r"word_embed\.(.*)", r"word_embed.\1"),
    (r"shared_modulation\.linear\.(.*)", r"shared_ada_lin.1.\1"),
    (r"blocks\.(\d+)\.modulation_offset", r"blocks.\1.ada_gss"),
    (r"blocks\.(\d+)\.modulation\.linear\.(.*)", r"blocks.\1.ada_lin.1.\2"),
    (r"blocks\.(\d+)\.attention\.log_scale", r"blocks.\1.attn.scale_mul_1H11"),
    (r"blocks\.(\d+)\.attention\.qkv\.(.*)", r"blocks.\1.attn.mat_qkv.\2"),
    (r"blocks\.(\d+)\.attention\.(.*)", r"blocks.\1.attn.\2"),
    (r"blocks\.(\d+)\.feed_forward\.up\.(.*)", r"blocks.\1.ffn.fc1.\2"),
    (r"blocks\.(\d+)\.feed_forward\.down\.(.*)", r"blocks.\1.ffn.fc2.\2"),
    (r"head_modulation\.linear\.(.*)", r"head_nm.ada_lin.1.\1"),
    (r"head\.(.*)", r"head.\1"),
]


def released_key(key: str, network: MSVQVAE | VAR) -> str:
    """The released name of one of our parameters or buffers. Raises KeyError if there is none."""
    if isinstance(network, MSVQVAE) and (match := re.fullmatch(r"quantizer\.phis\.(\d+)\.(.*)", key)):
        num_phis = network.quantizer.num_phis
        place = "" if num_phis is None else "qresi." if num_phis == 1 else "qresi_ls."
        return f"quantize.quant_resi.{place}" + (match[2] if num_phis == 1 else f"{match[1]}.{match[2]}")
    for pattern, released in TOKENIZER_KEYS if isinstance(network, MSVQVAE) else VAR_KEYS:
        if re.fullmatch(pattern, key):
            key = re.sub(f"^{pattern}$", released, key)
            if isinstance(network, MSVQVAE) and ".mid." not in key:
                for ours, theirs in LEVEL_PARTS:
                    key = key.replace(ours, theirs)
            return key
    raise KeyError(key)


def stored_buffers(network: MSVQVAE | VAR) -> dict[str, Tensor]:
    """Buffers that the released files store and our networks derive: written on export, checked on import."""
    if isinstance(network, MSVQVAE):
        return {}
    mask = torch.zeros(network.mask.shape).masked_fill(~network.mask.cpu(), -torch.inf)
    zero = torch.zeros(network.width)
    return {
        "lvl_1L": network.scale_of_token.cpu()[None],
        "attn_bias_for_masking": mask[None, None],
        **{f"blocks.{i}.attn.zero_k_bias": zero for i in range(network.depth)},
    }


def to_released(module: MSVQVAE | VAR) -> dict[str, Tensor]:
    """State dict of a tokenizer or a VAR in the released layout, on the CPU; the released code loads it with
    strict=True.

    Raises ValueError for a network that the released code does not have (order=raster, a custom class, another condition
    than a class label).
    """
    if type(module) not in (MSVQVAE, VAR) or (
        isinstance(module, MSVQVAE) and type(module.quantizer) is not MultiScaleQuantizer
    ):
        raise ValueError(f"the released code has no {type(module).__name__} like this one: export to=safetensors")
    if isinstance(module, VAR) and module.order != "scales":
        raise ValueError(f"the released code has no network with order={module.order}: export to=safetensors")
    if isinstance(module, VAR) and isinstance(module.position, CoordinatePositions):
        raise ValueError("the released code learns positions, it has no coordinates: export to=safetensors")
    if isinstance(module, VAR) and len(module.bases) > 1:
        raise ValueError("the released code predicts codes, not their digits: export to=safetensors")
    if isinstance(module, VAR) and type(module.embedder) is not ClassEmbedder:
        raise ValueError(
            f"the released code has class labels only, no {type(module.embedder).__name__}: export to=safetensors"
        )
    state = {}
    for key, value in module.state_dict().items():
        if key == "quantizer.num_updates":  # the released code does not store its counter
            continue
        value = value.detach().cpu()
        if key.endswith("log_scale"):
            value = value.view(1, -1, 1, 1)
        elif key.endswith("modulation_offset"):
            value = value[None, None]
        state[released_key(key, module)] = value
    return {**state, **stored_buffers(module)}


def fill_from_released(network: Network, state: State) -> Network:
    """Copies a released state dict into `network`. Raises ValueError naming the first key that does not fit."""
    expected = to_released(network)
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"released weights: {len(missing)} keys are missing, first {missing[0]!r}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"released weights: {len(unknown)} keys are unknown, first {unknown[0]!r}")
    hits = "quantize.ema_vocab_hit_SV"  # hit counts of another pyramid are not used
    for key, value in expected.items():
        if key != hits and state[key].shape != value.shape:
            raise ValueError(
                f"released weights: {key!r} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            )
    for key, value in stored_buffers(network).items():
        if not torch.equal(state[key].cpu().to(value.dtype), value):
            raise ValueError(f"released weights: buffer {key!r} does not match patch_nums {network.patch_nums}")
    ours = network.state_dict()
    for key, value in ours.items():
        if key == "quantizer.num_updates" or (key == "quantizer.hits" and state[hits].shape != value.shape):
            continue
        ours[key] = state[released_key(key, network)].reshape(value.shape)
    network.load_state_dict(ours)
    return network


def is_released_tokenizer(state: Mapping) -> bool:
    """Whether this is the state dict of a released tokenizer."""
    return "quantize.embedding.weight" in state


def load_released(
    state_dict_or_file: State | str | Path,
    patch_nums: scales.PatchNums = scales.RELEASED_256,
    lookup: Literal["l2", "cosine"] = "l2",
    num_heads: int | None = None,
) -> MSVQVAE | VAR:
    """The tokenizer or VAR of released weights, detected from the keys. On the CPU, in training mode.

    `patch_nums`: the pyramid (default: 256 px), which the released tokenizer does not store. `lookup`: of the tokenizer
    ("cosine" is the released code's using_znorm). `num_heads`: of a VAR without QK-norm whose head dim is not 64. Sizes
    are inferred from the shapes. Raises ValueError naming the first key that is missing, unknown or has the wrong
    shape. No code in a file is executed.
    """
    state = state_dict_or_file
    patch_nums = tuple(patch_nums)  # a config's list is of a type of its own
    if isinstance(state, str | Path):
        state = read_state_dict(Path(state))
    if "trainer" in state:  # a checkpoint of the released trainer
        trainer: Mapping = state["trainer"]  # pyright: ignore[reportAssignmentType]
        state = trainer["vae_local"] if "vae_local" in trainer else trainer["var_wo_ddp"]
    if is_released_tokenizer(state):
        return tokenizer_from_released(state, patch_nums, using_znorm=lookup == "cosine")
    return var_from_released(state, patch_nums, num_heads)


def shape_of(state: State, key: str) -> torch.Size:
    """Shape of a tensor that every file of this kind contains."""
    if key not in state:
        raise ValueError(f"released weights: key {key!r} is missing, so this is not a file of the expected kind")
    return state[key].shape


def count(state: State, pattern: str) -> int:
    """Number of distinct values of the first group of `pattern` among the keys: blocks, levels, ..."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def tokenizer_from_released(
    state_dict: State, patch_nums: scales.PatchNums, using_znorm: bool = False, num_groups: int = 32
) -> MSVQVAE:
    """The tokenizer of a released state dict. Sizes are inferred from the shapes; the pyramid and the kind of lookup
    are not stored and must be given. The released tokenizer is the same for 256 and 512 px: only patch_nums differ.
    """
    channels = shape_of(state_dict, "encoder.conv_in.weight")[0]
    num_levels = count(state_dict, r"encoder\.down\.(\d+)\..*")
    codebook_size, codebook_dim = shape_of(state_dict, "quantize.embedding.weight")
    num_lists = count(state_dict, r"quantize\.quant_resi\.qresi_ls\.(\d+)\..*")
    is_shared = "quantize.quant_resi.qresi.weight" in state_dict
    is_unshared = "quantize.quant_resi.0.weight" in state_dict
    quantizer = MultiScaleQuantizer(
        patch_nums,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        num_phis=num_lists or (1 if is_shared else None),
        phi_ratio=0.5 if num_lists or is_shared or is_unshared else 0.0,
        lookup="cosine" if using_znorm else "l2",
    )
    tokenizer = MSVQVAE(
        quantizer,
        channels=channels,
        channel_mult=[
            shape_of(state_dict, f"encoder.down.{i}.block.0.conv1.weight")[0] // channels for i in range(num_levels)
        ],
        num_blocks=count(state_dict, r"encoder\.down\.0\.block\.(\d+)\..*"),
        num_groups=num_groups,
    )
    return fill_from_released(tokenizer, state_dict)


def var_from_released(state_dict: State, patch_nums: scales.PatchNums, num_heads: int | None = None) -> VAR:
    """The transformer of a released state dict. `num_heads` is inferred from the QK-norm's temperatures; without
    QK-norm it must be given if the head dim is not 64."""
    num_rows, width = shape_of(state_dict, "class_emb.weight")
    codebook_dim, codebook_size = shape_of(state_dict, "word_embed.weight")[1], shape_of(state_dict, "head.weight")[0]
    qk_norm = "blocks.0.attn.scale_mul_1H11" in state_dict
    stored_heads = state_dict["blocks.0.attn.scale_mul_1H11"].numel() if qk_norm else None
    if num_heads is not None and stored_heads not in (None, num_heads):
        raise ValueError(f"num_heads={num_heads}, but the weights have {stored_heads} heads")
    lengths = torch.bincount(state_dict["lvl_1L"].flatten().long()).tolist() if "lvl_1L" in state_dict else None
    if lengths is not None and lengths != scales.lengths(patch_nums):
        guess = [math.isqrt(length) for length in lengths]
        raise ValueError(
            f"patch_nums {list(patch_nums)} do not fit the weights, whose scales have {lengths} tokens (square maps: {guess})"
        )
    var = VAR(
        depth=count(state_dict, r"blocks\.(\d+)\..*"),
        patch_nums=patch_nums,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        num_classes=num_rows - 1,
        width=width,
        num_heads=num_heads or stored_heads or max(1, width // 64),
        mlp_ratio=shape_of(state_dict, "blocks.0.ffn.fc1.weight")[0] / width,
        shared_adaln="shared_ada_lin.1.weight" in state_dict,
        qk_norm=qk_norm,
    )
    return fill_from_released(var, state_dict)

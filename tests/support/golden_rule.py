"""Weights and inputs that anyone can make again: the rule under which the golden figures were recorded from the released code.

For a tensor named `key` (released layout), element i is a 64-bit mix (splitmix64) of crc32("salt:key") and i.
"""

import json
import math
import pathlib
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def uniform(salt: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1), float64."""
    with np.errstate(over="ignore"):
        z = (np.uint64(zlib.crc32(f"{salt}:{key}".encode())) << np.uint64(32)) + np.arange(
            math.prod(shape), dtype=np.uint64
        )
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / 2**53).reshape(shape)


def weight(salt: int, key: str, shape: tuple[int, ...]) -> Tensor:
    v = 2 * uniform(salt, key, shape) - 1
    if key.endswith("scale_mul_1H11"):
        v = math.log(4) + 0.3 * v
    elif key.endswith("ada_gss"):
        v = 0.3 * v
    elif key == "quantize.embedding.weight":
        pass
    elif len(shape) == 1 and key.endswith("weight"):
        v = 1 + 0.1 * v
    elif len(shape) == 1:
        v = 0.05 * v
    elif "emb" in key or "pos" in key:
        v = 0.3 * v
    else:
        v = v * math.sqrt(3 / math.prod(shape[1:]))
    return v.float()


def lengths_of(patch_nums: list[int]) -> list[int]:
    return [pn * pn for pn in patch_nums]


def buffer(key: str, shape: tuple[int, ...], patch_nums: list[int]) -> Tensor | None:
    """Buffers of the released layout keep what their constructor gives them."""
    scale = torch.tensor([k for k, length in enumerate(lengths_of(patch_nums)) for _ in range(length)])
    if key == "lvl_1L":
        return scale[None]
    if key == "attn_bias_for_masking":
        return torch.where(scale[:, None] >= scale[None, :], 0.0, -torch.inf)[None, None]
    if key.endswith(("zero_k_bias", "ema_vocab_hit_SV")):
        return torch.zeros(shape)
    return None


def state(salt: int, shapes: dict[str, list[int]], patch_nums: list[int]) -> dict[str, Tensor]:
    """A state dict in the released layout."""
    made = {}
    for key, shape in shapes.items():
        stored = buffer(key, tuple(shape), patch_nums)
        made[key] = weight(salt, key, tuple(shape)) if stored is None else stored
    return made


def images(salt: int, side: int) -> Tensor:
    x = (2 * uniform(salt, "input.images", (2, 3, side, side)) - 1).float()
    for _ in range(2):
        x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return (x * 4).clamp(-1, 1)


def assert_stats(tensor: Tensor, stats: dict, rel: float = 1e-4) -> None:
    """`tensor` agrees with recorded shape, mean, standard deviation and 16 values. `rel` is of the tensor's own scale."""
    assert list(tensor.shape) == stats["shape"]
    tolerance = rel * (abs(stats["std"]) + abs(stats["mean"]))
    places = torch.linspace(0, tensor.numel() - 1, 16).long()
    assert tensor.mean().item() == pytest.approx(stats["mean"], abs=tolerance)
    assert tensor.std().item() == pytest.approx(stats["std"], abs=tolerance)
    torch.testing.assert_close(tensor.flatten()[places], torch.tensor(stats["at_linspace16"]), rtol=rel, atol=tolerance)

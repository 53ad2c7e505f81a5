"""Clipping of gradients and skipping of non-finite steps, on the device: the host does not wait for the norm.

Fused optimizers divide gradients by `grad_scale` and leave weights and state unchanged if `found_inf` is 1. Both are
device tensors, meant for loss scaling, and express clipping and skipping without a host sync.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients and all shards, fp32 on their device."""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def clip_or_skip(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
    """Makes the next step of the optimizer use gradients clipped to `max_norm` (0: not clipped), or change nothing if
    `norm` is not finite: neither weights, nor moments, nor weight decay.

    An optimizer without a fused step needs the norm on the host, so the host waits for the device.
    """
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else torch.ones_like(norm)
    if is_fused(optimizer):
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = divisor, (~torch.isfinite(norm)).float()
    elif math.isfinite(float(norm)):
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
    else:
        optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left unchanged


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer takes `grad_scale` and `found_inf`."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def keep_implementation(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer keep its own implementation (fused or not) when it loads the state of another."""
    names = ("fused", "foreach", "capturable", "differentiable")

    def adopt(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        groups = [{**saved, **{name: own[name] for name in names if name in own}} for saved, own in pairs]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(adopt)


class HostCopy:
    """Device values (1-D) on their way to the host. `read` waits for them, not for the work the device got later."""

    def __init__(self, values: Tensor) -> None:
        self.copied = None
        if not values.is_cuda:
            self.values = values.clone()
            return
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.values.copy_(values, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record()

    def read(self) -> list[float]:
        """The values."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()

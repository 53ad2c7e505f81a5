"""Parameter groups and schedules. Both are pure functions, so a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass

import torch
from torch import nn

UNDECAYED = ("position", "start_position", "scale_embedding.weight", "modulation_offset")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, other 1-d parameters, positions, scale embedding, AdaLN offsets."""
    return parameter.ndim > 1 and not name.endswith("bias") and not name.endswith(UNDECAYED)


def parameter_groups(net: nn.Module) -> list[dict]:
    """Two groups of the trainable parameters, decayed and not; `is_decayed` marks them for the schedule."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if is_decayed(name, p)], "is_decayed": True},
        {"params": [p for name, p in named if not is_decayed(name, p)], "is_decayed": False, "weight_decay": 0.0},
    ]


def decay_share(shape: str, q: float, final_ratio: float) -> float:
    """Share of the peak at progress q in [0, 1] after warm-up, by the released trainer's names (and wsd).

    lin0, lin, exp hold the peak first; lin00 falls at once; cos is a half cosine; lin<p> (progressive training) has a
    knee at p; wsd holds the peak for 80 % and cools down by 1 - sqrt.
    """
    e = final_ratio
    if shape == "constant":
        return 1.0
    if shape == "cos":
        return e + (1 - e) * (1 + math.cos(math.pi * q)) / 2
    if shape == "exp":
        return 1.0 if q < 0.15 else e ** ((q - 0.15) / 0.85)
    if shape == "wsd":
        return 1.0 if q < 0.8 else e + (1 - e) * (1 - math.sqrt((q - 0.8) / 0.2))
    hold = {"lin00": 0.0, "lin0": 0.05, "lin": 0.15}.get(shape)
    if hold is not None:
        return 1.0 if q < hold else e + (1 - e) * (1 - q) / (1 - hold)
    knee = knee_of(shape)
    middle = (1 + e + (1 - e) * (1 - knee)) / 2
    return 1 + (middle - 1) * q / knee if q < knee else e + (middle - e) * (1 - q) / (1 - knee)


def knee_of(shape: str) -> float:
    """p of a schedule named lin<p>. Raises ValueError for a name that is no schedule."""
    try:
        knee = float(shape.removeprefix("lin")) if shape.startswith("lin") else math.nan
    except ValueError:
        knee = math.nan
    if not 0 < knee < 1:
        raise ValueError(
            f"schedule {shape!r} is unknown: choose lin0, lin00, lin, lin<p> with 0 < p < 1 (lin0.5), cos, exp, wsd or constant"
        )
    return knee


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay by optimizer step (0-based) of a run of `total_steps` (released recipe).

    Warm-up rises from `warmup_start` to 1 over `warmup` (a share of the run); then `shape` falls to `final_ratio`. Weight
    decay moves from its start to its end value by a half cosine over the whole run.
    """

    shape: str = "lin0"
    warmup: float = 0.02
    warmup_start: float = 0.005
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        decay_share(self.shape, 0.5, self.final_ratio)  # an unknown shape fails now, not after the warm-up
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: give a share of the run between 0 and 1")

    def lr_share(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate at this step."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup_steps
        q = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
        return decay_share(self.shape, q, self.final_ratio)

    def weight_decay(self, step: int, total_steps: int, start: float, end: float) -> float:
        """Weight decay at this step."""
        q = min(step / max(total_steps - 1, 1), 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * q)) / 2

    def apply(
        self, optimizer: torch.optim.Optimizer, step: int, total_steps: int, peak_lr: float, decay: tuple[float, float]
    ) -> float:
        """Sets learning rate and weight decay of all groups for this step; returns the learning rate."""
        lr = peak_lr * self.lr_share(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.weight_decay(step, total_steps, *decay) if group["is_decayed"] else 0.0
        return lr

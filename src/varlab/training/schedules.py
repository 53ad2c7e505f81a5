"""Parameter groups and schedules. Both are pure functions, so a resumed run needs no scheduler state."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import nn

UNDECAYED = ("position", "start_position", "scale_embedding.weight", "modulation_offset")

HOLD = 0.8  # share of a wsd schedule at the peak (Haegele et al. 2024)


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, other 1-d parameters, positions, scale embedding, AdaLN offsets."""
    return parameter.ndim > 1 and not name.endswith("bias") and not name.endswith(UNDECAYED)


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix whose input grows with the width: those of the blocks and of the head."""
    return parameter.ndim > 1 and name.endswith("weight") and name.startswith(("blocks.", "head", "shared_modulation."))


def parameter_groups(net: nn.Module, lr_multiplier: float = 1.0) -> list[dict]:
    """Two groups of the trainable parameters, decayed and not; `is_decayed` marks them for the schedule. With a `lr_multiplier` the
    matrices that read the width form two groups of their own, whose learning rate is that share of the others'."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    shares = [(named, 1.0)]
    if lr_multiplier != 1:
        matrices = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
        shares = [([(name, p) for name, p in named if not is_hidden_matrix(name, p)], 1.0), (matrices, lr_multiplier)]
    groups = []
    for chosen, share in shares:
        own = {} if share == 1 else {"lr_multiplier": share}
        groups += [
            {"params": [p for name, p in chosen if is_decayed(name, p)], "is_decayed": True, **own},
            {
                "params": [p for name, p in chosen if not is_decayed(name, p)],
                "is_decayed": False,
                "weight_decay": 0.0,
                **own,
            },
        ]
    return [group for group in groups if group["params"]]


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
        return 1.0 if q < HOLD else e + (1 - e) * (1 - math.sqrt((q - HOLD) / (1 - HOLD)))
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

    Warm-up rises from `warmup_start` to 1 over `warmup` (a share of the run; from 1 on, steps); then `shape` falls to `final_ratio`. Weight
    decay moves from its start to its end value by a half cosine over the whole run.
    """

    shape: str = "lin0"
    warmup: float = 0.02
    warmup_start: float = 0.005
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        decay_share(self.shape, 0.5, self.final_ratio)  # an unknown shape fails now, not after the warm-up
        if self.warmup < 0 or (self.warmup > 1 and self.warmup != round(self.warmup)):
            raise ValueError(f"warmup={self.warmup}: give a share of the run below 1, or a number of steps")

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)

    def cooldown_start(self, total_steps: int) -> int:
        """Steps that a run of this length (wsd) shares with all longer ones of the same warm-up: those before it cools down."""
        warmup_steps = self.warmup_steps(total_steps)
        return min(warmup_steps + math.ceil(HOLD * max(total_steps - 1 - warmup_steps, 1)), total_steps)

    def lr_multiplier(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate at this step."""
        warmup_steps = self.warmup_steps(total_steps)
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
        lr = peak_lr * self.lr_multiplier(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)
            group["weight_decay"] = self.weight_decay(step, total_steps, *decay) if group["is_decayed"] else 0.0
        return lr


@dataclass(frozen=True)
class Progressive:
    """Training that begins with the coarse scales and takes in one finer scale after the other (released trainer).

    The first `first_scales + 1` scales are trained during the warm-up, all of them after `share` of the run. A scale that
    enters counts little at first: its weight rises to 1 within 1/300 of the run. Each token keeps its weight 1/L, so the
    loss grows with every scale. The authors offer it as a speed-up that costs quality.
    """

    share: float = 0.5
    first_scales: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"progressive.share={self.share}: give a share of the run between 0 and 1")
        if self.first_scales < 0:
            raise ValueError(f"progressive.first_scales={self.first_scales}: cannot be negative")

    def schedule(self, schedule: Schedule) -> Schedule:
        """The released schedule for it: lin<share>."""
        return replace(schedule, shape=f"lin{self.share}")

    def last_scale(self, step: int, total_steps: int, warmup_steps: int, num_scales: int) -> int:
        """The finest scale trained at this step."""
        last, first = num_scales - 1, min(self.first_scales, num_scales - 1)
        if step <= warmup_steps:
            return first
        if step >= self.share * total_steps:
            return last
        done = (step - warmup_steps) / (self.share * total_steps - warmup_steps)
        return first + round((last - first) * done)  # half to even, as released

    def stage(self, step: int, total_steps: int, warmup_steps: int, num_scales: int) -> tuple[int, float]:
        """(number of scales trained, weight of the finest). A pure function of the step, so that a run resumes into it."""
        scale = self.last_scale(step, total_steps, warmup_steps, num_scales)
        entered = bisect_left(
            range(step), scale, key=lambda i: self.last_scale(i, total_steps, warmup_steps, num_scales)
        )
        if entered == 0:
            return scale + 1, 1.0
        return scale + 1, min(max((step - entered) / (total_steps / 300), 0.01), 1.0)

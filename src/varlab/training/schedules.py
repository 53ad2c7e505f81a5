"""Schedules of learning rate and weight decay: pure functions of the step, so a resumed run needs no scheduler state.

A custom schedule subclasses `Schedule` and overrides `decay`.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Schedule:
    """Multiplier of the peak learning rate by optimizer step (0-based) of a run of `total_steps` (released recipe).

    The warm-up rises from `warmup_start` to 1 over `warmup` (below 1 a fraction of the run, otherwise steps); then
    `decay` falls to `final_ratio`.

    `branch_share`: fraction of the steps after the warm-up that do not depend on the length of the run, so that a
    shorter run can branch off a longer one there; None for a schedule in which every step depends on the length.
    """

    warmup: float = 0.02
    warmup_start: float = 0.005
    final_ratio: float = 0.1
    branch_share: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.warmup > 1 and self.warmup != round(self.warmup)):
            raise ValueError(f"warmup={self.warmup}: give a fraction of the run below 1, or a number of steps")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio}: give a fraction of the peak between 0 and 1")

    @property
    def name(self) -> str:
        """Name of the schedule in run.json."""
        return type(self).__name__.lower()

    def decay(self, q: float) -> float:
        """Multiplier at progress q in [0, 1] after the warm-up."""
        raise NotImplementedError

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)

    def __call__(self, step: int, total_steps: int) -> float:
        """Multiplier at this step."""
        warmup_steps = self.warmup_steps(total_steps)
        if step < warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup_steps
        return self.decay(min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0))

    def branch_step(self, total_steps: int) -> int | None:
        """Number of steps that a run of this length shares with all longer ones of the same warm-up; None without a
        `branch_share`."""
        if self.branch_share is None:
            return None
        warmup_steps = self.warmup_steps(total_steps)
        return min(warmup_steps + math.ceil(self.branch_share * max(total_steps - 1 - warmup_steps, 1)), total_steps)


@dataclass(frozen=True)
class Linear(Schedule):
    """Holds the peak for `hold` of the steps after the warm-up, then falls linearly (released: lin0 with 0.05, lin00
    with 0, lin with 0.15)."""

    hold: float = 0.05

    def decay(self, q: float) -> float:
        if q < self.hold:
            return 1.0
        return self.final_ratio + (1 - self.final_ratio) * (1 - q) / (1 - self.hold)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Falls by half a cosine (released: cos)."""

    def decay(self, q: float) -> float:
        return self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * q)) / 2


@dataclass(frozen=True)
class Exponential(Schedule):
    """Holds the peak for 15 % of the steps after the warm-up, then falls exponentially (released: exp)."""

    def decay(self, q: float) -> float:
        return 1.0 if q < 0.15 else self.final_ratio ** ((q - 0.15) / 0.85)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: holds the peak for 80 % of the steps after the warm-up, then cools down by 1 - sqrt
    (Haegele et al. 2024)."""

    branch_share: ClassVar[float | None] = 0.8

    def decay(self, q: float) -> float:
        if q < 0.8:
            return 1.0
        return self.final_ratio + (1 - self.final_ratio) * (1 - math.sqrt((q - 0.8) / (1 - 0.8)))


@dataclass(frozen=True)
class Constant(Schedule):
    """Holds the peak to the end."""

    def decay(self, q: float) -> float:
        return 1.0


@dataclass(frozen=True)
class TwoSlopes(Schedule):
    """Falls linearly to progress `knee`, then linearly at another slope (released: lin<p>, for progressive training)."""

    knee: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.knee < 1:
            raise ValueError(f"knee={self.knee}: give a fraction of the run between 0 and 1")

    def decay(self, q: float) -> float:
        middle = (1 + self.final_ratio + (1 - self.final_ratio) * (1 - self.knee)) / 2
        if q < self.knee:
            return 1 + (middle - 1) * q / self.knee
        return self.final_ratio + (middle - self.final_ratio) * (1 - q) / (1 - self.knee)


def weight_decay_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Weight decay at this step, from `start` to `end` by half a cosine over the whole run (released recipe)."""
    q = min(step / max(total_steps - 1, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * q)) / 2


def set_step(
    optimizer: torch.optim.Optimizer,
    step: int,
    total_steps: int,
    schedule: Schedule,
    peak_lr: float,
    weight_decay: tuple[float, float],
) -> float:
    """Sets learning rate and weight decay (start, end) of all groups for this step; returns the learning rate."""
    lr = peak_lr * schedule(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)
        group["weight_decay"] = weight_decay_at(step, total_steps, *weight_decay) if group["is_decayed"] else 0.0
    return lr


@dataclass(frozen=True)
class Progressive:
    """Training that begins with the coarse scales and adds the finer scales one by one (released trainer).

    The first `first_scales + 1` scales are trained during the warm-up, all scales after the fraction `share` of the
    run. The weight of a new scale starts small and rises to 1 within 1/300 of the run. Each token keeps its weight 1/L,
    so the loss grows with every scale. The authors offer it as a speed-up at the cost of quality.
    """

    share: float = 0.5
    first_scales: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"progressive.share={self.share}: give a fraction of the run between 0 and 1")
        if self.first_scales < 0:
            raise ValueError(f"progressive.first_scales={self.first_scales}: cannot be negative")

    def schedule(self, schedule: Schedule) -> Schedule:
        """The released schedule for progressive training, with the given warm-up and final ratio."""
        return TwoSlopes(schedule.warmup, schedule.warmup_start, schedule.final_ratio, knee=self.share)

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
        """(number of scales trained, weight of the finest one), a pure function of the step."""
        scale = self.last_scale(step, total_steps, warmup_steps, num_scales)
        entered = bisect_left(
            range(step), scale, key=lambda i: self.last_scale(i, total_steps, warmup_steps, num_scales)
        )
        if entered == 0:
            return scale + 1, 1.0
        return scale + 1, min(max((step - entered) / (total_steps / 300), 0.01), 1.0)

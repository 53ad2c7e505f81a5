"""Schedules against the released ones."""

import pytest
import torch
from support import golden_rule as rule

from varlab.training.schedules import (
    WSD,
    Cosine,
    Exponential,
    Linear,
    Progressive,
    Schedule,
    TwoSlopes,
    set_step,
    weight_decay_at,
)


def test_the_warm_up_follows_the_size_up_to_a_twentieth():
    schedule = WSD(3.0, final_ratio=0.0)
    shares = [schedule(step, 103) for step in range(103)]
    assert shares[0] < shares[1] < shares[2] < 1 and shares[3] == 1
    start = schedule.branch_step(103)
    assert all(share == 1 for share in shares[3:start]) and shares[start + 1] < 1
    assert shares[-1] == pytest.approx(0)
    longer = [schedule(step, 400) for step in range(start)]
    assert longer == shares[:start]


def schedule_of(shape: str, warmup: float, warmup_start: float, final_ratio: float) -> Schedule:
    """The schedule by the released trainer's name."""
    shared = (warmup, warmup_start, final_ratio)
    holds = {"lin0": 0.05, "lin00": 0.0, "lin": 0.15}
    if shape in holds:
        return Linear(*shared, hold=holds[shape])
    if shape.startswith("lin"):
        return TwoSlopes(*shared, knee=float(shape.removeprefix("lin")))
    return {"cos": Cosine, "exp": Exponential}[shape](*shared)


def test_schedules():
    record = rule.golden("schedules")
    total, peak = record["total_steps"], record["peak_lr"]
    for shape, rows in record["schedules"].items():
        schedule = schedule_of(
            shape, record["warmup_steps"] / total, record["warmup_start_ratio"], record["final_ratio"]
        )
        for step, lr, weight_decay in rows:
            assert peak * schedule(step, total) == pytest.approx(lr, rel=1e-5), (shape, step)
            decay = weight_decay_at(step, total, record["weight_decay_start"], record["weight_decay_end"])
            assert decay == pytest.approx(weight_decay, rel=1e-5), (shape, step)
    for record in [rule.golden("tables")["progressive_schedule_lr"], rule.golden("tables")["lin0_knee"]]:
        for shape, rows in record.get("schedules", {"lin0": record.get("rows")}).items():
            schedule = schedule_of(shape, record["warmup_steps"] / record["total_steps"], 0.005, record["final_ratio"])
            for step, lr in rows:
                assert record["peak_lr"] * schedule(step, record["total_steps"]) == pytest.approx(lr, rel=1e-5), (
                    shape,
                    step,
                )


@pytest.mark.parametrize("knee", [0.0, 1.0, 2.0])
def test_a_knee_outside_of_the_run_is_refused(knee):
    with pytest.raises(ValueError, match=f"knee={knee}"):
        TwoSlopes(knee=knee)


PROGRESSIVE = Progressive(share=0.5, first_scales=1)


def test_scales_enter_one_by_one_as_released():
    """Against the rule as the specification writes it, step by step."""
    total, warmup, num_scales = 1000, 20, 10
    progressive, in_stage, before = Progressive(share=0.4, first_scales=4), 0, None
    seen = []
    for step in range(total):
        stage = 4 + round((9 - 4) * (step - warmup) / (0.4 * total - warmup))
        stage = 4 if step <= warmup else 9 if step >= 0.4 * total else stage
        in_stage = in_stage + 1 if stage == before else 0
        before = stage
        weight = 1.0 if stage == 4 else min(max(in_stage / (total / 300), 0.01), 1.0)
        assert progressive.stage(step, total, warmup, num_scales) == (stage + 1, pytest.approx(weight)), step
        seen.append(stage)
    assert seen[0] == 4 and sorted(set(seen)) == [4, 5, 6, 7, 8, 9]


def test_progressive_training_takes_the_released_schedule():
    assert PROGRESSIVE.schedule(Cosine(warmup=0.1)) == TwoSlopes(warmup=0.1, knee=0.5)
    with pytest.raises(ValueError, match=r"progressive.share=1.5: give a fraction of the run between 0 and 1"):
        Progressive(share=1.5)


@pytest.mark.parametrize("warmup", [-0.5, -2.0, 1.5])
def test_a_warm_up_that_is_neither_a_fraction_nor_a_number_of_steps_is_refused(warmup):
    with pytest.raises(ValueError, match=f"warmup={warmup}: give a fraction of the run below 1, or a number of steps"):
        Linear(warmup=warmup)


def test_a_step_sets_the_rate_of_each_group_and_the_decay_of_decayed_ones():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [
        {"params": weights[:1], "is_decayed": True},
        {"params": weights[1:2], "is_decayed": False},
        {"params": weights[2:], "is_decayed": True, "lr_multiplier": 0.25},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    lr = set_step(optimizer, 0, 101, Linear(warmup=10.0, warmup_start=0.1), 2.0, (0.5, 0.3))
    assert lr == pytest.approx(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 0.05])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5]
    set_step(optimizer, 50, 101, Linear(warmup=10.0), 2.0, (0.5, 0.3))
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)

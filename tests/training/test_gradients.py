"""Clipping and skipping through the optimizer's step."""

from functools import partial

import pytest
import torch
from torch import nn

from varlab.training.gradients import HostCopy, clip_or_skip, gradient_norm, keep_implementation
from varlab.training.optimizers import MuonWithAdamW

OPTIMIZERS = {
    "fused": partial(torch.optim.AdamW, fused=True),
    "foreach": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "muon": lambda params, lr: MuonWithAdamW([{"params": params, "is_decayed": True}], lr=lr),
}


def one_step(make, gradient, clip=None, max_norm=1.0):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = make([weight], lr=0.1)
    for scale in (0.01, 1.0):  # the first is below the limit
        weight.grad = gradient * scale
        if clip is None:
            clip_or_skip(optimizer, gradient_norm([weight]), max_norm)
        else:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
    return weight.detach().clone(), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_clipped_gradients(name):
    gradient = torch.arange(12.0).reshape(3, 4)
    expected, _ = one_step(torch.optim.AdamW if name == "fused" else OPTIMIZERS[name], gradient, clip=1.0)
    torch.testing.assert_close(one_step(OPTIMIZERS[name], gradient)[0], expected)
    free, _ = one_step(OPTIMIZERS[name], gradient, max_norm=0.0)
    torch.testing.assert_close(one_step(OPTIMIZERS[name], gradient, clip=torch.inf)[0], free)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name, bad):
    gradient = torch.ones(3, 4)
    weight, optimizer = one_step(OPTIMIZERS[name], gradient)
    (parameter,) = optimizer.param_groups[0]["params"]
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if value is not None}
    gradient[1, 2] = bad
    parameter.grad = gradient
    clip_or_skip(optimizer, gradient_norm([parameter]), 1.0)
    optimizer.step()
    assert torch.equal(parameter, weight)
    for key, value in before.items():
        assert torch.equal(optimizer.state[parameter][key], value), key


def test_the_norm_of_low_precision_gradients_is_fp32():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    weight.grad = torch.tensor([3.0, 0.0, 4.0], dtype=torch.bfloat16)
    norm = gradient_norm([weight])
    assert norm.dtype == torch.float32 and float(norm) == 5


def test_an_optimizer_keeps_its_implementation_when_it_loads_another_state():
    _, old = one_step(OPTIMIZERS["foreach"], torch.ones(3, 4))
    state = old.state_dict()
    assert not state["param_groups"][0]["fused"]
    weight, new = one_step(OPTIMIZERS["fused"], torch.ones(3, 4))
    keep_implementation(new)
    state["param_groups"][0]["lr"] = 0.5
    new.load_state_dict(state)
    assert (new.param_groups[0]["fused"], new.param_groups[0]["lr"]) == (True, 0.5)
    (parameter,) = new.param_groups[0]["params"]
    parameter.grad = torch.ones_like(weight)
    clip_or_skip(new, gradient_norm([parameter]), 1.0)
    new.step()
    assert not torch.equal(parameter, weight)


def test_a_host_copy_is_of_its_time():
    values = torch.tensor([1.0, 2.0])
    copy = HostCopy(values)
    values.zero_()
    assert copy.read() == [1.0, 2.0]

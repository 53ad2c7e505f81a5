"""Parameter groups, and Muon beside AdamW."""

import copy

import torch
from support.networks import make_var
from support.runs import fit

from varlab.checkpoints.load import read_checkpoint
from varlab.training.optimizers import MuonWithAdamW, is_decayed, is_hidden_matrix, parameter_groups


def test_muP_like_rates_slow_the_matrices_that_read_the_width_alone(tmp_path, study):
    settings = [
        *study,
        "steps=3",
        "module.lr_reference_depth=1",
        "module.mup_lr_scaling=true",
        "module.warmup_tokens=null",
    ]
    fit(tmp_path / "run", *settings, "module.schedule.warmup=0.0")
    saved = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    rates = [group.get("lr_multiplier", 1.0) for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == [1.0, 1.0, 0.5]
    net = make_var()
    slowed = {name for name, parameter in net.named_parameters() if is_hidden_matrix(name, parameter)}
    assert {name.split(".")[-1] for name in slowed} == {"weight"}
    assert {"head.weight", "blocks.0.attention.qkv.weight", "head_modulation.linear.weight"} <= slowed
    assert not slowed & {"word_embed.weight", "class_embedding.weight", "position", "blocks.0.attention.q_bias"}


def network():
    """A matrix, an embedding of many rows, a vector; with gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 6), (50, 6), (6,))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    matrix, embedding, vector = weights
    return weights, [{"params": [matrix, embedding], "is_decayed": True}, {"params": [vector], "is_decayed": False}]


def test_matrices_take_muons_steps_and_everything_else_adamws():
    weights, groups = network()
    optimizer = MuonWithAdamW(groups, lr=0.01, embedding_size=10)
    alone, _ = network()
    parts = [
        torch.optim.Muon(alone[:1], lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(alone[1:2], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(alone[2:], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 if group["is_decayed"] else 0.0
    assert sorted((group["is_muon"], len(group["params"])) for group in optimizer.param_groups) == [
        (False, 1),
        (False, 1),
        (True, 1),
    ]
    for _ in range(3):
        assert optimizer.step(lambda: torch.tensor(7.0)) == 7
        for part in parts:
            part.step()
    for weight, expected in zip(weights, alone, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_moments_are_saved_and_loaded_as_those_of_one_optimizer():
    weights, groups = network()
    optimizer = MuonWithAdamW(groups, lr=0.01, embedding_size=10)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again, groups = network()
    for weight, value in zip(again, weights, strict=True):
        weight.data.copy_(value.data)
    other = MuonWithAdamW(groups, lr=0.01, embedding_size=10)
    other.load_state_dict(saved)
    optimizer.step()
    other.step()
    for weight, expected in zip(again, weights, strict=True):
        assert torch.equal(weight, expected)


def test_an_optimizer_without_matrices_or_without_others_works():
    for index in (0, 2):
        weights, _ = network()
        optimizer = MuonWithAdamW([{"params": [weights[index]], "is_decayed": index == 0}])
        before = weights[index].detach().clone()
        optimizer.step()
        assert [group["is_muon"] for group in optimizer.param_groups] == [index == 0]
        assert optimizer.param_groups[0]["lr"] == 1e-3 and not torch.equal(before, weights[index])


def test_groups_say_what_is_decayed_and_what_is_slowed():
    net = make_var()
    plain = parameter_groups(net)
    assert [group["is_decayed"] for group in plain] == [True, False] and "lr_multiplier" not in plain[0]
    slowed = parameter_groups(net, lr_multiplier=0.5)
    assert [group.get("lr_multiplier", 1.0) for group in slowed] == [1.0, 1.0, 0.5]
    ids = [id(parameter) for group in slowed for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in net.parameters())
    hidden = {id(parameter) for name, parameter in net.named_parameters() if is_hidden_matrix(name, parameter)}
    assert {id(parameter) for parameter in slowed[2]["params"]} == hidden and slowed[1]["weight_decay"] == 0.0


def test_one_dimensional_parameters_are_not_decayed():
    assert not is_decayed("blocks.0.norm.weight", torch.ones(3)) and is_decayed("blocks.0.fc.weight", torch.ones(3, 3))
    assert not is_decayed("blocks.0.fc.bias", torch.ones(3, 3))
    assert not is_hidden_matrix("blocks.0.norm.weight", torch.ones(3))
    assert is_hidden_matrix("blocks.0.fc.weight", torch.ones(3, 3))

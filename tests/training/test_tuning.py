"""Tuning a trained VAR: contrastive alignment against its formula, adapters against the network they merge into."""

import math

import pytest
import torch
from support.networks import make_var
from support.runs import fit

from varlab.checkpoints.adapters import merged
from varlab.checkpoints.load import load
from varlab.models.losses import cross_entropy
from varlab.training.initial_weights import like
from varlab.training.tuning import ConditionContrast, LoRA

STILL = {"drop_path": 0.0, "label_dropout": 0.0}


@pytest.fixture
def batch(tokenizer):
    sequence = torch.randint(12, (4, 30))
    inputs = tokenizer.quantizer.teacher_forcing_inputs(list(sequence.split([1, 4, 9, 16], dim=1)))
    return inputs.detach(), sequence, torch.tensor([0, 2, 2, 1])


def test_contrastive_alignment_is_its_formula(batch):
    """-log s(b r(own)) - w log s(-b r(other)), r: log-likelihood ratio to the network before tuning. The third image's other
    condition is its own, and does not count."""
    inputs, sequence, labels = batch
    net, objective = make_var(**STILL), ConditionContrast(beta=0.3, weight=5.0)
    objective.prepare(net)
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)

    def ratio(label, i):
        own, before = (
            -cross_entropy(network(inputs[i : i + 1], torch.tensor([label])), sequence[i : i + 1]).sum().item()
            for network in (net, objective.reference)
        )
        return own - before

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    own = [ratio(labels[i].item(), i) for i in range(4)]
    others = [ratio(labels[i - 1].item(), i) for i in range(4) if labels[i] != labels[i - 1]]
    assert len(others) == 3
    expected = -sum(map(log_sigmoid, (0.3 * r for r in own))) / 4 - 5 * sum(log_sigmoid(-0.3 * r) for r in others) / 3
    loss, logits, values = objective(net, *batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert values["train/ratio_own"].item() == pytest.approx(sum(own) / 4, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(logits, net(inputs, labels))


def test_alignment_raises_the_own_and_lowers_the_other_likelihood(batch):
    net, objective = make_var(**STILL), ConditionContrast(weight=1.0)
    objective.prepare(net)
    before = {name: value.clone() for name, value in objective.reference.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(20):
        loss, _, values = objective.train()(net, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values["train/ratio_own"] > 1 > -1 > values["train/ratio_other"]
    assert all(torch.equal(value, before[name]) for name, value in objective.reference.state_dict().items())
    assert not objective.reference.training


def test_dropout_is_refused_where_likelihoods_are_compared():
    with pytest.raises(ValueError, match="model.label_dropout=0"):
        ConditionContrast().prepare(make_var())


def test_an_adapter_changes_nothing_at_first_trains_little_and_merges(batch):
    inputs, _, labels = batch
    net = make_var(**STILL, width=64, depth=4).eval()
    plain = net(inputs, labels)
    LoRA(rank=1, targets=["blocks.*.attention.qkv"], trained=[]).apply(net)
    torch.testing.assert_close(net(inputs, labels), plain)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all(name.endswith((".up", ".down")) for name in trained)
    share = sum(p.numel() for p in net.parameters() if p.requires_grad) / sum(p.numel() for p in net.parameters())
    assert share < 0.02
    for name, parameter in net.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_()
    whole = make_var(**STILL, width=64, depth=4).eval()
    whole.load_state_dict(merged(net.state_dict()))
    torch.testing.assert_close(whole(inputs, labels), net(inputs, labels), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole(inputs, labels), plain, atol=1e-3)


def test_other_parametrizations_are_not_merged():
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    assert merged(linear.state_dict()).keys() == linear.state_dict().keys()
    orthogonal = {"a.parametrizations.weight.original": torch.ones(2, 2), "a.bias": torch.ones(2)}
    assert merged(orthogonal).keys() == orthogonal.keys()


def test_targets_that_match_nothing_are_named():
    with pytest.raises(ValueError, match=r"module.adapter.targets.*'attention'"):
        LoRA(targets=["attention"]).apply(make_var())


def test_a_network_like_another(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    _, var, _ = load(tmp_path / "checkpoints/last.ckpt")
    net = like(str(tmp_path / "checkpoints/last.ckpt"), num_classes=4, drop_path=0.0, label_dropout=None)
    assert (net.depth, net.width, net.num_classes, net.drop_path) == (var.depth, var.width, 4, 0.0)

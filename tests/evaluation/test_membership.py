"""Telling training images from others: the arithmetic, a fresh network, an overfitted one."""

import numpy as np
import pytest
import torch
from support.networks import make_var

from varlab.evaluation.membership import attack, auc, code_likelihood, copied, nearest, signals, true_positives
from varlab.models import losses


def test_auc_and_true_positives_against_plain_loops():
    random = np.random.default_rng(0)
    members, others = random.integers(0, 9, 40) + 2.0, random.integers(0, 9, 300) + 0.0
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))
    assert auc(others, others) == 0.5 and auc(others + 100, others) == 1.0
    threshold = min(t for t in others if np.mean(others > t) <= 0.01)
    assert true_positives(members, others) == np.mean(members > threshold)


def test_intervals_of_an_attack_contain_the_truth():
    """Two normal distributions one standard deviation apart: AUC 0.760."""
    random, hits = np.random.default_rng(0), 0
    for seed in range(40):
        low, high = attack(random.standard_normal(200) + 1, random.standard_normal(200), seed).auc_interval
        hits += low <= 0.7602 <= high
    assert hits >= 34
    few = attack(random.standard_normal(200), random.standard_normal(99))
    assert few.tpr is None and few.auc_interval[0] < few.auc < few.auc_interval[1]


def test_the_nearest_image_is_found_across_batches():
    images = torch.randn(30, 5)
    queries = images[[3, 17, 29]] + 0.01
    distance, number = nearest(queries, images.split(7))
    assert number.tolist() == [3, 17, 29]
    torch.testing.assert_close(distance, torch.full((3,), 0.01 * 5**0.5), rtol=1e-2, atol=1e-4)
    held_out = torch.linspace(1, 2, 1001)
    found = copied(torch.tensor([0.5, 1.005, 1.5, 1.6]), held_out)
    assert found["share_of_samples_nearer_than_1_percent_of_held_out"] == 0.5


def test_the_control_tells_sets_with_other_codes_apart():
    random = np.random.default_rng(0)
    low, high = random.integers(0, 4, (150, 30)), random.integers(0, 12, (150, 30))
    assert auc(code_likelihood(low, low, 12), code_likelihood(high, low, 12)) > 0.95


def memorize(tokenizer, var, sequence, labels, steps=150):
    """Trains on a few images until they are known by heart."""
    optimizer = torch.optim.AdamW(var.parameters(), lr=3e-3)
    with torch.no_grad():
        inputs = tokenizer.quantizer.teacher_forcing_inputs(list(sequence.split([1, 4, 9, 16], dim=1)))
    for _ in range(steps):
        loss = losses.cross_entropy(var(inputs, labels), sequence).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return var.eval()


def test_a_fresh_network_tells_nothing_and_an_overfitted_one_nearly_all(tokenizer):
    """Random tokens, so that nothing but memory can tell them apart."""
    sequence, labels = torch.randint(12, (240, 30)), torch.randint(3, (240,))
    fresh = make_var(label_dropout=0.1).eval()

    def both(var):
        return [
            signals(var, tokenizer.quantizer, [(sequence[part], labels[part])], "test")
            for part in (slice(0, 120), slice(120, 240))
        ]

    for name in ("likelihood", "condition_gain"):
        members, others = (found[name] for found in both(fresh))
        low, high = attack(members, others).auc_interval
        assert low <= 0.5 <= high
    known = memorize(tokenizer, make_var(label_dropout=0.1).train(), sequence[:120], labels[:120])
    members, others = (found["likelihood"] for found in both(known))
    assert attack(members, others).auc > 0.9 and attack(members, others).tpr > 0.5

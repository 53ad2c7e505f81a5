"""Which condition an image belongs to, by likelihood."""

import pytest
import torch
from support.networks import make_tokenizer, make_var

from varlab.evaluation.retrieval import groups_of, retrieval_scores
from varlab.sampling.generate import generate
from varlab.sampling.search import likelihood


def test_groups_have_distinct_conditions_and_use_as_many_images_as_they_can():
    conditions = torch.tensor([0, 1, 2, 3] * 5 + [0] * 7)
    groups = groups_of(conditions, 4)
    assert len(groups) == 5 and all(sorted(conditions[group].tolist()) == [0, 1, 2, 3] for group in groups)
    assert len(torch.cat(groups).unique()) == 20
    assert [group.tolist() for group in groups_of(conditions, 4)] == [group.tolist() for group in groups]
    assert len(groups_of(torch.arange(5000), 16)) == 64
    vectors = torch.randn(3, 6)[torch.tensor([0, 1, 2, 2, 1, 0])]
    assert all(len(torch.unique(vectors[group], dim=0)) == 3 for group in groups_of(vectors, 3))
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"retrieval={size}: give a number from 2 to 4"):
            groups_of(conditions, size)


def test_the_own_condition_is_found_where_the_network_knows_it_and_chance_where_not():
    tokenizer, var = make_tokenizer(), make_var().eval()
    torch.nn.init.normal_(var.head.weight)
    labels = torch.arange(3).repeat(20)
    _, token_maps = generate(var, tokenizer, labels, cfg_scale=0.0, return_tokens=True)
    sequences = torch.cat(list(token_maps), dim=1)
    batches = list(zip(sequences.split(9), labels.split(9), strict=True))
    found = retrieval_scores(var, tokenizer.quantizer, batches, 3)
    assert found["retrieval_images"] == 60 and found["retrieval_candidates"] == 3
    right = sum(
        int(likelihood(var, tokenizer.quantizer, row.expand(3, -1), torch.arange(3)).argmax() == label)
        for row, label in zip(sequences, labels, strict=True)
    )
    assert found["retrieval"] == pytest.approx(100 * right / 60) and found["retrieval_low"] > 45
    shuffled = [(sequence, (condition + 1) % 3) for sequence, condition in batches]
    assert retrieval_scores(var, tokenizer.quantizer, shuffled, 3)["retrieval_high"] < 33

"""Conditions, and their absence."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.networks import CLASS_NAMES, make_tokenizer, make_var

from varlab.checkpoints.export_folder import load_pretrained, save_pretrained
from varlab.models.conditioning import ClassEmbedder, ImageEmbedder
from varlab.pipeline import label_of
from varlab.sampling.generate import generate


def test_classes_go_by_name_or_number_and_unknown_ones_list_the_nearest():
    assert [label_of(label, CLASS_NAMES, 3) for label in ("Golden Retriever", "tinca tinca", "2", 1, 3)] == [
        1,
        0,
        2,
        1,
        3,
    ]
    with pytest.raises(ValueError, match="no class is called 'golden retreiver': the nearest are 'golden retriever'"):
        label_of("golden retreiver", CLASS_NAMES, 3)
    with pytest.raises(ValueError, match="label 9 is out of range: there are 3 classes, 0..2"):
        label_of(9, CLASS_NAMES, 3)
    with pytest.raises(ValueError, match="label 77 is out of range"):
        label_of("77", CLASS_NAMES, 3)


def test_labels_are_dropped_in_training_only():
    var, labels = make_var(label_dropout=0.25), torch.zeros(4000, dtype=torch.long)
    dropped = var.train().embedder.drop(labels)
    assert set(dropped.tolist()) == {0, var.null_label}
    assert (dropped == var.null_label).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(var.eval().embedder.drop(labels), labels)


def test_a_custom_embedder_is_rebuilt_and_guides(extend_page, tmp_path):
    embedder = partial(extend_page("deep_embedder").DeepEmbedder, dim=5)
    var = make_var(embedder=embedder).eval()
    save_pretrained(tmp_path / "saved", make_tokenizer(), var, None, {})
    tokenizer, again, _ = load_pretrained(tmp_path / "saved", trust_code=True)
    condition = torch.randn(3, 5)
    plain = generate(again, tokenizer, condition, cfg_scale=0.0)
    assert torch.equal(plain, generate(var, tokenizer, condition, cfg_scale=0.0))
    assert not torch.equal(plain, generate(again, tokenizer, condition, cfg_scale=4.0))
    assert not torch.equal(plain, generate(again, tokenizer, condition + 1, cfg_scale=0.0))
    with pytest.raises(ValueError, match=r"condition of an image has shape \(4,\), DeepEmbedder takes \(5,\)"):
        generate(again, tokenizer, torch.randn(3, 4))


def test_the_null_label_is_the_last_row_and_a_tenth_is_dropped_by_default():
    embedder = ClassEmbedder(num_classes=5, width=8).train()
    assert embedder.embedding.weight.shape == (6, 8) and embedder.dropout == 0.1
    assert embedder.null(torch.tensor([0, 3])).tolist() == [5, 5]
    assert torch.equal(embedder(torch.tensor([5])), embedder.embedding.weight[5:])
    embedder.check(torch.tensor([0, 5]))
    for label in (-1, 6):
        with pytest.raises(ValueError, match=f"label {label} is out of range: there are 5 classes"):
            embedder.check(torch.tensor([0, label]))


def test_without_dropout_no_random_number_is_drawn():
    embedder, state = ClassEmbedder(5, 8, dropout=0.0).train(), torch.get_rng_state()
    assert embedder.drop(torch.arange(5)).tolist() == list(range(5)) and torch.equal(torch.get_rng_state(), state)


def test_names_that_differ_in_case_are_two_classes():
    names = ["A", "a", "b", "7"]
    assert [label_of(name, names, 4) for name in ("A", "a", "b", "B", "7", "3")] == [0, 1, 2, 2, 3, 3]


def test_a_number_that_names_another_class_is_refused():
    names = [str(number) for number in range(1, 13)]
    assert label_of("2", names, 12) == 1 and label_of(0, names, 12) == 0
    for number in (2, 12):
        with pytest.raises(
            ValueError, match=f"{number} is the name of class {number - 1}, but number {number} is another"
        ):
            label_of(number, names, 12)
    digits = [str(number) for number in range(10)]
    assert [label_of(number, digits, 10) for number in range(11)] == list(range(11))


def test_what_an_image_adds_to_a_token_is_what_lies_under_it():
    embedder = ImageEmbedder(0, width=24, image_size=(4, 8), patch=2).eval()
    assert embedder.num_prefix == 0 and embedder.condition_shape == (3, 4, 8) and embedder.kind == "image"
    image, pyramid = torch.randn(1, 3, 4, 8), [1, [1, 2], [2, 4]]
    other = image.clone()
    other[:, :, 2:, 4:6] += 1  # under the third token of the second row of the finest map
    differs = (embedder.at_tokens(other, pyramid) - embedder.at_tokens(image, pyramid)).abs().amax(dim=2)[0] > 1e-6
    assert differs.tolist() == [True, False, True, *[False] * 6, True, False]
    fine = embedder.part(image[:, :, 2:, 4:6].flatten(1))
    torch.testing.assert_close(embedder.at_tokens(image, pyramid)[:, 9], fine)
    torch.testing.assert_close(embedder(image), embedder.whole(F.adaptive_avg_pool2d(image, 2).flatten(1)))
    nothing = embedder.null(image)
    assert not nothing.any() and not embedder.at_tokens(nothing, pyramid).any()
    with pytest.raises(
        ValueError, match=r"condition of an image has shape \(3, 8, 4\), ImageEmbedder takes \(3, 4, 8\)"
    ):
        embedder.check(torch.zeros(1, 3, 8, 4))
    dropped = embedder.train().drop(torch.ones(2000, 3, 4, 8))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="patch=0 of the condition: give 1 or more values per side of a token"):
        ImageEmbedder(0, width=24, image_size=(4, 8), patch=0)

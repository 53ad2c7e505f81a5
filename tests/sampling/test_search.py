"""Best of several candidates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import CLASS_NAMES
from support.runs import config

from varlab.commands import sample
from varlab.sampling.acceleration import Drawn
from varlab.sampling.generate import generate
from varlab.sampling.search import STRIDE, ConditionGain, draw_best, likelihoods
from varlab.sampling.token_sampling import SamplingSettings

LABELS = torch.tensor([0, 1, 2, 0, 1])


class Darkest:
    """Prefers dark images."""

    def __call__(self, drawn, condition):
        return -drawn.images.mean(dim=(1, 2, 3))


class PerBatch:
    """A wrong scorer: one score for all."""

    def __call__(self, drawn, condition):
        return drawn.images.mean()


def candidates(var, tokenizer, num):
    made = [
        generate(var, tokenizer, LABELS, seed=[7 + i + n * STRIDE for i in range(5)], return_tokens=True)
        for n in range(num)
    ]
    return torch.stack([images for images, _ in made]), [torch.cat(maps, dim=1) for _, maps in made]


def test_the_kept_image_is_the_candidate_with_the_largest_score(var, tokenizer):
    images, _ = candidates(var, tokenizer, 4)
    assert len({image.mean().item() for image in images[:, 0]}) == 4
    drawn = draw_best(var, tokenizer, LABELS, SamplingSettings(), [7 + i for i in range(5)], "none", 4, Darkest())
    kept = drawn.images
    assert torch.equal(tokenizer.quantizer.partial_sums(drawn.token_maps)[-1], drawn.f_hat)
    for i in range(5):
        assert torch.equal(kept[i], images[images[:, i].mean(dim=(1, 2, 3)).argmin(), i])
    first = draw_best(
        var, tokenizer, LABELS, SamplingSettings(), [7 + i for i in range(5)], "none", 1, Darkest()
    ).images
    assert torch.equal(first, images[0])


@torch.no_grad()
def test_without_a_scorer_the_condition_decides(var, tokenizer):
    images, tokens = candidates(var, tokenizer, 3)
    gains = torch.stack([torch.sub(*likelihoods(var, tokenizer.quantizer, sequence, LABELS)) for sequence in tokens])
    kept = draw_best(var, tokenizer, LABELS, SamplingSettings(), [7 + i for i in range(5)], "none", 3, None).images
    for i in range(5):
        assert torch.equal(kept[i], images[gains[:, i].argmax(), i])


@torch.no_grad()
def test_the_gain_is_the_difference_of_two_losses_by_hand(var, tokenizer):
    tokens = [torch.randint(12, (2, pn * pn)) for pn in var.patch_nums]
    inputs, sequence = tokenizer.quantizer.teacher_forcing_inputs(tokens, var.order), torch.cat(tokens, dim=1)
    given = var(inputs, torch.tensor([2, 0])).log_softmax(-1).gather(2, sequence[..., None])[..., 0]
    blind = var(inputs, torch.full((2,), var.null_label)).log_softmax(-1).gather(2, sequence[..., None])[..., 0]

    drawn = Drawn(torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 16, 16), tokens)
    gain = ConditionGain(var, tokenizer)(drawn, torch.tensor([2, 0]))
    assert torch.allclose(gain, (given - blind).mean(dim=1), atol=1e-5)


def test_a_score_that_is_no_number_never_wins(var, tokenizer):
    images, _ = candidates(var, tokenizer, 3)
    scores = iter([[1.0, float("nan"), 1, 1, 1], [2.0, 0.0, 0, 0, 0], [float("nan"), float("nan"), 0, 0, 0]])
    settings = (SamplingSettings(), [7 + i for i in range(5)], "none", 3)
    kept = draw_best(var, tokenizer, LABELS, *settings, lambda *_: np.array(next(scores))).images
    assert (
        torch.equal(kept[0], images[1, 0]) and torch.equal(kept[1], images[1, 1]) and torch.equal(kept[2], images[0, 2])
    )


def test_a_scorer_of_one_number_is_refused(var, tokenizer):
    with pytest.raises(ValueError, match=r"shape \(\), not one score per image: \(5,\)"):
        draw_best(var, tokenizer, LABELS, SamplingSettings(), list(range(5)), "none", 2, PerBatch())


def test_the_record_tells_the_search_and_its_cost(export_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = [f"checkpoint={export_folder}", "num=6", "seed=3", "device=cpu"]
    scorer = "scorer={_target_: test_search.Darkest}"
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sample.run(config(tmp_path, *shared, "out=one", verb="sample"))
    for size in (2, 6):  # the same whatever the batches are
        sample.run(
            config(tmp_path, *shared, f"out=three{size}", "best_of=3", f"batch_size={size}", scorer, verb="sample")
        )
    records = {name: json.loads((tmp_path / name / "samples.json").read_text()) for name in ("one", "three2", "three6")}
    assert records["one"]["best_of"] == 1 and records["one"]["seconds_per_image"] > 0
    assert records["three2"]["best_of"] == 3 and records["three2"]["scorer"] == {"_target_": "test_search.Darkest"}
    pictures = {name: sorted((tmp_path / name / "images").iterdir()) for name in records}
    pixels = {name: [file.read_bytes() for file in files] for name, files in pictures.items()}
    assert pixels["three2"] == pixels["three6"] != pixels["one"]
    for out, changed in (
        ("one", ["best_of=2"]),
        ("three2", []),
        ("three2", ["best_of=3", "scorer={_target_: test_search.PerBatch}"]),
    ):
        with pytest.raises(ValueError, match=r"made with other settings \((best_of|scorer|best_of, scorer)\)"):
            sample.run(config(tmp_path, *shared, f"out={out}", *changed, verb="sample"))
    sample.run(config(tmp_path, *shared, "out=bf16", "best_of=2", "precision=bf16", verb="sample"))
    sample.run(config(tmp_path, *shared, "out=one", verb="sample"))
    assert json.loads((tmp_path / "one/samples.json").read_text()) == records["one"]
    with pytest.raises(ValueError, match="best_of=0"):
        sample.run(config(tmp_path, *shared, "out=none", "best_of=0", verb="sample"))
    with pytest.raises(ValueError, match="give best_of=2 or more, too"):
        sample.run(config(tmp_path, *shared, "out=none", scorer, verb="sample"))
    assert len(CLASS_NAMES) == 3

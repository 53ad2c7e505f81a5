"""Health of the codebook: measures, remedies, the alarm."""

import csv
from itertools import pairwise

import pytest
import torch
from support.networks import make_tokenizer
from support.runs import command, fit, images_overrides

from varlab.models.quantizer import perplexity, rotated
from varlab.training import codebook_callbacks
from varlab.training.codebook_callbacks import CollapseAlarm, KMeansInit, ResetDeadCodes, fit_codes


def test_perplexity_counts_codes_in_use():
    assert perplexity(torch.tensor([[5.0, 5, 5, 5], [7, 0, 0, 0]])).tolist() == pytest.approx([4, 1])


def test_rotation_gives_the_codes_and_turns_the_gradient():
    f, f_hat = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 6, 3, 3)
    through = rotated(f, f_hat)
    torch.testing.assert_close(through, f_hat)
    wanted = torch.randn_like(f_hat)
    through.backward(wanted)
    ratio = f_hat.norm(dim=1) / f.detach().norm(dim=1)
    torch.testing.assert_close(f.grad.norm(dim=1), ratio * wanted.norm(dim=1))
    angle = (wanted * f_hat).sum(dim=1) / f_hat.norm(dim=1)
    turned = (f.grad * f.detach()).sum(dim=1) / f.detach().norm(dim=1)
    torch.testing.assert_close(turned, ratio * angle)  # along the code before, along the feature after


def test_the_rotation_of_a_zero_map_stays_finite():
    f = torch.zeros(1, 6, 2, 2, requires_grad=True)
    rotated(f, torch.zeros(1, 6, 2, 2)).sum().backward()
    assert torch.isfinite(f.grad).all()


def test_scale_dropout_stops_some_images_and_only_while_training():
    tokenizer = make_tokenizer(scale_dropout=0.5, dropout_from=1)
    quantizer = tokenizer.quantizer.train()
    last = quantizer.last_scales(4000, torch.device("cpu"))
    assert last.min() == 1 and last.max() == 3
    assert (last < 3).float().mean() == pytest.approx(0.5 * 2 / 3, abs=0.04)
    f = torch.randn(64, 6, 4, 4)
    torch.manual_seed(3)
    dropped = quantizer(f)
    torch.manual_seed(3)
    last = quantizer.last_scales(64, torch.device("cpu"))
    partial = quantizer.partial_sums(dropped.token_maps)
    expected = torch.stack([partial[int(k)][i] for i, k in enumerate(last)])
    torch.testing.assert_close(dropped.f_hat, expected)
    quantizer.eval()
    torch.testing.assert_close(quantizer(f).f_hat, quantizer.partial_sums(quantizer.encode(f))[-1])
    with pytest.raises(ValueError, match="scale_dropout=2.0: give a fraction"):
        make_tokenizer(scale_dropout=2.0)


def test_losses_by_scale_have_the_loss_as_their_mean():
    out = make_tokenizer().quantizer(torch.randn(3, 6, 4, 4))
    assert out.vq_losses.shape == (4,) and torch.equal(out.vq_losses.mean(), out.vq_loss)


@pytest.mark.parametrize("lookup", ["l2", "cosine"])
def test_distances_in_chunks_are_the_same(lookup, monkeypatch):
    quantizer = make_tokenizer(lookup=lookup).quantizer
    z = torch.randn(5, 9, 6)
    whole = quantizer.nearest(z)
    monkeypatch.setattr("varlab.models.quantizer.MAX_DISTANCES", 12 * 4)
    assert torch.equal(whole, quantizer.nearest(z))
    exact = torch.cdist(z.double(), quantizer.codebook.weight.double()[None]).argmin(dim=2)
    assert lookup == "cosine" or torch.equal(whole, exact)


def test_k_means_brings_codes_to_the_vectors():
    quantizer, vectors = make_tokenizer().quantizer, torch.randn(600, 6)
    errors = []
    for num_iterations in (0, 1, 3, 10):
        fit_codes(quantizer, vectors, num_iterations, seed=0)
        errors.append(float((vectors - quantizer.codebook.weight[quantizer.nearest(vectors[None])[0]]).square().mean()))
    assert all(b < a for a, b in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    fit_codes(quantizer, vectors, 200, seed=0)  # converged: every code is the mean of its vectors
    nearest, codes = quantizer.nearest(vectors[None])[0], quantizer.codebook.weight
    for code in range(12):
        torch.testing.assert_close(codes[code], vectors[nearest == code].mean(dim=0))
    fit_codes(quantizer, vectors[:3], num_iterations=2, seed=0)  # fewer vectors than codes
    assert torch.isfinite(quantizer.codebook.weight).all()


def logged(folder, name) -> list[float]:
    return [float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row.get(name)]


def test_k_means_begins_with_a_smaller_loss(tmp_path, digits_folder):
    overrides = images_overrides(digits_folder)
    fit(tmp_path / "plain", *overrides)
    fit(tmp_path / "kmeans", *overrides, f"callbacks.kmeans={{_target_: {KMeansInit.__module__}.KMeansInit}}")
    plain, kmeans = (logged(tmp_path / name, "train/vq_loss")[0] for name in ("plain", "kmeans"))
    assert kmeans < 0.9 * plain
    assert logged(tmp_path / "kmeans", "train/perplexity")[0] > 0.8 * logged(tmp_path / "plain", "train/perplexity")[0]


def test_dead_codes_are_revived(tmp_path, digits_folder):
    revive = (
        f"callbacks.reset_dead_codes={{_target_: {ResetDeadCodes.__module__}.ResetDeadCodes, every: 3, min_share: 0.5}}"
    )
    ema = "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.99}"
    settings = [*images_overrides(digits_folder), "model.quantizer.codebook_size=64", "save_every=9"]
    fit(tmp_path / "plain", *settings, ema)
    fit(tmp_path / "revived", *settings, revive, ema)
    assert logged(tmp_path / "revived", "train/codes_reset")[0] > 10
    both = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("plain", "revived")]
    name = "net.quantizer.codebook.weight"
    moved = (both[0]["state_dict"][name] - both[1]["state_dict"][name]).abs().sum(dim=1) > 0.02
    assert moved.sum() > 10
    near = both[1]["ema"][name] - both[1]["state_dict"][name]
    assert near[moved].abs().max() < 0.02  # the averaged codes moved along


def test_remedies_choose_alike_on_all_ranks(tmp_path, digits_folder):
    remedies = [
        f"callbacks.reset_dead_codes={{_target_: {ResetDeadCodes.__module__}.ResetDeadCodes, every: 2, min_share: 0.5}}",
        f"callbacks.kmeans={{_target_: {KMeansInit.__module__}.KMeansInit}}",
        "model.quantizer.gradient=rotation",
        "model.quantizer.scale_dropout=0.3",
    ]
    logs = [
        "+callbacks.codebook._target_=support.fault_callbacks.CodebookLog",
        f"+callbacks.codebook.file={tmp_path / 'hash'}",
    ]
    ddp = ["trainer.devices=2", "trainer.strategy=ddp", "model.quantizer.codebook_size=64"]
    finished = command(tmp_path, *images_overrides(digits_folder), *remedies, *logs, *ddp, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert sum(logged(tmp_path, "train/codes_reset")) > 0
    assert (tmp_path / "hash.0").read_text() == (tmp_path / "hash.1").read_text()


def test_the_alarm_rings_once_for_a_scale_and_says_when_it_is_over():
    alarm, good, bad = CollapseAlarm(factor=4.0, minimum=2.0), torch.tensor([3.0, 12.0]), torch.tensor([3.0, 2.5])
    assert alarm.check(good, 200, [1, 2]) == []
    (message,) = alarm.check(bad, 300, [1, 2])
    assert message.startswith(
        "step 300: the codebook collapses at scale 1 (2): 2.5 codes in use, at most 12.0 before. Remedies: callb"
    )
    assert alarm.check(bad, 400, [1, 2]) == []
    again = CollapseAlarm()
    again.load_state_dict(alarm.state_dict())
    assert again.check(bad, 500, [1, 2]) == []
    assert again.check(good, 600, [1, 2]) == ["step 600: scale 1 (2) has recovered: 12.0 codes in use"]
    assert (
        len(again.check(torch.tensor([1.5, 12.0]), 700, [1, 2])) == 1
    )  # fewer than two codes, though once there were three


def test_a_run_whose_codes_collapse_says_so(tmp_path, digits_folder, caplog):
    settings = ["callbacks.collapse.patience=2", "callbacks.collapse.minimum=13.0"]  # more than there are codes
    fit(tmp_path, *images_overrides(digits_folder), *settings)
    assert caplog.text.count("the codebook collapses at scale") == 4
    assert set(logged(tmp_path, "train/collapsed_scales")) == {4}


def test_random_rows_repeat_only_where_there_are_too_few():
    rows = codebook_callbacks.random_rows(torch.arange(4.0)[:, None], 10, seed=0)
    assert rows.shape == (10, 1) and set(rows.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("value", [1 / 255, 0.7, -1.0])
def test_constant_images_are_coded(value):
    tokenizer = make_tokenizer(gradient="rotation").train()
    images = torch.full((4, 3, 16, 16), value)
    output = tokenizer(images)
    output.images.sum().backward()
    assert torch.isfinite(output.images).all() and torch.isfinite(output.vq_loss)
    assert all(torch.isfinite(p.grad).all() for p in tokenizer.parameters() if p.grad is not None)
    assert torch.equal(tokenizer.encode(images)[3][0], tokenizer.encode(images)[3][1])


def test_images_that_cannot_be_coded_are_refused():
    tokenizer = make_tokenizer()
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        tokenizer.encode(images)
    with pytest.raises(ValueError, match=r"images are \(16, 20\) pixels; patch_nums .* need \(16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 16, 20))

"""The residual loop against plain loops, and what must hold for any pyramid."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import make_tokenizer

from varlab.models.codes.finite_scalar import FiniteScalarQuantizer
from varlab.models.quantizer import MultiScaleQuantizer, perplexity, rotated


def quantizer(patch_nums=(1, 2, 3, 4), **kwargs) -> MultiScaleQuantizer:
    made = MultiScaleQuantizer(patch_nums, codebook_size=12, codebook_dim=6, **kwargs)
    torch.nn.init.normal_(made.codebook.weight)
    return made.eval()


@pytest.mark.parametrize("lookup", ["l2", "cosine"])
@pytest.mark.parametrize("num_phis", [4, 1, None])
def test_encode_equals_a_plain_loop_over_positions(lookup, num_phis):
    q, f = quantizer(lookup=lookup, num_phis=num_phis), torch.randn(2, 6, 4, 4)
    codes, residual, expected = q.codebook.weight, f.clone(), []
    for k, pn in enumerate([1, 2, 3, 4]):
        z, tokens = F.adaptive_avg_pool2d(residual, pn), torch.empty(2, pn, pn, dtype=torch.long)
        for b in range(2):
            for y in range(pn):
                for x in range(pn):
                    v = z[b, :, y, x]
                    scores = (
                        -F.cosine_similarity(v[None], codes) if lookup == "cosine" else (v - codes).square().sum(dim=1)
                    )
                    tokens[b, y, x] = scores.argmin()
        h = F.interpolate(codes[tokens].permute(0, 3, 1, 2), size=(4, 4), mode="bicubic")
        conv = q.phis[0 if num_phis == 1 else k]
        residual = residual - (0.5 * h + 0.5 * conv(h))
        expected.append(tokens.flatten(1))
    with torch.no_grad():
        for ours, theirs in zip(q.encode(f), expected, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_last_partial_sum_is_what_encoding_left_behind():
    q, f = quantizer(), torch.randn(2, 6, 4, 4)
    f_hat, token_maps = q(f).f_hat, q.encode(f)
    torch.testing.assert_close(q.partial_sums(token_maps)[-1], f_hat)
    assert [tokens.shape[1] for tokens in token_maps] == [1, 4, 9, 16]


def test_the_gradient_of_the_output_passes_straight_to_f():
    q, f = quantizer(), torch.randn(1, 6, 4, 4, requires_grad=True)
    weights = torch.randn(1, 6, 4, 4)
    (grad,) = torch.autograd.grad((q(f).f_hat * weights).sum(), f)
    torch.testing.assert_close(grad, weights)


def test_vq_loss_is_the_mean_error_after_each_scale():
    q, f = quantizer(), torch.randn(2, 6, 4, 4)
    errors = [F.mse_loss(f_hat, f) for f_hat in q.partial_sums(q.encode(f))]
    torch.testing.assert_close(q(f).vq_loss, 1.25 * torch.stack(errors).mean())


@torch.no_grad()
def test_teacher_forcing_inputs_see_only_coarser_scales():
    q = quantizer()
    token_maps = [torch.randint(12, (1, pn * pn)) for pn in (1, 2, 3, 4)]
    before = q.teacher_forcing_inputs(token_maps)
    token_maps[2] = (token_maps[2] + 1) % 12
    after = q.teacher_forcing_inputs(token_maps)
    assert torch.equal(before[:, : 4 + 9], after[:, : 4 + 9])  # inputs of scales 1 and 2
    assert not torch.allclose(before[:, 4 + 9 :], after[:, 4 + 9 :])


@torch.no_grad()
def test_one_scale_and_non_square_maps_work():
    one = quantizer(patch_nums=[4])
    assert one.teacher_forcing_inputs(one.encode(torch.randn(2, 6, 4, 4))).shape == (2, 0, 6)
    wide = quantizer(patch_nums=[1, (1, 2), (2, 4)])
    assert [tokens.shape[1] for tokens in wide.encode(torch.randn(2, 6, 2, 4))] == [1, 2, 8]


def test_a_phi_ratio_of_zero_is_the_identity_without_parameters():
    q = quantizer(phi_ratio=0.0)
    assert not list(q.phis.parameters())
    h = torch.randn(1, 6, 4, 4)
    assert torch.equal(q.phi(h, 0), h)


@torch.no_grad()
def test_the_residual_loop_stays_in_fp32_under_autocast():
    q, f = quantizer(), torch.randn(2, 6, 4, 4)
    expected, inputs = q(f), q.teacher_forcing_inputs(q.encode(f))
    with torch.autocast("cpu", torch.bfloat16):
        output, token_maps = q(f), q.encode(f)
        torch.testing.assert_close(output.f_hat, expected.f_hat)
        torch.testing.assert_close(q.teacher_forcing_inputs(token_maps), inputs)
    for tokens, forward, encoded in zip(expected.token_maps, output.token_maps, token_maps, strict=True):
        assert torch.equal(tokens, forward) and torch.equal(tokens, encoded)


def test_usage_counts_each_scale_by_its_own_hits():
    q = quantizer()
    token_maps = [torch.zeros(8, pn * pn, dtype=torch.long) for pn in (1, 2, 3, 4)]
    token_maps[3] = torch.arange(12).repeat(11)[:128].view(8, 16)
    q.update_hits(token_maps)
    usage = q.codebook_usage(8).tolist()
    assert usage[3] == pytest.approx(100)
    assert usage[2] == pytest.approx(100 / 12)
    q.update_hits(token_maps)
    torch.testing.assert_close(q.hits.sum(dim=1), torch.tensor([8.0, 32, 72, 128]))


@pytest.mark.parametrize("patch_nums", [[], [2, 1], [0, 1], [1, (2, 1), (1, 2)]])
def test_a_pyramid_that_shrinks_is_refused(patch_nums):
    with pytest.raises(ValueError, match="patch_nums"):
        quantizer(patch_nums=patch_nums)


def test_an_unknown_lookup_is_named():
    with pytest.raises(ValueError, match="lookup='dot'"):
        quantizer(lookup="dot")


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


@pytest.mark.parametrize("lookup", ["l2", "cosine"])
def test_distances_in_chunks_are_the_same(lookup, monkeypatch):
    quantizer = make_tokenizer(lookup=lookup).quantizer
    z = torch.randn(5, 9, 6)
    whole = quantizer.nearest(z)
    monkeypatch.setattr("varlab.models.quantizer.MAX_DISTANCES", 12 * 4)
    assert torch.equal(whole, quantizer.nearest(z))
    exact = torch.cdist(z.double(), quantizer.codebook.weight.double()[None]).argmin(dim=2)
    assert lookup == "cosine" or torch.equal(whole, exact)


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


def test_codes_start_uniform_within_the_released_bound():
    q = MultiScaleQuantizer([1, 2], codebook_size=4096, codebook_dim=32)
    q.init_weights()
    bound = 1 / (36 * 32**0.5)
    weight = q.codebook.weight.detach()
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert weight.mean().abs() < bound / 50 and q.scale_dropout == 0


def test_the_average_of_hits_starts_with_the_first_batch_and_slows_down_after_a_hundred():
    q = quantizer([1, 2])
    tokens = [torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)]
    other = [torch.ones_like(maps) for maps in tokens]
    q.update_hits(tokens)
    assert q.hits[:, 0].tolist() == [2, 8]
    q.update_hits(other)
    assert q.hits[0, :2].tolist() == pytest.approx([1.8, 0.2])
    for updates, momentum in [(99, 0.9), (100, 0.99)]:
        q.num_updates.fill_(updates)
        q.hits.zero_()
        q.update_hits(other)
        assert float(q.hits[0, 1]) == pytest.approx(2 * (1 - momentum))


def test_a_code_counts_as_used_from_8_percent_of_the_mean_hits_on():
    q = quantizer([1, (2, 3)])
    num_codes, batch = q.codebook_size, 4
    threshold = 0.08 * batch * 6 / num_codes
    q.hits[0, :3] = torch.tensor([threshold * 1.001, threshold * 0.999, 50.0])
    assert q.codebook_usage(batch).tolist() == pytest.approx([100 * 2 / num_codes, 0])
    q.hits.zero_()
    q.hits[1, :3] = torch.tensor([100.0, 0.08 * 100 / num_codes * 1.2, 0.08 * 100 / num_codes * 0.8])
    assert float(q.overall().usage) == pytest.approx(100 * 2 / num_codes)


def test_lookup_vectors_are_what_the_codes_of_each_scale_are_chosen_from():
    q = quantizer([1, 2, 4])
    f = torch.randn(2, q.codebook_dim, 4, 4)
    vectors = q.lookup_vectors(f)
    assert [tuple(v.shape) for v in vectors] == [
        (2, 1, q.codebook_dim),
        (2, 4, q.codebook_dim),
        (2, 16, q.codebook_dim),
    ]
    for chosen, tokens in zip(vectors, q.encode(f), strict=True):
        assert torch.equal(q.nearest(chosen), tokens)
    torch.testing.assert_close(vectors[0][:, 0], f.mean(dim=(2, 3)))


def test_digits_are_counted_each_by_itself():
    """100 tokens: 8 levels alike, and 2 levels of which one has 2 hits, fewer than 8 % of the mean of 50."""
    q = FiniteScalarQuantizer([1, 10], levels=[8, 2])
    rare = torch.cat([torch.ones(2), torch.zeros(98)]).long()
    tokens = torch.arange(100) % 8 + 8 * rare
    q.update_hits([torch.zeros(1, 1, dtype=torch.long), tokens[None]])
    assert q.hits[1].tolist() == [13, 13, 13, 13, 12, 12, 12, 12, 98, 2]
    assert q.codebook_usage(1)[1].item() == pytest.approx(100 * 9 / 10)
    assert q.overall().usage.item() == pytest.approx(100 * 9 / 10)
    of_two = math.exp(-(0.98 * math.log(0.98) + 0.02 * math.log(0.02)))
    assert q.perplexity()[1].item() == pytest.approx(8 * of_two, rel=1e-2)
    assert q.perplexity()[0].item() == pytest.approx(1)

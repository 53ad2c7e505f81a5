"""The residual loop against plain loops, and what must hold for any pyramid."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import make_tokenizer

from varlab.models.quantizer import MultiScaleQuantizer


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


def test_images_of_another_size_are_refused_with_both_sizes(tokenizer):
    with pytest.raises(ValueError, match=r"\(20, 20\).*\(16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 20, 20))


def test_widths_that_do_not_divide_into_norm_groups_are_refused():
    with pytest.raises(ValueError, match="num_groups=3"):
        make_tokenizer(num_groups=3)


@torch.no_grad()
def test_the_filmstrip_ends_with_the_reconstruction(tokenizer):
    token_maps = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    strip = tokenizer.filmstrip(token_maps)
    assert torch.equal(strip[-1], tokenizer.decode(token_maps))
    assert torch.equal(strip[1], tokenizer.decode(token_maps[:2]))

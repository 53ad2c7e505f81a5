"""What is to be kept is kept, what is to be edited is not; wrong masks are named."""

import pytest
import torch

from varlab.sampling.editing import box_mask, composite, edit, edit_errors, keep_masks, latent_mask


def test_kept_tokens_stay(var, tokenizer, labels):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        everything = edit(var, tokenizer, images, torch.ones(4, 4), labels, cfg_scale=1.0)
        torch.testing.assert_close(
            everything, tokenizer.decode(tokenizer.encode(images)) / 2 + 0.5, rtol=1e-4, atol=1e-5
        )


BOX = (0.25, 0.25, 0.75, 0.75)


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16) * 2 - 1


@pytest.mark.parametrize("blend", ["tokens", "latents"])
def test_keeping_everything_is_reconstruction(blend, var, tokenizer, images, labels):
    edited = edit(var, tokenizer, images, torch.ones(4, 4), labels, blend=blend, cfg_scale=2.0)
    with torch.no_grad():
        expected = tokenizer.decode(tokenizer.encode(images)) / 2 + 0.5
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)


def test_less_strength_keeps_coarse_tokens_in_the_region():
    keep = 1 - box_mask(BOX, (4, 4))
    sums = [[int(mask.sum()) for mask in keep_masks(keep, [1, 2, 3, 4], strength)] for strength in (1.0, 0.5, 0.25)]
    assert sums[0][0] == 1 and sums[0][3] == 12
    assert sums[1] == [1, 4, sums[0][2], 12] and sums[2] == [1, 4, 9, 12]
    with pytest.raises(ValueError, match="strength=0.0: must be above 0 and at most 1"):
        keep_masks(keep, [1, 2], 0.0)


def test_latents_follow_the_image_where_it_is_kept(var, tokenizer, images, labels):
    """After the last scale the sum of codes is the image's own there, which tokens alone do not achieve."""
    keep = 1 - box_mask(BOX, (4, 4))
    found = {}
    for blend in ("tokens", "latents"):
        seen = []
        handle = tokenizer.post_conv.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(inputs[0])
        )
        edit(var, tokenizer, images, keep, labels, blend=blend, cfg_scale=2.0)
        handle.remove()
        own = tokenizer.quantizer.partial_sums(tokenizer.encode(images))[-1]
        found[blend] = ((seen[-1] - own).abs() * keep).max().item()
    assert found["latents"] == 0 < found["tokens"]


def test_a_composite_is_exact_where_the_image_is_kept_and_fades_beside_it():
    originals, edited, keep = torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), 1 - box_mask(BOX, (16, 16))
    hard, soft = composite(edited, originals, keep), composite(edited, originals, keep, feather=3)
    assert torch.equal(hard[0, 0], keep)
    assert (soft[0, 0][keep > 0.5] == 1).all()
    row = soft[0, 0, 8]
    assert 0 < row[6] < row[5] < row[4] < 1 and row[7] == 0 and torch.equal(row, row.flip(0))


def test_errors_are_in_levels():
    originals, keep = torch.full((1, 3, 16, 16), 0.5), 1 - box_mask(BOX, (16, 16))
    edited = torch.where(keep > 0.5, 0.5 + 10 / 255, 0.5 + 30 / 255).expand(1, 3, 16, 16)
    errors = edit_errors(edited, originals, keep)
    assert (errors.outside, errors.seam, errors.usual) == pytest.approx((10.0, 20.0, 0.0), abs=1e-3)
    same = edit_errors(originals, originals, keep)
    assert (same.outside, same.seam) == (0.0, 0.0)


def test_a_latent_position_is_kept_when_all_its_pixels_are():
    keep = torch.ones(16, 16)
    keep[3, 3] = 0
    assert latent_mask(keep, (4, 4)).tolist()[0] == [0.0, 1.0, 1.0, 1.0] and latent_mask(keep, (4, 4)).sum() == 15

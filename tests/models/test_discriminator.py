"""Discriminators of the tokenizer."""

import pytest
import torch
from torch import nn

from varlab.models.discriminator import DiffAugment, DINODiscriminator, PatchDiscriminator


def test_a_patch_logit_sees_seventy_pixels():
    net = PatchDiscriminator(channels=8).eval()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    for module in net.modules():  # group norm sees all of the image; without it a logit sees its patch
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    logits = net(image)
    side = int(logits.shape[1] ** 0.5)
    logits[0, side * (side // 2) + side // 2].backward()
    rows = image.grad[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize("side", [64, 224, 300])
def test_the_dino_discriminator_classifies_tokens_of_images_of_any_size(side):
    net = DINODiscriminator(is_random=True)
    assert {name.split(".")[0] for name in net.state_dict()} == {"heads"}
    image = torch.rand(2, 3, side, side, requires_grad=True)
    logits = net(image)
    assert logits.shape == (2, 5 * 196)
    logits.sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.trunk.buffers())
    assert all(p.grad is not None for p in net.heads.parameters() if p.requires_grad)


def test_dino_weights_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r"adversarial.discriminator.weights=FILE \(dino_deitsmall16_pretrain.pth\)"):
        DINODiscriminator()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_images_too_small_for_patches_are_refused(num_layers):
    net = PatchDiscriminator(channels=8, num_layers=num_layers)
    smallest = 3 * 2**num_layers
    assert net(torch.rand(1, 3, smallest, smallest + 8)).shape[1] >= 1
    with pytest.raises(ValueError, match=f"needs {smallest}: set adversarial.discriminator.num_layers to less"):
        net(torch.rand(1, 3, smallest - 1, 64))


@pytest.mark.parametrize("policy", [["color"], ["translation"], ["cutout"], ["color", "translation", "cutout"]])
def test_augmentations_change_images_and_pass_gradients(policy):
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    augmented = DiffAugment(policy)(images)
    assert augmented.shape == images.shape and not torch.equal(augmented, images)
    augmented.sum().backward()
    assert images.grad.abs().sum() > 0
    torch.manual_seed(1)
    first = DiffAugment(policy)(images)
    torch.manual_seed(1)
    assert torch.equal(first, DiffAugment(policy)(images))


def test_a_shift_moves_pixels_and_leaves_zeros():
    marked = torch.zeros(200, 3, 16, 16)
    marked[:, :, 8, 8] = 1
    places = DiffAugment(["translation"])(marked)[:, 0].flatten(1).argmax(dim=1)
    assert {int(p) // 16 for p in places} == {int(p) % 16 for p in places} == set(range(6, 11))
    with pytest.raises(ValueError, match="augmentation 'blur' is unknown: choose among color, translation, cutout"):
        DiffAugment(["blur"])

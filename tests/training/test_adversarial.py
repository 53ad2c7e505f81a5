"""The adversarial loss: its terms by their definitions, and a discriminator that resumes, accumulates and shares like the rest."""

import csv

import pytest
import torch
from support.runs import command, fit, images_overrides, kill_at, log_to, logged_losses, weights
from torch import nn

from varlab.checkpoints.load import load_tokenizer
from varlab.models import losses
from varlab.models.discriminator import DiffAugment, DINODiscriminator, PatchDiscriminator
from varlab.training.adversarial import DiscriminatorTrainer
from varlab.training.schedules import Cosine

SMALL = [
    "adversarial=patch",
    "adversarial.discriminator.channels=8",
    "adversarial.discriminator.num_layers=1",
    "adversarial.discriminator_start=0.2",
    "adversarial.adversarial_start=0.4",
    "adversarial.warmup=0.2",
    "adversarial.r1_weight=0.5",
    "adversarial.r1_every=2",
    "adversarial.lecam_weight=0.1",
    "adversarial.augment={_target_: varlab.models.discriminator.DiffAugment, policy: [color, translation, cutout]}",
]


def test_losses_follow_their_definitions():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.25]])
    assert losses.discriminator_loss(real, fake) == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert losses.generator_loss(fake) == pytest.approx(0.875)
    expected = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    assert losses.discriminator_loss(real, fake, "nonsaturating") == pytest.approx(float(expected))
    assert losses.generator_loss(fake, "nonsaturating") == pytest.approx(float(-torch.log(torch.sigmoid(fake)).mean()))


def test_the_adaptive_weight_makes_both_losses_pull_alike():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    output = layer(x)
    one, other = output.square().mean(), 100 * output.sin().mean()
    ratio = losses.adaptive_weight(one, other, layer.weight)
    pulls = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (one, ratio * other)]
    assert pulls[0] == pytest.approx(float(pulls[1]), rel=1e-4)
    assert losses.adaptive_weight(one, other, layer.weight, (0.5, 1e4)) == 0.5
    assert losses.adaptive_weight(one, 0 * other, layer.weight, (0.0, 7.0)) == 7


def test_the_gradient_penalty_of_a_linear_discriminator_is_half_the_square_of_its_weights():
    weights_, images = torch.randn(3 * 16), torch.randn(4, 3, 4, 4, requires_grad=True)
    penalty = losses.gradient_penalty((images.flatten(1) @ weights_)[:, None], images)
    assert penalty == pytest.approx(float(weights_.square().sum() / 2), rel=1e-5)


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


def test_a_discriminator_trains_before_its_loss_is_used():
    trainer = DiscriminatorTrainer(
        PatchDiscriminator(16, 1), Cosine(warmup=0.0), discriminator_start=0.1, adversarial_start=0.4, warmup=0.1
    )
    assert [trainer.is_training(p) for p in (0.05, 0.1, 0.9)] == [False, True, True]
    assert [trainer.ramp(p) for p in (0.1, 0.4, 0.45, 0.5, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    real, fake = torch.randn(8, 3, 16, 16), torch.nn.functional.avg_pool2d(torch.randn(8, 3, 18, 18), 3, 1)
    found = []
    for step in range(30):
        found.append(float(trainer.accumulate(real, fake, share=1.0)["train/discriminator_loss"]))
        trainer.step(0.1 + step / 100, total_steps=100, global_batch_size=2560)
    assert found[-1] < 0.5 * found[0]
    fake.requires_grad_()
    trainer.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in trainer.net.parameters())
    with pytest.raises(ValueError, match="the discriminator must train before its loss is used"):
        DiscriminatorTrainer(PatchDiscriminator(8, 1), Cosine(), discriminator_start=0.5, adversarial_start=0.2)


def test_lecam_holds_logits_near_the_other_sides_average():
    trainer = DiscriminatorTrainer(PatchDiscriminator(8, 1), Cosine(), lecam_weight=1.0)
    real, fake = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    trainer.accumulate(real, fake, share=1.0)
    with torch.no_grad():
        means = torch.stack([trainer.net(images).mean() for images in (real, fake)])
    torch.testing.assert_close(trainer.logit_means, 0.1 * means)


def discriminator(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["discriminator"]["net"]


def test_a_run_with_a_discriminator_killed_twice_equals_the_uninterrupted_one(tmp_path, digits_folder):
    overrides = [*images_overrides(digits_folder), *SMALL]
    fit(tmp_path / "whole", *overrides, *log_to(tmp_path / "whole.log"))
    for step in (4, 8):
        killed = command(
            tmp_path / "killed", *overrides, *log_to(tmp_path / "killed.log"), *kill_at(step), "ckpt_path=last"
        )
        assert killed.returncode == -9, killed.stderr[-2000:]
    fit(tmp_path / "killed", *overrides, *log_to(tmp_path / "killed.log"), "ckpt_path=last")
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "killed.log")
    for read in (weights, discriminator):
        for (name, a), b in zip(read(tmp_path / "whole").items(), read(tmp_path / "killed").values(), strict=True):
            assert torch.equal(a, b), name
    saved = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 9  # the discriminator's steps are not counted
    assert saved["discriminator"]["num_steps"] == 7  # it trains from a fifth of the run on
    assert not any("discriminator" in name for name in saved["state_dict"])
    rows = list(csv.DictReader((tmp_path / "whole/metrics.csv").open()))
    counts = [int(row["step"]) for row in rows if row.get("train/adversarial_loss")]
    assert counts == [4, 5, 6, 7, 8]
    assert load_tokenizer(tmp_path / "whole/checkpoints/last.ckpt").downsample == 4


def test_accumulation_and_two_processes_give_the_same_discriminator(tmp_path, digits_folder):
    """Without what each device draws or measures on its own images: augmentation and the adaptive weight."""
    still = [*images_overrides(digits_folder), *SMALL[:6], "adversarial.is_adaptive=false", "adversarial.augment=null"]
    fit(tmp_path / "whole", *still)
    fit(tmp_path / "parts", *still, "accumulate=2", "val_every=18")
    ddp = ["trainer.devices=2", "trainer.strategy=ddp"]
    finished = command(tmp_path / "ddp", *still, *ddp, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for other in ("ddp", "parts"):
        for read in (weights, discriminator):
            for (name, a), b in zip(read(tmp_path / "whole").items(), read(tmp_path / other).values(), strict=True):
                if not name.endswith(("hits", "num_updates")):  # counted for each batch
                    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-4, msg=f"{other}: {name}")


def test_settings_that_do_not_go_together_are_refused(tmp_path, digits_folder):
    overrides = images_overrides(digits_folder)
    fit(tmp_path, *overrides)
    with pytest.raises(ValueError, match="the checkpoint has no discriminator"):
        fit(tmp_path, *overrides, *SMALL, "steps=12", "ckpt_path=last")
    with pytest.raises(Exception, match="adversarial_start=0.1: the discriminator must train before its loss is used"):
        fit(tmp_path / "x", *overrides, *SMALL, "adversarial.adversarial_start=0.1")


@pytest.mark.slow
def test_compiled_networks_give_the_same_losses(tmp_path, digits_folder):
    settings = [*images_overrides(digits_folder), *SMALL]
    for name, is_compiled in (("plain", "false"), ("compiled", "true")):  # in a process without the tests' type checks
        run = command(
            tmp_path / name, *settings, f"module.is_compiled={is_compiled}", *log_to(tmp_path / f"{name}.log")
        )
        assert run.returncode == 0, run.stderr[-3000:]
    plain, compiled = (
        [float.fromhex(loss) for loss in logged_losses(tmp_path / f"{name}.log").values()]
        for name in ("plain", "compiled")
    )
    assert compiled == pytest.approx(plain, rel=1e-2)

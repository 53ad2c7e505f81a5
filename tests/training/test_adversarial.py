"""The adversarial loss: its terms by their definitions, and a discriminator that resumes, accumulates and shares like the rest."""

import csv

import pytest
import torch
from support.runs import command, fit, images_overrides, kill_at, log_to, logged_losses, weights

from varlab.checkpoints.load import load_tokenizer
from varlab.models.discriminator import PatchDiscriminator
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

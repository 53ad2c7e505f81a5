"""Pictures of a run."""

from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from support.networks import make_tokenizer

from varlab import image_grid
from varlab.data.images import ImageBatch
from varlab.sampling.generate import generate
from varlab.training.log_images import LogImages


@pytest.fixture
def trainer():
    return Mock(
        spec=Trainer,
        sanity_checking=False,
        is_global_zero=True,
        global_step=7,
        loggers=[],
        precision_plugin=Mock(forward_context=nullcontext),
    )


def test_rows_are_images_with_their_reconstruction_after_each_scale(trainer, tmp_path):
    tokenizer, images = make_tokenizer().eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    callback = LogImages(str(tmp_path), num_images=2)
    module = Mock(spec=LightningModule, net=tokenizer, device_mesh=None)
    callback.on_validation_batch_start(
        trainer, module, ImageBatch(images, torch.zeros(3).long(), torch.ones(3), torch.zeros(3).long()), 0
    )
    callback.on_validation_epoch_end(trainer, module)
    shown = np.asarray(Image.open(tmp_path / "reconstructions-0000007.png"))
    assert shown.shape == (2 * 66 - 2, 5 * 66 - 2, 3)
    expected = image_grid.to_uint8(torch.cat([images[:1], tokenizer(images[:1]).images]) / 2 + 0.5)
    assert (shown[:64:4, :64:4] == expected[0]).all() and (shown[:64:4, -64::4] == expected[1]).all()


def test_the_last_column_of_samples_is_what_generate_draws(trainer, tokenizer, var, tmp_path):
    var.train()
    callback = LogImages(str(tmp_path), num_images=3, cfg_scale=2.0, seed=5)
    module = Mock(spec=LightningModule, net=var, tokenizer=tokenizer, device_mesh=None, device=torch.device("cpu"))
    callback.on_validation_epoch_end(trainer, module)
    shown = np.asarray(Image.open(tmp_path / "samples-0000007.png")).astype(int)
    expected = image_grid.to_uint8(generate(var.eval(), tokenizer, torch.arange(3), cfg_scale=2.0, seed=5))
    assert np.abs(shown[::66][:, -1] - expected[:, 0, -1]).max() <= 1
    assert var.training is False


def test_a_check_before_training_and_other_ranks_write_nothing(trainer, tokenizer, var, tmp_path):
    module = Mock(spec=LightningModule, net=var, tokenizer=tokenizer, device_mesh=None, device=torch.device("cpu"))
    for setting in ({"sanity_checking": True}, {"is_global_zero": False}):
        trainer.configure_mock(**{"sanity_checking": False, "is_global_zero": True, **setting})
        LogImages(str(tmp_path / "none")).on_validation_epoch_end(trainer, module)
    assert not (tmp_path / "none").exists()

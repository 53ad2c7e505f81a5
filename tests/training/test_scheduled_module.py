"""What both LightningModules share."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from varlab.training.scheduled_module import ScheduledModule
from varlab.training.schedules import Linear


class Module(ScheduledModule):
    """One decayed and one undecayed parameter; the score of an image is its value."""

    def __init__(self):
        super().__init__(partial(torch.optim.SGD, momentum=0.9), Linear(warmup=5.0), 0.1, (0.5, 0.1), 2.0, num_scores=1)
        self.decayed, self.other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.logged = {}

    def parameter_groups(self):
        return [{"params": [self.decayed], "is_decayed": True}, {"params": [self.other], "is_decayed": False}]

    def score(self, batch, scores):
        scores.update(batch[:, None], torch.ones(len(batch)))

    def log_validation(self, split, means):
        self.logged[split] = float(means)


@pytest.fixture
def module():
    module = Module()
    datamodule = SimpleNamespace(global_batch_size=512)
    trainer = SimpleNamespace(
        datamodule=datamodule,
        estimated_stepping_batches=10,
        global_step=0,
        log_every_n_steps=5,
        optimizers=None,
        gradient_clip_val=None,
    )
    module._trainer = trainer
    return module


def test_the_peak_rate_grows_with_the_batch_and_the_optimizer_is_the_one_given(module):
    optimizer = module.configure_optimizers()
    assert module.peak_lr == pytest.approx(0.2) and type(optimizer) is torch.optim.SGD
    assert [group["lr"] for group in optimizer.param_groups] == [module.peak_lr] * 2


def test_every_fifth_step_is_logged(module):
    found = []
    for step in range(10):
        module._trainer.global_step = step
        found.append(module.is_logged)
    assert [step + 1 for step, is_logged in enumerate(found) if is_logged] == [5, 10]


def test_a_step_sets_rate_and_decay_of_the_decayed_group_alone(module, monkeypatch):
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(Module, "optimizers", lambda self, use_pl_optimizer: optimizer)
    module.on_train_batch_start(None, 0)
    decayed, other = optimizer.param_groups
    assert decayed["lr"] == other["lr"] == module.lr < module.peak_lr
    assert decayed["weight_decay"] == pytest.approx(0.5) and other["weight_decay"] == 0


def test_averaged_and_raw_weights_are_validated_apart_and_begin_anew(module):
    module.validation_step(torch.tensor([1.0, 2, 3]), 0)
    module.validation_step_raw(torch.tensor([8.0]))
    module.on_validation_epoch_end()
    assert module.logged == {"val": 2.0, "val_raw": 8.0}
    module.logged.clear()
    module.validation_step(torch.tensor([7.0]), 0)
    module.on_validation_epoch_end()
    assert module.logged == {"val": 7.0}

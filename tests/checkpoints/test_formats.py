"""Files that version 0.1.0 made: they load, give what they gave, and their runs continue as they would have."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.fixtures import OLD
from support.runs import command, fit, log_to, logged_losses

from varlab.checkpoints.export_folder import load_pretrained, tokenizer_fingerprint
from varlab.checkpoints.load import load_tokenizer
from varlab.data.shards import ShardReader
from varlab.data.token_datamodule import TokenDataModule
from varlab.sampling.generate import generate

EXPECTED = json.loads((OLD / "expected.json").read_text())


SHORT = [
    "data.global_batch_size=8", "steps=6", "val_every=6", "save_every=3", "log_every=1", "logger=csv", "callbacks.pictures=null",
    "callbacks.best=null", "callbacks.progress=null", "+trainer.enable_progress_bar=false",
]  # fmt: skip


TOKENIZER = [
    "experiment=tokenizer_tiny", "model.channels=4", "model.num_groups=4", "model.quantizer.codebook_size=12",
    "model.quantizer.codebook_dim=6", "model.num_blocks=1", "adversarial=patch", "adversarial.discriminator.channels=4",
    "adversarial.discriminator.num_layers=1", "adversarial.discriminator_start=0.0", "adversarial.adversarial_start=0.2",
    f"data.path={OLD / 'shards'}",
    "callbacks.reset_dead_codes={_target_: varlab.training.codebook_callbacks.ResetDeadCodes, every: 2}",
]  # fmt: skip


VAR_RUN = [
    "experiment=var_digits", "model.depth=2", "model.width=16", "model.num_heads=2", "model.drop_path=0.2",
    f"tokenizer={OLD / 'exported'}", f"data.path={OLD / 'tokens'}",
    "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.5}",
]  # fmt: skip


def test_an_export_folder_gives_the_images_it_gave():
    tokenizer, var, _ = load_pretrained(OLD / "exported")
    assert tokenizer_fingerprint(tokenizer) == EXPECTED["tokenizer_fingerprint"]
    labels = torch.arange(4)
    images, greedy = generate(var, tokenizer, labels, top_k=1, cfg_scale=1.5, return_tokens=True)
    assert [tokens.tolist() for tokens in greedy] == EXPECTED["greedy"]
    assert images.mean().item() == pytest.approx(EXPECTED["image_mean"], abs=1e-6)
    _, sampled = generate(var, tokenizer, labels, top_k=5, top_p=0.9, cfg_scale=1.5, return_tokens=True)
    assert [tokens.tolist() for tokens in sampled] == EXPECTED["drawn"]


@torch.no_grad()
def test_shards_and_token_cache_belong_together_as_they_did():
    tokenizer = load_tokenizer(OLD / "exported")
    reader = ShardReader(OLD / "shards", "val")
    data = TokenDataModule(str(OLD / "tokens"), global_batch_size=8)
    data.setup()
    assert data.manifest["tokenizer"] == tokenizer_fingerprint(tokenizer)
    assert len(reader) == len(data.val_set) == 11
    assert np.array_equal(reader.labels, data.val_set.conditions)


def continued(tmp_path, name: str, *settings: str) -> dict[int, float]:
    """Losses of a run that continues from a checkpoint of 0.1.0."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    copy = shutil.copytree if (OLD / name).is_dir() else shutil.copy
    copy(OLD / name, tmp_path / "run/checkpoints/last.ckpt")
    fit(tmp_path / "run", *settings, *SHORT, "ckpt_path=last", *log_to(tmp_path / "losses"))
    return {step: float.fromhex(loss) for step, loss in logged_losses(tmp_path / "losses").items()}


def test_a_tokenizers_run_continues_with_the_losses_it_would_have_had(tmp_path):
    """With discriminator and codes that are reset, so that all of the state counts."""
    losses = continued(tmp_path, "tokenizer.ckpt", *TOKENIZER)
    assert losses == pytest.approx({step: EXPECTED["tokenizer_losses"][step - 1] for step in (4, 5, 6)}, rel=1e-5)


def test_a_vars_run_continues_with_the_losses_it_would_have_had(tmp_path):
    losses = continued(tmp_path, "var.ckpt", *VAR_RUN)
    assert losses == pytest.approx({step: EXPECTED["var_losses"][step - 1] for step in (4, 5, 6)}, rel=1e-5)
    assert json.loads((tmp_path / "run/run.json").read_text())["val_loss"] == pytest.approx(
        EXPECTED["val_loss"], rel=1e-5
    )


def test_a_sharded_run_continues_sharded(tmp_path):
    shutil.copytree(OLD / "var_sharded.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    sharded = [
        "trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2",
        "trainer.strategy.process_group_backend=gloo",
    ]  # fmt: skip
    answer = command(tmp_path / "run", *VAR_RUN, *SHORT, *sharded, "ckpt_path=last", processes=2)
    assert answer.returncode == 0, answer.stderr[-2000:]
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert row["step"] == 6 and row["images_seen"] == 48
    assert row["val_loss"] == pytest.approx(EXPECTED["val_loss"], rel=1e-2)

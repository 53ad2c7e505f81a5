"""Before the first step."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from support.runs import config, fit

CPU = torch.device("cpu")


def test_a_new_run_does_not_write_among_old_checkpoints(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="already holds checkpoints: continue that run with ckpt_path=last"):
        fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="holds a VAR with depth=2, but this run has depth=3"):
        fit(tmp_path, *var_overrides, "model.depth=3", "steps=12", "ckpt_path=last")
    with pytest.raises(ValueError, match="other data, seed, lanes, window or global batch size"):
        fit(tmp_path, *var_overrides, "data.global_batch_size=4", "steps=12", "ckpt_path=last")


def test_a_damaged_checkpoint_is_named_with_the_one_that_can_serve(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides, "val_every=4")
    last = tmp_path / "checkpoints/last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:-100]), b""):
        last.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"last.ckpt.* damaged.*; .*best-0000008.ckpt \(step 8\) is whole: continue with"
        ):
            fit(tmp_path, *var_overrides, "val_every=4", "ckpt_path=last")
    (best,) = (tmp_path / "checkpoints").glob("best-*.ckpt")
    fit(tmp_path, *var_overrides, "val_every=4", f"ckpt_path={best}")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"
    best.write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last.ckpt.*; no other checkpoint in .*checkpoints is whole"):
        fit(tmp_path, *var_overrides, "val_every=4", "ckpt_path=last")


def test_several_devices_need_a_trainer_that_uses_them(tmp_path, var_overrides):
    for trainer in ("cpu", "gpu"):
        with pytest.raises(ValueError, match="devices=4: this trainer uses one device; choose trainer=ddp"):
            fit(tmp_path, *var_overrides, f"trainer={trainer}", "devices=4")


def test_the_first_weights_do_not_depend_on_the_device(var_overrides, tmp_path):
    """Strategies build the network in the context of their device; the values come from the CPU in any case."""
    found = []
    for device in ("cpu", "meta"):
        cfg = config(tmp_path, *var_overrides)
        module, data = instantiate(cfg.module, _convert_="all"), instantiate(cfg.data, _convert_="all")
        data.setup()
        module._trainer = SimpleNamespace(
            datamodule=data, precision="32-true", strategy=SimpleNamespace(root_device=CPU)
        )
        torch.manual_seed(5)
        with torch.device(device):
            module.configure_model()
        found.append(module.net.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("precision", ["16-true", "64-true", "fp16"])
def test_a_precision_in_which_nothing_is_trained_is_refused(precision, tmp_path, var_overrides):
    with pytest.raises(ValueError, match=f"trainer.precision={precision}: choose one of 32-true, bf16-mixed"):
        fit(tmp_path, *var_overrides, f"trainer.precision={precision}")
    with pytest.raises(ValueError, match=f"trainer.precision={precision}"):
        fit(tmp_path, *var_overrides, f"trainer.precision={precision}", "plan=true")

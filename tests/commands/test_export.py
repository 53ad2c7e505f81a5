"""`varlab export`: a training checkpoint becomes a folder that all read."""

import pytest
import torch
from safetensors.torch import load_file
from support.runs import EXPORTED, config, fit

from varlab.checkpoints.load import load
from varlab.commands import export


def export_to(tmp_path, *settings):
    export.run(config(tmp_path, *settings, verb="export"))


def test_a_training_checkpoint_goes_out_and_is_read_by_all(tmp_path, var_overrides, capsys):
    fit(tmp_path / "run", *var_overrides, *EXPORTED)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'averaged'}")
    export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'raw'}", "ema=false")
    saved = torch.load(checkpoint, weights_only=True)
    for name, source in [("averaged", saved["ema"]), ("raw", saved["state_dict"])]:
        assert torch.equal(load_file(tmp_path / name / "var.safetensors")["head.weight"], source["net.head.weight"])
    assert "images_seen: 72" in (tmp_path / "raw/README.md").read_text()
    assert load(tmp_path / "raw")[2] == [str(digit) for digit in range(10)]
    with pytest.raises(ValueError, match="raw already exists: remove it, or choose another out="):
        export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'raw'}")
    with pytest.raises(ValueError, match="to='zip': choose one of safetensors, adapter, released"):
        export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'zip'}", "to=zip")
    with pytest.raises(ValueError, match="precision='bf16': choose fp32, or bf16 with to=safetensors"):
        export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'half'}", "to=released", "precision=bf16")
    export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'half'}", "precision=bf16")
    assert load_file(tmp_path / "half/var.safetensors")["head.weight"].dtype == torch.bfloat16

"""`varlab tune`: every method, killed and continued."""

import json

import pytest
import torch
from support.runs import command, config, fit, kill_at, log_to, logged_losses, weights

from varlab.checkpoints.load import load
from varlab.commands import export, tune


@pytest.mark.parametrize("method", ["cca", "lora", "likelihood"])
def test_a_model_is_tuned_with_one_command_and_continues_after_a_kill(method, tmp_path, var_overrides):
    fit(tmp_path / "model", *var_overrides)
    source = tmp_path / "model/checkpoints/last.ckpt"
    kept = [
        o for o in var_overrides if o.split("=")[0] not in ("experiment", "tokenizer") and not o.startswith("model.")
    ]
    settings = [f"checkpoint={source}", f"method={method}", *kept, "trainer.precision=32-true", "ckpt_path=last"]

    def run(name, *more):
        tune.run(config(tmp_path / name, f"run_dir={tmp_path / name}", "name=test", *settings, *more, verb="tune"))

    run("whole", *log_to(tmp_path / "whole.log"))
    command(tmp_path / "killed", *settings, *log_to(tmp_path / "killed.log"), *kill_at(5), verb="tune")
    run("killed", *log_to(tmp_path / "killed.log"))
    assert logged_losses(tmp_path / "killed.log") == logged_losses(tmp_path / "whole.log")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(value, killed[name]) for name, value in whole.items())
    row = json.loads((tmp_path / "whole/run.json").read_text())
    assert row["init_from"] == str(source) and row["state"] == "finished"
    plain = json.loads((tmp_path / "model/run.json").read_text())["flops_exact"]
    assert row["flops_exact"] == pytest.approx(plain * (8 / 3 if method == "cca" else 1), rel=1e-6)
    assert (row["params_trained"] < row["params_total"]) == (method == "lora")
    _, var, _ = load(tmp_path / "whole/checkpoints/last.ckpt")
    before = load(source)[1].state_dict()
    changed = {name for name, value in var.state_dict().items() if not torch.equal(value, before[name])}
    assert ("blocks.0.feed_forward.up.weight" in changed) == (method != "lora")
    assert "blocks.0.attention.qkv.weight" in changed
    if method == "lora":
        out = [f"checkpoint={tmp_path / 'whole/checkpoints/last.ckpt'}", "to=adapter", f"out={tmp_path / 'adapter'}"]
        with pytest.raises(ValueError, match=r"to=adapter needs base="):
            export.run(config(tmp_path, *out, verb="export"))
        export.run(config(tmp_path, *out, f"base={source}", verb="export"))
        folder = [f"checkpoint={tmp_path / 'adapter'}", "to=adapter", f"base={source}", f"out={tmp_path / 'again'}"]
        with pytest.raises(ValueError, match=r"to=adapter needs a training checkpoint"):
            export.run(config(tmp_path, *folder, verb="export"))
        apart = load(tmp_path / "adapter")[1].state_dict()
        assert all(torch.allclose(value, apart[name], atol=1e-6) for name, value in var.state_dict().items())

"""Before the first step."""

import pytest
from support.runs import (
    fit,
)


def test_a_new_run_does_not_write_among_old_checkpoints(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="already holds checkpoints: continue that run with ckpt_path=last"):
        fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="holds a VAR with depth=2, but this run has depth=3"):
        fit(tmp_path, *var_overrides, "model.depth=3", "steps=12", "ckpt_path=last")
    with pytest.raises(ValueError, match="other data, seed, lanes, window or global batch size"):
        fit(tmp_path, *var_overrides, "data.global_batch_size=4", "steps=12", "ckpt_path=last")

"""Activations counted on small networks and extrapolated."""

import pytest

from varlab.cost.activation_memory import activation_bytes, saved_by
from varlab.models.var import VAR

SIZES = {"patch_nums": [1, 2, 3, 4, 5, 6, 8, 10], "codebook_size": 1024, "codebook_dim": 32, "num_classes": 100}


def test_activations_of_a_larger_network_lie_on_the_line():
    for recompute in ("none", "selective", "all"):
        var = VAR(depth=5, width=320, num_heads=5, drop_path=0.1, **SIZES).train()
        for block in var.blocks:
            block.recompute = recompute
        planned = activation_bytes(var.sizes, "32-true", recompute) / 1e9
        counted = (saved_by(var, 3, "32-true", 1) - saved_by(var, 2, "32-true", 1)) / 1e9
        assert planned == pytest.approx(counted, rel=0.02), recompute

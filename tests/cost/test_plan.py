"""What `plan=true` predicts is what a step then takes."""

from functools import partial

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from varlab.cost.flops import parameter_counts
from varlab.cost.plan import Layout, PlannedRun, memory
from varlab.models import losses
from varlab.models.var import VAR
from varlab.training.optimizers import parameter_groups

SIZES = {"patch_nums": [1, 2, 3, 4, 5, 6, 8, 10], "codebook_size": 1024, "codebook_dim": 32, "num_classes": 100}


def peak_gb(var: VAR, num_images: int, precision: str, loss_chunks: int) -> float:
    """Bytes of all tensors alive at the worst moment of the second training step, counted one by one."""
    optimizer = torch.optim.AdamW(parameter_groups(var), lr=1e-4, foreach=False)
    length = var.step_bounds[-1][1]
    inputs, sequence = torch.randn(num_images, length - 1, 32), torch.zeros(num_images, length, dtype=torch.long)

    def loss_fn(logits, token_slice):
        return losses.cross_entropy(logits, sequence[:, token_slice])

    class Step(torch.nn.Module):
        """The whole step up to the loss, as one module."""

        def __init__(self):
            super().__init__()
            self.var = var

        def forward(self):
            x, vector = self.var(inputs, sequence[:, 0], returns_hidden=True)
            return losses.in_chunks(partial(self.var.predict, vector=vector), x, loss_fn, loss_chunks).mean()

    step, tracker = Step(), MemTracker()
    tracker.track_external(step, optimizer)
    for _ in range(2):
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("recompute", "loss_chunks"), [("none", 1), ("selective", 1), ("all", 1), ("all", 8)])
def test_the_memory_of_a_step_is_predicted_within_5_percent(recompute, loss_chunks, precision):
    """A network twice as deep and three times as wide as the largest that the plan measures."""
    var = VAR(depth=4, width=384, num_heads=6, drop_path=0.1, **SIZES).train()
    for block in var.blocks:
        block.recompute = recompute
    layout = Layout(recompute=recompute, loss_chunks=loss_chunks)
    parts = memory(PlannedRun("run", var.sizes, 1000, 10, 6, precision, layout, tokenizer_params=0))
    assert sum(parts.values()) == pytest.approx(peak_gb(var, 6, precision, loss_chunks), rel=0.05)


def test_sharding_divides_what_ddp_repeats():
    sizes = VAR(depth=2, **SIZES).sizes
    copied, sharded = (
        memory(PlannedRun("run", sizes, 1000, 10, 64, "bf16-mixed", Layout(8, is_sharded)))
        for is_sharded in (False, True)
    )
    for part in ("weights", "gradients", "Adam's moments"):
        assert copied[part] == pytest.approx(8 * sharded[part])
    assert copied["weights"] == pytest.approx(4 * parameter_counts(sizes)["params_total"] / 1e9)

"""What `plan=true` predicts is what a step then takes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from varlab.cost.flops import parameter_counts, training_flops
from varlab.cost.plan import GB, GPUS, Layout, PlannedRun, estimated_mfu, memory, print_plan
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


def test_time_is_estimated_from_flops_and_bytes():
    """By hand for d16 at batch 64 on an H200: 1.13 ms of products, and 4.6 GB of 4.3 TB/s, for each image."""
    sizes = VAR(16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096, 32, 1000).sizes
    run = PlannedRun("run", sizes, 1000, 10, 64, "bf16-mixed", Layout())
    products = training_flops(sizes) / (0.8 * 989e12)
    moved = 680 * (16 * 1024 * (157 + 256) + 4096 * 16) + parameter_counts(sizes)["params_total"] * 45 / 64
    expected = training_flops(sizes) / (products + moved / 4.3e12) / 989e12
    assert 1e3 * products == pytest.approx(1.13, abs=0.01) and moved == pytest.approx(4.86e9, rel=0.01)
    assert estimated_mfu(run, GPUS["h200"]) == pytest.approx(expected) == pytest.approx(0.40, abs=0.01)
    everything = replace(run, layout=Layout(recompute="all"))
    assert estimated_mfu(everything, GPUS["h200"]) < 0.8 * expected
    assert estimated_mfu(replace(run, precision="32-true"), GPUS["h200"]) < 0.2 * expected
    assert estimated_mfu(run, GPUS["h100"]) < expected  # the same products, slower memory


def test_a_branch_without_steps_of_its_own_costs_nothing(capsys):
    sizes = VAR(depth=2, **SIZES).sizes
    cost = print_plan(PlannedRun("run", sizes, 1000, 0, 64, "bf16-mixed", Layout()), "h100", None)
    assert cost == {"flops": 0.0, "a100": 0.0, "h100": 0.0, "h200": 0.0}
    assert "0 GPU hours" in capsys.readouterr().out


@pytest.mark.parametrize(("codes", "size"), [(256, 1), (4096, 2), (2**15, 2), (2**16, 4), (2**32, 8)])
def test_tokens_on_the_device_take_what_torch_has(codes, size):
    bases = None if codes < 2**15 else [2] * (codes.bit_length() - 1)
    with torch.device("meta"):
        sizes = VAR(depth=2, **{**SIZES, "codebook_size": codes}, bases=bases).sizes
    run = PlannedRun("run", sizes, 1000, 10, 64, "bf16-mixed", Layout(), tokens_on_device=True)
    assert memory(run)["token cache"] == pytest.approx(size * 255 * 1000 / GB)

"""What `plan=true` predicts is what a step then takes."""

from functools import partial

import pytest
import torch
from support.runs import config
from torch.distributed._tools.mem_tracker import MemTracker

from varlab.commands import train
from varlab.cost.activation_memory import activation_bytes, saved_by
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


def test_activations_of_a_larger_network_lie_on_the_line():
    for recompute in ("none", "selective", "all"):
        var = VAR(depth=5, width=320, num_heads=5, drop_path=0.1, **SIZES).train()
        for block in var.blocks:
            block.recompute = recompute
        planned = activation_bytes(var.sizes, "32-true", recompute) / 1e9
        counted = (saved_by(var, 3, "32-true", 1) - saved_by(var, 2, "32-true", 1)) / 1e9
        assert planned == pytest.approx(counted, rel=0.02), recompute


def test_the_plan_of_the_paper_says_what_the_run_will_count(tmp_path, capsys):
    train.run(config(tmp_path, "experiment=var_d16", "trainer=ddp", "plan=true"))
    said = capsys.readouterr().out
    assert "VAR of depth 16, width 1024, 310.3 M parameters" in said
    assert "680 tokens per image" in said and "333,600 steps of 768 images = 256.2 M images = 200 epochs" in said
    assert "896 GFLOP per image, 2.29e+20 FLOP in total" in said
    assert not (tmp_path / "checkpoints").exists()


def test_the_plan_counts_with_the_tokenizer_and_data_given(tmp_path, capsys, var_overrides):
    train.run(config(tmp_path, *var_overrides, "plan=true"))
    said = capsys.readouterr().out
    assert (
        "30 tokens per image on maps of 1, 2, 3, 4" in said and "9 steps of 8 images" in said and "assumed" not in said
    )


def test_a_plan_that_fits_no_gpu_is_refused_with_one_that_does(tmp_path):
    alone = ["experiment=var_d30", "trainer=gpu", "plan=true"]
    with pytest.raises(
        ValueError,
        match=r"needs [\d.]+ GB of the 77.0 GB on each h100 .*: the cheapest layout that fits is trainer=gpu",
    ):
        train.run(config(tmp_path, *alone))
    with pytest.raises(ValueError, match="does not fit 1 x h100 .80 GB. in any layout: use more devices"):
        train.run(config(tmp_path, *alone, "model.depth=60"))
    with pytest.raises(ValueError, match="planned_gpu='v100': choose one of a100, h100, h200"):
        train.run(config(tmp_path, *alone, "planned_gpu=v100"))


def test_sharding_divides_what_ddp_repeats():
    sizes = VAR(depth=2, **SIZES).sizes
    copied, sharded = (
        memory(PlannedRun("run", sizes, 1000, 10, 64, "bf16-mixed", Layout(8, is_sharded)))
        for is_sharded in (False, True)
    )
    for part in ("weights", "gradients", "Adam's moments"):
        assert copied[part] == pytest.approx(8 * sharded[part])
    assert copied["weights"] == pytest.approx(4 * parameter_counts(sizes)["params_total"] / 1e9)

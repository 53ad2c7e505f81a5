"""Ways of training that change nothing about the result: sharded, recomputed, compiled, in bf16, stopped and moved."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.networks import make_var
from support.runs import command, config, fit, kill_at, log_to, logged_losses, weights

from varlab.checkpoints.load import load, read_checkpoint
from varlab.commands import export

CPU = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


FSDP = ["trainer=fsdp", *CPU, "trainer.strategy.process_group_backend=gloo"]


AVERAGED = ["callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}"]


def same(a: Path, b: Path, rtol: float = 1e-3) -> None:
    """Weights, averages and moments of two runs' checkpoints."""
    a, b = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (a, b))
    for part in ("state_dict", "ema"):
        assert a.get(part, {}).keys() == b.get(part, {}).keys()
        for name, value in a.get(part, {}).items():
            torch.testing.assert_close(b[part][name], value, rtol=rtol, atol=1e-5, msg=f"{part} {name}")
    a, b = a["optimizer_states"][0], b["optimizer_states"][0]
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    for i, moments in a["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(b["state"][i][key], value, rtol=1e-2, atol=1e-5, msg=f"{key} of {i}")


def test_a_run_goes_from_sharded_to_unsharded_and_back(tmp_path, still):
    """FSDP2 on two processes until step 3, one process until 6, FSDP2 again: all as in one process throughout."""
    fit(tmp_path / "whole", *still, *AVERAGED, *log_to(tmp_path / "whole.log"))
    moved = [tmp_path / "moved", *still, *AVERAGED, *log_to(tmp_path / "moved.log"), "ckpt_path=last"]
    command(*moved, *FSDP, *kill_at(5), processes=2)
    assert (tmp_path / "moved/checkpoints/last.ckpt/.metadata").is_file()
    command(*moved, *kill_at(7))
    assert (tmp_path / "moved/checkpoints/last.ckpt").is_file()
    finished = command(*moved, *FSDP, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    same(tmp_path / "whole", tmp_path / "moved")
    assert list((tmp_path / "moved/pictures").glob("samples-*.png"))
    folder, file = tmp_path / "moved/checkpoints/last.ckpt", tmp_path / "one.ckpt"
    export.run(config(tmp_path, f"checkpoint={folder}", "to=checkpoint", f"out={file}", verb="export"))
    fit(tmp_path / "on", *still, *AVERAGED, f"ckpt_path={file}", "steps=12", *log_to(tmp_path / "on.log"))
    assert sorted(logged_losses(tmp_path / "on.log")) == [10, 11, 12]
    _, var, _ = load(tmp_path / "moved/checkpoints/last.ckpt")  # as it is, from its folder
    assert torch.equal(
        var.head.weight, read_checkpoint(tmp_path / "moved/checkpoints/last.ckpt")["ema"]["net.head.weight"]
    )
    (folder / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"last.ckpt is not a checkpoint: meta.pt is missing"):
        load(folder)


def test_a_sharded_run_can_write_one_file(tmp_path, still):
    fit(tmp_path / "whole", *still, *AVERAGED)
    one_file = [*still, *AVERAGED, *FSDP, "trainer.strategy.save_distributed_checkpoint=false"]
    finished = command(tmp_path / "file", *one_file, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "file/checkpoints/last.ckpt").is_file()
    same(tmp_path / "whole", tmp_path / "file")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_of_shards_train_as_one_process(processes, tmp_path, still):
    hsdp = [*still, "trainer=hsdp", *CPU, f"trainer.devices={processes}", "trainer.strategy.num_replicas=2"]
    hsdp += ["trainer.strategy.process_group_backend=gloo"]
    fit(tmp_path / "whole", *still)
    finished = command(tmp_path / "hsdp", *hsdp, processes=processes)
    assert finished.returncode == 0, finished.stderr[-3000:]
    same(tmp_path / "whole", tmp_path / "hsdp")


def test_two_nodes_train_as_one_process(tmp_path, still):
    """Two torchrun agents of one process each, meeting on the loopback address."""
    fit(tmp_path / "whole", *still, *log_to(tmp_path / "whole.log"))
    settings = [*still, "trainer=multinode", *CPU, "trainer.devices=1", "nodes=2", *log_to(tmp_path / "two.log")]
    folder = [f"run_dir={tmp_path / 'two'}", f"hydra.run.dir={tmp_path / 'two'}", "name=two"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    environment = {**os.environ}
    run = ["-m", "varlab", "train", *folder, *settings]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meeting, f"--node-rank={node}", *run],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said[0][-2000:]
    one = [float.fromhex(loss) for loss in logged_losses(tmp_path / "whole.log").values()]
    ranks = [[float.fromhex(loss) for loss in logged_losses(tmp_path / "two.log", rank).values()] for rank in (0, 1)]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(one, rel=1e-4)


def test_bf16_weights_leave_the_tokenizer_and_its_tokens_alone(tmp_path, still, digits_folder):
    images = ["data=images", "resolution=16px", "data.resize_ratio=1.0", "data.random_crop=false", "data.num_workers=0"]
    images = [*still, *images, f"data.path={digits_folder}"]
    for name, precision in [("fp32", "32-true"), ("bf16", "bf16-true")]:
        fit(tmp_path / name, *images, f"trainer.precision={precision}", *log_to(tmp_path / f"{name}.log"))
    fp32, bf16 = (weights(tmp_path / name) for name in ("fp32", "bf16"))
    for name, value in bf16.items():
        assert value.dtype == (
            torch.bfloat16 if name.startswith("net.") and value.is_floating_point() else fp32[name].dtype
        )
        if name.startswith("tokenizer."):
            assert torch.equal(value, fp32[name]), name
    fp32, bf16 = (list(logged_losses(tmp_path / f"{name}.log").values()) for name in ("fp32", "bf16"))
    assert [float.fromhex(x) for x in bf16] == pytest.approx([float.fromhex(x) for x in fp32], rel=5e-3)
    assert bf16 != fp32
    assert json.loads((tmp_path / "bf16/run.json").read_text())["precision"] == "bf16-true"


def saved_bytes(recompute: str) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the backward pass of a VAR waits with, and its gradients."""
    torch.manual_seed(0)
    var, kept = make_var(drop_path=0.3).train(), {}
    for block in var.blocks:
        block.recompute = recompute
    inputs, labels = torch.randn(4, 29, 6), torch.tensor([0, 1, 2, 0])

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = var(inputs, labels).square().mean()
    loss.backward()
    return sum(kept.values()), [p.grad for p in var.parameters() if p.grad is not None]


def test_recomputed_activations_give_the_same_gradients_from_less_memory():
    everything, expected = saved_bytes("none")
    selective, few = saved_bytes("selective"), saved_bytes("all")
    assert few[0] < 0.5 * everything
    for gradients in (selective[1], few[1]):
        for a, b in zip(expected, gradients, strict=True):
            assert torch.equal(a, b)


def test_compiled_blocks_train_the_same_without_recompiling(tmp_path, still):
    """Ten blocks with ten rates of drop path, validation in between: graphs are made once, not once a block."""
    deep = [*still, "model.depth=10", "model.drop_path=0.0", "val_every=3"]
    answers = [
        command(
            tmp_path / name,
            *deep,
            f"module.is_compiled={name == 'compiled'}",
            *log_to(tmp_path / f"{name}.log"),
            *extra,
        )
        for name, extra in [
            ("eager", []),
            (
                "compiled",
                [
                    "+callbacks.graphs._target_=support.fault_callbacks.GraphLog",
                    f"+callbacks.graphs.file={tmp_path / 'graphs'}",
                ],
            ),
        ]
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers[1].stderr[-3000:]
    eager, compiled = (
        [float.fromhex(loss) for loss in logged_losses(tmp_path / f"{name}.log").values()]
        for name in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
    graphs = [int(line) for line in (tmp_path / "graphs").read_text().split()]
    assert 0 < graphs[0] <= 3 and graphs[5] == graphs[-1]


def test_drop_path_rates_do_not_make_a_graph_for_each_block(tmp_path, var_overrides):
    settings = [*var_overrides, "model.depth=10", "model.drop_path=0.3", "module.is_compiled=true", "val_every=3"]
    graphs = [
        "+callbacks.graphs._target_=support.fault_callbacks.GraphLog",
        f"+callbacks.graphs.file={tmp_path / 'graphs'}",
    ]
    answer = command(tmp_path / "run", *settings, *graphs)
    assert answer.returncode == 0, answer.stderr[-3000:]
    made = [int(line) for line in (tmp_path / "graphs").read_text().split()]
    assert made[0] <= 4 and made[5] == made[-1]


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, still):
    fit(tmp_path / "whole", *still, *log_to(tmp_path / "whole.log"))
    again = [tmp_path / "killed", *still, *log_to(tmp_path / "killed.log"), "ckpt_path=last"]
    killed = command(
        *again, "+callbacks.kill._target_=support.fault_callbacks.KillWhileSaving", "+callbacks.kill.nth=2"
    )
    assert killed.returncode == -9
    assert torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    fit(*again)
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "killed.log")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(processes, tmp_path, still):
    fit(tmp_path / "whole", *still, *log_to(tmp_path / "whole.log"))
    ddp = ["trainer.devices=2", "trainer.strategy=ddp"] if processes == 2 else []
    again = [tmp_path / "stopped", *still, *ddp, "save_every=1000", "callbacks.signals.check_every=1", "ckpt_path=last"]
    stopped = command(
        *again,
        "+callbacks.kill={_target_: support.fault_callbacks.Signal, step: 4, name: SIGTERM}",
        *log_to(tmp_path / "log"),
    )
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert torch.load(tmp_path / "stopped/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert json.loads((tmp_path / "stopped/run.json").read_text())["state"] == "stopped"
    assert "stopped at step 5" in stopped.stdout
    finished = command(*again, *log_to(tmp_path / "log"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    if processes == 1:
        assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "log")
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["Kill", "Hang"])
def test_a_process_that_dies_or_hangs_ends_the_run_in_a_sentence(fault, tmp_path, still):
    """In the second of two processes, after the fifth step; the first notices within the timeout."""
    broken = [f"+callbacks.broken={{_target_: support.fault_callbacks.{fault}, batch: 5, rank: 1}}"]
    ddp = ["trainer=ddp", *CPU, "trainer.strategy.timeout.minutes=0.1"]
    ended = command(tmp_path, *still, *ddp, *broken, processes=2)
    assert ended.returncode == 1
    assert "varlab train: another process of this run died or hangs (" in ended.stdout
    assert "ckpt_path=last continues" in ended.stdout and "Traceback" not in ended.stdout
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"
    fit(tmp_path, *still, "ckpt_path=last")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"

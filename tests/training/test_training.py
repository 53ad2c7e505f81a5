"""Runs through the real entry point: they resume to the letter, share work between processes, and say what is wrong."""

import json

import pytest
import torch
from support.runs import (
    command,
    fit,
    images_overrides,
    kill_at,
    log_to,
    logged_losses,
    mean_of_ranks,
    weights,
)

KINDS = ["images", "tokens", "var_on_images"]


slow = [
    pytest.param(kind, workers, processes, marks=pytest.mark.slow)
    for processes in (1, 2)
    for workers in ((0, 0, 0), (1, 1, 1), (4, 4, 4), (0, 3, 1))
    for kind in KINDS
]


@pytest.mark.parametrize(
    ("kind", "workers", "processes"),
    [
        ("images", (0, 3, 0), 1),
        ("tokens", (0, 0, 0), 1),
        ("var_on_images", (1, 1, 1), 1),
        ("tokens", (0, 1, 0), 2),
        *slow,
    ],
)
def test_a_run_killed_twice_equals_the_uninterrupted_one_bit_by_bit(
    kind, workers, processes, tmp_path, digits_folder, tokenizer_run, var_overrides
):
    """`workers`: data workers before the first kill, between the two, and after the second."""
    if kind == "images":
        overrides = images_overrides(digits_folder)
    elif kind == "tokens":
        overrides = [*var_overrides, "callbacks.ema={_target_:varlab.training.ema.EMA,decay:0.9}"]
    else:
        overrides = [f"data.path={digits_folder}" if o.startswith("data.path") else o for o in var_overrides]
        overrides += ["data=images", "resolution=16px", "data.resize_ratio=1.25", "module.self_correction=0.3"]
    overrides += ["data.window=3", "data.lanes=2"]
    if processes == 2:
        overrides += ["trainer.devices=2", "trainer.strategy=ddp"]

    def run(folder, num_workers, *more):
        settings = [*overrides, f"data.num_workers={num_workers}", *log_to(f"{folder}.log"), *more]
        return (
            fit(folder, *settings) if processes == 1 and not more else command(folder, *settings, processes=processes)
        )

    run(tmp_path / "whole", workers[0])
    for num_workers, step in zip(workers, (4, 8), strict=False):  # checkpoints lie at 3, 6, 9; an epoch has 6 batches
        killed = run(tmp_path / "killed", num_workers, *kill_at(step), "ckpt_path=last")
        assert killed.returncode == (-9 if processes == 1 else 1), killed.stderr[-2000:]
        assert "SIGKILL" in killed.stderr or processes == 1
    run(tmp_path / "killed", workers[2], "ckpt_path=last")
    for rank in range(processes):
        whole, killed = (logged_losses(tmp_path / f"{name}.log", rank) for name in ("whole", "killed"))
        assert sorted(whole) == list(range(1, 10))
        assert whole == killed
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "killed").values(), strict=True):
        assert torch.equal(a, b), name
    rows = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", "killed")]
    for key in ("images_seen", "tokens_seen", "flops_exact", "val_loss", "state", "step"):
        assert rows[0][key] == rows[1][key], key
    assert rows[0]["images_seen"] == 72


def test_a_data_worker_that_dies_ends_the_run_with_a_sentence(tmp_path, digits_folder):
    settings = [
        *images_overrides(digits_folder),
        "data.num_workers=2",
        "+callbacks.kill._target_=support.fault_callbacks.KillWorker",
    ]
    answer = command(tmp_path, *settings)
    assert answer.returncode == 1
    assert "a data worker died or hangs" in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_two_processes_equal_one_with_the_same_global_batch(kind, tmp_path, digits_folder, var_overrides):
    overrides = (
        images_overrides(digits_folder)
        if kind == "images"
        else [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]
    )
    fit(tmp_path / "one", *overrides, *log_to(tmp_path / "one.log"))
    ddp = ["trainer.devices=2", "trainer.strategy=ddp", *log_to(tmp_path / "two.log")]
    finished = command(tmp_path / "two", *overrides, *ddp, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one = [float.fromhex(loss) for loss in logged_losses(tmp_path / "one.log").values()]
    assert mean_of_ranks(tmp_path / "two.log") == pytest.approx(one, rel=1e-4)
    rows = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("one", "two")]
    assert rows[0]["val_loss"] == pytest.approx(
        rows[1]["val_loss"], rel=1e-4
    )  # 11 images over two ranks: each counts once
    assert rows[0]["images_seen"] == rows[1]["images_seen"]


def test_lightning_starts_the_second_process_itself(tmp_path, var_overrides):
    finished = command(tmp_path, *var_overrides, "trainer.devices=2", "trainer.strategy=ddp", *log_to(tmp_path / "log"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (
        sorted(logged_losses(tmp_path / "log", 0)) == sorted(logged_losses(tmp_path / "log", 1)) == list(range(1, 10))
    )


def test_a_run_moves_from_one_process_to_two_and_back(tmp_path, var_overrides):
    still = [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]
    fit(tmp_path / "whole", *still, *log_to(tmp_path / "whole.log"))
    for processes, step in [(1, 4), (2, 7)]:
        ddp = ["trainer.devices=2", "trainer.strategy=ddp"] if processes == 2 else []
        command(
            tmp_path / "moved",
            *still,
            *ddp,
            *kill_at(step),
            *log_to(tmp_path / "moved.log"),
            "ckpt_path=last",
            processes=processes,
        )
    fit(tmp_path / "moved", *still, "ckpt_path=last")
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "moved").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_accumulated_batches_equal_the_whole_batch(tmp_path, var_overrides):
    still = [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]
    fit(tmp_path / "whole", *still)
    fit(tmp_path / "parts", *still, "accumulate=2", "val_every=18")
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "parts").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_fsdp_trains_on_two_processes(tmp_path, var_overrides):
    fsdp = [
        "trainer=fsdp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "trainer.strategy.process_group_backend=gloo",
    ]
    still = [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]
    finished = command(tmp_path / "fsdp", *still, *fsdp, *log_to(tmp_path / "fsdp.log"), processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    fit(tmp_path / "one", *still, *log_to(tmp_path / "one.log"))
    one = [float.fromhex(loss) for loss in logged_losses(tmp_path / "one.log").values()]
    ranks = [[float.fromhex(loss) for loss in logged_losses(tmp_path / "fsdp.log", rank).values()] for rank in (0, 1)]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(one, rel=1e-3)

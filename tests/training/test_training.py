"""Runs through the real entry point: they resume to the letter, share work between processes, and say what is wrong."""

import csv
import json

import pytest
import torch
from hydra.utils import instantiate
from support.golden_rule import golden
from support.runs import (
    command,
    config,
    fit,
    images_overrides,
    kill_at,
    log_to,
    logged_losses,
    weights,
)

from varlab.checkpoints.load import load, load_tokenizer
from varlab.checkpoints.released_layout import to_released
from varlab.commands import tokenize
from varlab.data import images as image_data
from varlab.sampling.generate import generate

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
        overrides += ["data=images", "resolution=16px", "data.resize_ratio=1.25"]
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
    ranks = [[float.fromhex(loss) for loss in logged_losses(tmp_path / "two.log", rank).values()] for rank in (0, 1)]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(one, rel=1e-4)
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


def test_tokens_and_images_give_the_same_loss(tmp_path, digits_folder, tokenizer_run, var_overrides):
    checkpoint = tokenizer_run / "checkpoints/last.ckpt"
    cache = [f"tokenizer={checkpoint}", f"shards={digits_folder}", f"out={tmp_path / 'cache'}", "resize_ratio=1.0"]
    tokenize.run(config(tmp_path, *cache, verb="tokenize"))
    still = [o for o in var_overrides if not o.startswith("data.path")] + ["model.drop_path=0.0", "data.window=null"]
    fit(tmp_path / "tokens", *still, f"data.path={tmp_path / 'cache'}", *log_to(tmp_path / "tokens.log"))
    images = ["data=images", "resolution=16px", "data.resize_ratio=1.0", "data.random_crop=false", "data.num_workers=0"]
    fit(tmp_path / "images", *still, *images, f"data.path={digits_folder}", *log_to(tmp_path / "images.log"))
    from_tokens, from_images = (
        [float.fromhex(loss) for loss in logged_losses(tmp_path / f"{road}.log").values()]
        for road in ("tokens", "images")
    )
    assert len(from_tokens) == 9
    assert from_images == pytest.approx(from_tokens, rel=1e-5)
    rows = [json.loads((tmp_path / road / "run.json").read_text()) for road in ("tokens", "images")]
    assert rows[1]["val_loss"] == pytest.approx(rows[0]["val_loss"], rel=1e-5)
    assert rows[1]["flops_tokenizer"] > 0 == rows[0]["flops_tokenizer"]


def test_accumulated_batches_equal_the_whole_batch(tmp_path, var_overrides):
    still = [*var_overrides, "model.drop_path=0.0", "model.label_dropout=0.0"]
    fit(tmp_path / "whole", *still)
    fit(tmp_path / "parts", *still, "accumulate=2", "val_every=18")
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "parts").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_in_chunks_is_the_same_loss(tmp_path, var_overrides):
    for name, change in [("whole", []), ("chunks", ["module.loss_chunks=3"])]:
        fit(tmp_path / name, *var_overrides, *change, "log_every=1")
    whole, chunks = (
        [
            (row["step"], key, float(row[key]))
            for row in csv.DictReader((tmp_path / name / "metrics.csv").open())
            for key in row
            if key.startswith(("train/loss", "train/err", "val/loss")) and row[key]
        ]
        for name in ("whole", "chunks")
    )
    assert len(whole) > 80
    assert [row[:2] for row in chunks] == [row[:2] for row in whole]
    assert [row[2] for row in chunks] == pytest.approx([row[2] for row in whole], rel=1e-4, abs=1e-4)


def test_the_run_leaves_log_row_pictures_and_a_checkpoint_that_samples(tmp_path, var_overrides):
    overrides = [override for override in var_overrides if override != "logger=csv"]
    fit(tmp_path, *overrides, "logger=default", "logger.wandb.mode=offline")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    logged = {key for row in rows for key, value in row.items() if value}
    wanted = [
        "train/loss",
        "train/loss_last",
        "train/err",
        "train/err_last",
        "train/loss_scale_03",
        "train/grad_norm",
        "lr",
    ]
    wanted += [
        "val/loss",
        "val/loss_scale_00",
        "val/err",
        "val/loss_se",
        "count/images_seen",
        "count/tokens_seen",
        "count/flops_exact",
    ]
    wanted += ["count/flops_6nd", "speed/images_per_second", "data/skipped"]
    assert set(wanted) <= logged
    row = json.loads((tmp_path / "run.json").read_text())
    assert row["state"] == "finished" and row["step"] == 9 and row["tokens_seen"] == 72 * 30
    assert row["val_loss"] == pytest.approx(
        sum(row[f"val_loss_scale_{k:02d}"] * n for k, n in enumerate([1, 4, 9, 16])) / 30, rel=1e-5
    )
    assert list((tmp_path / "pictures").glob("samples-*.png"))
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))
    tokenizer, var, names = load(tmp_path / "checkpoints/last.ckpt")
    assert names == [str(digit) for digit in range(10)]
    assert generate(var, tokenizer, torch.tensor([3]), cfg_scale=1.0).shape == (1, 3, 16, 16)


def test_resuming_a_finished_run_changes_nothing(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    first = json.loads((tmp_path / "run.json").read_text())
    fit(tmp_path, *var_overrides, "ckpt_path=last")
    second = json.loads((tmp_path / "run.json").read_text())
    assert {**second, "created": None, "device_seconds": None} == {**first, "created": None, "device_seconds": None}
    assert second["state"] == "finished"


def test_averaged_weights_validate_and_are_loaded(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides, "callbacks.ema={_target_:varlab.training.ema.EMA,decay:0.5}")
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    name = "net.head.weight"
    assert not torch.equal(saved["ema"][name], saved["state_dict"][name])
    assert torch.equal(load(tmp_path / "checkpoints/last.ckpt")[1].head.weight, saved["ema"][name])
    assert torch.equal(
        load(tmp_path / "checkpoints/last.ckpt", use_ema=False)[1].head.weight, saved["state_dict"][name]
    )


def poison(steps):
    return [
        "+callbacks.poison._target_=support.fault_callbacks.Poison",
        f"+callbacks.poison.steps={steps}",
        "callbacks.ema=null",
    ]


def test_a_step_with_an_infinite_gradient_is_skipped_and_counted(tmp_path, var_overrides):
    constant = [
        *var_overrides,
        "schedule@module.schedule=constant",
        "module.schedule.warmup=0.0",
        "model.drop_path=0.0",
    ]
    fit(tmp_path / "before", *constant, "callbacks.ema=null", "steps=2")
    fit(tmp_path / "skipped", *constant, *poison([3]), "steps=3")
    saved = torch.load(tmp_path / "skipped/checkpoints/last.ckpt", weights_only=True)
    health = saved["callbacks"]["Health"]
    assert (health["num_skipped"], health["in_row"], saved["global_step"]) == (1, 1, 3)
    for (name, a), b in zip(weights(tmp_path / "before").items(), weights(tmp_path / "skipped").values(), strict=True):
        assert torch.equal(a, b), name  # the third step changed nothing


def test_skipped_steps_in_a_row_end_the_run_which_goes_on_from_before(tmp_path, var_overrides):
    with pytest.raises(ValueError, match="not finite 3 steps in a row, the last at step 6: lower module.base_lr"):
        fit(tmp_path, *var_overrides, *poison([4, 5, 6]), "callbacks.health.max_in_row=3")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"
    fit(tmp_path, *var_overrides, "ckpt_path=last")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"


def test_a_checkpoint_every_few_minutes_serves_as_well(tmp_path, var_overrides):
    """An interval of nothing: after every step."""
    timed = [*var_overrides, "save_every=1000", "callbacks.timed.train_time_interval.minutes=0"]
    fit(tmp_path / "whole", *timed, *log_to(tmp_path / "whole.log"))
    killed = command(tmp_path / "killed", *timed, *log_to(tmp_path / "killed.log"), *kill_at(5), "ckpt_path=last")
    assert killed.returncode == -9
    assert torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    fit(tmp_path / "killed", *timed, *log_to(tmp_path / "killed.log"), "ckpt_path=last")
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "killed.log")
    assert sorted(file.name for file in (tmp_path / "killed/checkpoints").iterdir()) == [
        "best-0000009.ckpt",
        "last.ckpt",
    ]


def test_released_weights_are_fine_tuned(tmp_path, digits_folder):
    wide = [*images_overrides(digits_folder), "model.channels=32", "model.num_groups=32"]
    released = instantiate(config(tmp_path, *wide).model)
    torch.save(to_released(released), tmp_path / "released.pth")
    tuned = [*wide, f"module.init_from={tmp_path / 'released.pth'}", "model.dropout=0.1"]
    fit(tmp_path / "still", *tuned, "module.base_lr=0.0")
    for name, value in released.state_dict().items():
        if "hits" not in name and "num_updates" not in name:
            assert torch.equal(weights(tmp_path / "still")[f"net.{name}"], value), name
    fit(tmp_path / "tuned", *tuned)
    assert not torch.equal(weights(tmp_path / "tuned")["net.decoder.conv_out.weight"], released.decoder.conv_out.weight)
    with pytest.raises(
        Exception, match=r"released.pth holds a tokenizer with codebook_size=12, but this run has codebook_size=16"
    ):
        fit(tmp_path / "other", *tuned, "model.quantizer.codebook_size=16")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("module.base_lr=1e-3x", r"module.base_lr='1e-3x' has type str"),
        ("model.depth=abc", r"model.depth='abc' has type str"),
        ("+model.dpeth=3", r"dpeth: varlab.models.var.VAR has no such setting"),
        ("+module.schedule.shape=cosine", r"shape: varlab.training.schedules.Linear has no such setting"),
        ("data.global_batch_size=96", "48 images, fewer than one batch of 96"),
        ("steps=-1", "the run has no length: give epochs=N or steps=N"),
        ("epochs=null", "epochs=None: give an integer"),
        ("module.recompute=some", "module.recompute='some': choose one of none, selective, all"),
        ("module.loss_chunks=0", "module.loss_chunks=0: give 1 or more"),
        ("module.attention=dense", "module.attention='dense': choose one of masked, split, flex"),
        ("accumulate=3", "global_batch_size=8 is not divisible by 1 devices x 3"),
        ("tokenizer=nowhere.ckpt", "checkpoint nowhere.ckpt does not exist"),
        ("data.path=nowhere", r"nowhere/manifest.json does not exist: make it with `varlab tokenize`"),
        ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt does not exist"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(change, message, tmp_path, var_overrides):
    with pytest.raises(Exception, match=message) as caught:
        fit(tmp_path, *var_overrides, change)
    causes = [caught.value, caught.value.__cause__]
    assert any(isinstance(cause, ValueError) for cause in causes)


def test_a_new_run_does_not_write_among_old_checkpoints(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="already holds checkpoints: continue that run with ckpt_path=last"):
        fit(tmp_path, *var_overrides)
    with pytest.raises(ValueError, match="holds a VAR with depth=2, but this run has depth=3"):
        fit(tmp_path, *var_overrides, "model.depth=3", "steps=12", "ckpt_path=last")
    with pytest.raises(ValueError, match="other data, seed, lanes, window or global batch size"):
        fit(tmp_path, *var_overrides, "data.global_batch_size=4", "steps=12", "ckpt_path=last")


def test_a_token_cache_of_another_tokenizer_is_refused(tmp_path, digits_folder, var_overrides):
    fit(tmp_path / "other", *images_overrides(digits_folder), "seed=1")
    with pytest.raises(ValueError, match=r"was made by tokenizer \w+, but this one is \w+: run `varlab tokenize`"):
        fit(tmp_path / "var", *var_overrides, f"tokenizer={tmp_path / 'other/checkpoints/last.ckpt'}")
    fit(tmp_path / "coarse", *images_overrides(digits_folder), "patch_nums=[1,2,4]")
    with pytest.raises(ValueError, match=r"patch_nums \[1, 2, 3, 4\], but the tokenizer has \[1, 2, 4\]"):
        fit(tmp_path / "var", *var_overrides, f"tokenizer={tmp_path / 'coarse/checkpoints/last.ckpt'}")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, var_overrides, tokenizer_run):
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"junk.ckpt is not a checkpoint"):
        load_tokenizer(junk)
    with pytest.raises(ValueError, match="holds a tokenizer only"):
        load(tokenizer_run / "checkpoints/last.ckpt")


def test_a_wrong_type_or_key_ends_with_code_1_and_no_traceback(tmp_path, var_overrides):
    answer = command(tmp_path, *var_overrides, "module.base_lr=1e-3x")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stdout + answer.stderr
    assert "module.base_lr='1e-3x'" in answer.stdout + answer.stderr
    answer = command(tmp_path, *var_overrides, "modul.base_lr=1")
    assert answer.returncode == 1
    assert "modul" in answer.stderr


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_training_losses_are_the_recorded_ones(kind, tmp_path, digits_folder, var_overrides, monkeypatch):
    """A refactor changes none of them; a deliberate change writes tests/golden/losses.json anew, in its own commit.

    With Pillow's resize, which every version of torch can do."""
    monkeypatch.setattr(image_data, "HAS_LANCZOS", False)
    overrides = images_overrides(digits_folder) if kind == "tokenizer" else var_overrides
    fit(tmp_path, *overrides, *log_to(tmp_path / "log"))
    losses = [float.fromhex(loss) for loss in logged_losses(tmp_path / "log").values()]
    assert losses == pytest.approx(golden("losses")[kind], rel=2e-4)

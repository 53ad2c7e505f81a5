"""Work over the processes of torchrun."""

import threading
import time

import pytest
import torch

from varlab.distributed import WorkSplit, default_device, use_exact_fp32, wait_for_files


def test_rank_and_number_of_processes_come_from_torchrun_or_srun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert WorkSplit.of_environment() == WorkSplit(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert WorkSplit.of_environment() == WorkSplit(0, 1)  # the batch script, which is no task
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert WorkSplit.of_environment() == WorkSplit(1, 2)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert WorkSplit.of_environment() == WorkSplit(3, 4)  # torchrun within srun


def test_each_process_takes_its_own_gpu_and_the_given_device_wins(monkeypatch):
    assert default_device("meta") == "meta"
    with pytest.raises(ValueError, match="device='gpu': give cpu, cuda"):
        default_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2': torch sees 2 devices"):
        default_device("cuda:2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_device(None) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device(None) == "cuda:0"
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert default_device(None) == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert default_device(None) == "cuda:2"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # the scheduler shows each process its own
    assert default_device(None) == "cuda:0"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: 2 are visible"):
        default_device(None)


def test_files_of_other_processes_are_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "late").touch())
    (tmp_path / "early").touch()
    waiting = threading.Thread(target=wait_for_files, args=([tmp_path / "early", tmp_path / "late"],))
    waiting.start()
    waiting.join(timeout=20)
    assert not waiting.is_alive() and (tmp_path / "late").is_file()


def test_waiting_ends_when_no_file_appears(tmp_path):
    (tmp_path / "early").touch()
    with pytest.raises(
        ValueError, match="1 of 2 files are missing after 0.002 minutes without a new one, first .*late"
    ):
        wait_for_files([tmp_path / "early", tmp_path / "late"], timeout=0.12, every=0.05)


def test_fp32_on_a_gpu_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    use_exact_fp32()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32

"""Work over the processes of torchrun."""

import threading
import time

from varlab.distributed import WorkSplit, default_device, wait_for_files


def test_rank_and_number_of_processes_come_from_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert WorkSplit.of_environment() == WorkSplit(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert WorkSplit.of_environment() == WorkSplit(3, 4)


def test_each_process_takes_its_own_gpu_and_the_given_device_wins(monkeypatch):
    assert default_device("meta") == "meta"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_device(None) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert default_device(None) == "cuda:2"


def test_files_of_other_processes_are_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "late").touch())
    (tmp_path / "early").touch()
    waiting = threading.Thread(target=wait_for_files, args=([tmp_path / "early", tmp_path / "late"],))
    waiting.start()
    waiting.join(timeout=20)
    assert not waiting.is_alive() and (tmp_path / "late").is_file()

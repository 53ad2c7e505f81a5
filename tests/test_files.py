"""Files are written whole or not at all."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from varlab.files import (
    FolderLock,
    Schema,
    atomic_folder,
    atomic_write,
    checked,
    flat,
    json_hash,
    load_json,
    lock_holder,
    read_curves,
    reason_of,
    save_json,
    sha256,
    this_host,
)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "new/file.txt"
    with atomic_write(file) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/whole").is_file()
    with pytest.raises(ValueError, match="out already exists"), atomic_folder(tmp_path / "out"):
        pass


def test_json_is_read_back_or_the_command_that_makes_it_is_named(tmp_path):
    save_json(tmp_path / "a.json", {"x": [1, 2]})
    assert load_json(tmp_path / "a.json", "varlab pack") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b.json is not valid JSON .*: make it again with `varlab pack`"):
        load_json(tmp_path / "b.json", "varlab pack")
    with pytest.raises(ValueError, match=r"c.json does not exist: make it with `varlab pack`"):
        load_json(tmp_path / "c.json", "varlab pack")


def test_hashes_depend_on_content_alone(tmp_path):
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")
    assert json_hash({"a": 1, "b": 2}) == json_hash(json.loads('{"b": 2, "a": 1}')) != json_hash({"a": 1, "b": 3})


def test_nested_settings_become_dotted_keys():
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_the_last_row_of_a_repeated_step_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n2,0,5.0\n1,0,6.0\n,0,9\n2,0,4.0\n3,0,\n")
    assert read_curves(tmp_path / "metrics.csv") == {"loss": {1: 6.0, 2: 4.0}}
    assert read_curves(tmp_path / "missing.csv") == {}


HOLD = """
import sys, time
from pathlib import Path
from varlab.files import FolderLock
with FolderLock(Path(sys.argv[1]), "varlab train"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    """A process that uses a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path):
    process = hold(tmp_path / "run")
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/.last.ckpt.4711.partial").write_bytes(b"half")
    message = f"run is in use by `varlab train` \\(process {process.pid} on {socket.gethostname()}\\): wait for it"
    with pytest.raises(ValueError, match=message), FolderLock(tmp_path / "run", "varlab train"):
        pass
    assert lock_holder(tmp_path / "run")["pid"] == process.pid
    process.kill()
    process.wait()
    assert lock_holder(tmp_path / "run") is None
    with FolderLock(tmp_path / "run", "varlab train"):
        assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/.lock").exists()


def test_another_host_is_trusted_while_it_renews_its_lock(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    holder = {"host": "n2/boot", "pid": 7, "started": "1", "slurm_job": "12", "command": "varlab train"}
    lock.write_text(json.dumps(holder))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    message = r"\(process 7 on n2, SLURM job 12\).*; if that host is gone, try again in 1[12]\d s"
    with pytest.raises(ValueError, match=message), FolderLock(tmp_path, "varlab train"):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # SLURM has started the job again
    with FolderLock(tmp_path, "varlab train"):
        pass
    monkeypatch.delenv("SLURM_JOB_ID")
    lock.write_text(json.dumps(holder))
    os.utime(lock, (0, os.stat(lock).st_mtime - FolderLock.STALE - 1))
    with FolderLock(tmp_path, "varlab train"):
        assert lock.is_file()
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    """Also where a lock is left whose process is gone."""
    dead = {"host": this_host(), "pid": 1, "started": "never", "slurm_job": None, "command": "varlab train"}
    (tmp_path / ".lock").write_text(json.dumps(dead))
    started = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(6)
    ]
    lines = []
    for process in started:
        if process.poll() is None:
            lines.append(process.stdout.readline())
    for process in started:
        process.kill()
        process.wait()
    assert lines.count(b"held\n") == 1


def test_a_process_that_lost_its_folder_ends(tmp_path):
    script = HOLD.replace("with FolderLock", "FolderLock.BEAT = 0.2\nwith FolderLock")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".lock").is_file():
        time.sleep(0.05)
    time.sleep(0.3)
    (tmp_path / ".lock").write_text("{}")
    assert "was taken over by another process" in process.communicate(timeout=30)[1] and process.returncode == 1


def test_an_empty_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(RuntimeError), FolderLock(tmp_path / "out", "varlab pack"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()


def test_half_written_files_of_a_folder_in_use_below_are_left_alone(tmp_path):
    for name in ("checkpoints", "other/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".last.ckpt.1.partial").touch()
    (tmp_path / "checkpoints/.last.ckpt.partial").mkdir()
    (tmp_path / "other/.lock").touch()
    with FolderLock(tmp_path, "varlab train"):
        assert not list((tmp_path / "checkpoints").iterdir())
        assert len(list((tmp_path / "other/checkpoints").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"host": "n1/x"'])
def test_a_lock_that_cannot_be_read_binds_for_a_moment_only(content, tmp_path):
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with pytest.raises(ValueError, match="is in use"), FolderLock(tmp_path, "varlab train"):
        pass
    os.utime(lock, (0, os.stat(lock).st_mtime - FolderLock.BEAT - 1))
    with FolderLock(tmp_path, "varlab train"):
        pass


def test_a_value_that_json_does_not_have_is_refused():
    class Sized(Schema):
        size: int

    assert checked({"size": 3, "more": [1]}, Sized, "a.ckpt")["more"] == [1]
    with pytest.raises(ValueError, match=r"a.ckpt is not as expected: .*not JSON serializable"):
        checked({"size": 3, "more": {1, 2}}, Sized, "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt: size is '3', expected a valid integer"):
        checked({"size": "3"}, Sized, "a.ckpt")


def test_an_error_without_a_message_is_told_by_its_kind():
    assert reason_of(ValueError("one\ntwo")) == "one" and reason_of(EOFError()) == "EOFError"

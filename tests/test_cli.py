"""The command line."""

import subprocess
import sys

import pytest


def test_the_command_line_starts_without_torch():
    script = "import sys, varlab.cli, varlab.commands.train, varlab.commands.pack"
    script += "; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "varlab", *arguments], capture_output=True, text=True, check=False)


def test_varlab_alone_lists_the_verbs_and_an_unknown_one_is_named():
    assert all(verb in run().stdout for verb in ("pack", "train", "tokenize", "sample", "scaling"))
    answer = run("trian")
    assert answer.returncode == 1
    assert "there is no command 'trian'" in answer.stderr


@pytest.mark.parametrize(
    ("verb", "setting"), [("pack", "shard_images"), ("train", "ckpt_path"), ("sample", "cfg_scale")]
)
def test_help_shows_settings_and_examples(verb, setting):
    answer = run(verb, "--help")
    assert answer.returncode == 0
    assert setting in answer.stdout
    assert answer.stdout.count(f"varlab {verb} ") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("pack", "source=nothing", "out=x"),
            "source='nothing' is unknown: choose one of folder, mnist5k, ilsvrc2012, parquet, csv, idx, shards",
        ),
        (("pack", "source=folder", "path=nowhere", "out=x"), "path=nowhere is not a folder"),
        (("pack", "source=mnist5k"), "out"),
        (("pack", "sorce=mnist5k", "out=x"), "sorce"),
        (("train",), "data.path"),
        (("sample", "checkpoint=nowhere.ckpt", "out=x"), "checkpoint nowhere.ckpt does not exist"),
        (("scaling", "source=nowhere", "out=x"), "source=nowhere: there is no such file or folder"),
    ],
)
def test_what_a_user_got_wrong_is_said_without_a_traceback(arguments, message):
    answer = run(*arguments)
    assert answer.returncode == 1
    assert message in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr


def test_a_reader_that_stops_reading_is_no_error():
    shown = f"{sys.executable} -m varlab | true; sleep 1"
    answer = subprocess.run(["bash", "-c", f"{shown}"], capture_output=True, text=True)
    assert answer.stderr == ""

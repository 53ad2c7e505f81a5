"""A folder of samples: the same set however it is drawn."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.runs import draw, sample_settings

from varlab.evaluation.image_sets import ImageSet
from varlab.sampling import sample_folder


def equal(a, b):
    """Batches of other sizes add up in another order: one level at most."""
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= 1 for name in a)


def test_the_set_does_not_depend_on_batch_size_restarts_or_processes(export_folder, tmp_path):
    whole = draw(export_folder, tmp_path / "whole", "batch_size=7")
    assert list(whole)[:4] == [
        "000000-class0000.png",
        "000001-class0001.png",
        "000002-class0002.png",
        "000003-class0000.png",
    ]
    assert equal(whole, draw(export_folder, tmp_path / "small", "batch_size=2"))
    begun = draw(export_folder, tmp_path / "restarted", "batch_size=3", "num=4")
    stamps = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "restarted/images").iterdir()}
    (tmp_path / "restarted/images/000001-class0001.png").unlink()
    assert len(begun) == 4 and equal(whole, draw(export_folder, tmp_path / "restarted", "batch_size=3"))
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "restarted/images").iterdir()}
    assert kept["000002-class0002.png"] == stamps["000002-class0002.png"]
    processes = []
    for rank in (1, 0):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "varlab", "sample", *sample_settings(export_folder, tmp_path / "two")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert [process.wait(timeout=120) for process in processes] == [0, 0], processes[0].stderr.read()
    two = {file.name: np.asarray(Image.open(file)).astype(int) for file in (tmp_path / "two/images").iterdir()}
    assert equal(whole, dict(sorted(two.items())))


def test_a_process_that_starts_late_still_draws_its_own_share(export_folder, tmp_path, monkeypatch):
    """The first of three has drawn its images before the others look."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("varlab.distributed.wait_for_files", lambda files: None)
    for rank, drawn in [("1", {1, 4}), ("2", {1, 2, 4, 5}), ("0", set(range(7)))]:
        monkeypatch.setenv("RANK", rank)
        images = draw(export_folder, tmp_path / "out")
        assert {int(name[:6]) for name in images} == drawn


def test_other_settings_do_not_mix_into_a_folder(export_folder, tmp_path):
    draw(export_folder, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds images made with other settings \(cfg_scale, seed\): choose another out="
    ):
        draw(export_folder, tmp_path / "out", "cfg_scale=3", "seed=9")


def test_an_npz_for_the_adm_evaluator(export_folder, tmp_path):
    given = ["classes=balanced", "num=6"]
    images = draw(export_folder, tmp_path / "png", *given)
    assert not draw(export_folder, tmp_path / "out", *given, "npz=true")
    array = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (6, 16, 16, 3)
    for pixels, image in zip(array, images.values(), strict=True):
        assert (pixels == image).all()
    told = json.loads((tmp_path / "out/samples.json").read_text())
    assert told["labels"] == [0, 1, 2, 0, 1, 2] and told["rounding"] == "nearest" and len(told["checkpoint"]) == 33
    assert len(ImageSet(tmp_path / "out")) == 6
    assert (tmp_path / "out/grid.png").read_bytes() == (tmp_path / "png/grid.png").read_bytes()


def test_a_killed_npz_continues_from_its_images_and_a_complete_one_is_kept(export_folder, tmp_path, monkeypatch):
    given, out = ["classes=balanced", "num=6", "npz=true", "batch_size=2"], tmp_path / "out"
    draws, real = [], sample_folder.draw_best

    def counted(var, tokenizer, rows, settings, seeds, *search):
        draws.append(seeds)
        if len(draws) == 3:
            raise KeyboardInterrupt
        return real(var, tokenizer, rows, settings, seeds, *search)

    monkeypatch.setattr(sample_folder, "draw_best", counted)
    with pytest.raises(KeyboardInterrupt):
        draw(export_folder, out, *given)
    assert len(list((out / "images").glob("*.npy"))) == 4 and not (out / "samples.npz").exists()
    draw(export_folder, out, *given)
    assert draws[2] == draws[3] and draws[4:] == [[0, 1]] and not (out / "images").exists()
    stamp = (out / "samples.npz").stat().st_mtime_ns
    draw(export_folder, out, *given)
    assert len(draws) == 5 and (out / "samples.npz").stat().st_mtime_ns == stamp
    draw(export_folder, out, *given[:1], "num=9", *given[2:])
    assert len(np.load(out / "samples.npz")["arr_0"]) == 9


def test_png_images_of_an_earlier_call_stay_and_their_record_does_not_stand_for_an_npz(export_folder, tmp_path):
    given, out = ["classes=balanced", "batch_size=3"], tmp_path / "out"
    draw(export_folder, out, *given, "num=3", "npz=true")
    images = draw(export_folder, out, *given, "num=6")
    assert len(images) == 6 and json.loads((out / "samples.json").read_text())["images"] == "images"
    assert len(draw(export_folder, out, *given, "num=6", "npz=true")) == 6  # the PNG images are still there
    assert np.load(out / "samples.npz")["arr_0"].shape[0] == 6 and not list((out / "images").glob("*.npy"))


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_images(export_folder, tmp_path):
    """In a process without the tests' type checks; the last batch is not full."""
    eager = draw(export_folder, tmp_path / "eager", "batch_size=4")
    command = [
        sys.executable,
        "-m",
        "varlab",
        "sample",
        *sample_settings(export_folder, tmp_path / "compiled", "batch_size=4"),
    ]
    answer = subprocess.run([*command, "compiled=blocks"], capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert "recompile_limit" not in answer.stderr
    drawn = {file.name: np.asarray(Image.open(file)).astype(int) for file in (tmp_path / "compiled/images").iterdir()}
    assert equal(eager, drawn)


def test_what_is_typed_is_a_name_before_it_is_a_number():
    names = [*"ABCDEFGH", *"0123456789"]
    assert sample_folder.labels_of(["A", 7, "7", 0, 17], 5, names, len(names)) == [0, 15, 15, 8, 17]


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (list("varlab" * 10), 6),
        (list(range(10)) * 5, 10),
        ([0, 1, 2, 0, 1], 3),
        (["a red heart"] * 8, 10),
        (list(range(62)), 10),
        ([0, 0, 0, 1, 1, 2], 6),
        ([0] * 20 + [1] * 20, 10),
        ([], 10),
    ],
)
def test_each_column_of_the_grid_has_one_label_where_ten_columns_allow_it(labels, columns):
    assert sample_folder.columns_for(labels) == columns

"""Files are written whole or not at all."""

import json

import pytest

from varlab.files import atomic_folder, atomic_write, flat, json_hash, load_json, read_curves, save_json, sha256


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

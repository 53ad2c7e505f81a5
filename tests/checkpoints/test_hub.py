"""Models on the Hugging Face Hub, against a server that speaks its language."""

import subprocess
import sys

import pytest
import torch
from support.servers import HubModels, free_port, hub_server

from varlab.checkpoints import hub
from varlab.checkpoints.load import contains_var, load, load_tokenizer
from varlab.commands import export
from varlab.pipeline import VARPipeline

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def models(monkeypatch, tmp_path):
    """An empty Hub, and a user who is logged in."""
    held = HubModels()
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(held) as url:
        reach(url, monkeypatch)
        yield held


def reach(url, monkeypatch):
    """What HF_ENDPOINT does, which is read when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_model_that_was_pushed_loads_by_name_with_the_same_weights(models, export_folder, monkeypatch):
    pipeline = VARPipeline.from_pretrained(export_folder, device="cpu")
    assert pipeline.push_to_hub("me/animals") == f"{models.url}/me/animals"
    assert sorted(models.files["me/animals"]) == [
        "README.md",
        "config.json",
        "tokenizer.safetensors",
        "var.safetensors",
    ]
    again = VARPipeline.from_pretrained("me/animals", device="cpu")
    assert again.class_names == pipeline.class_names
    for mine, theirs in ((pipeline.var, again.var), (pipeline.tokenizer, again.tokenizer)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    downloads = len(models.downloads)
    assert contains_var("me/animals") and len(load("me/animals")) == 3 and load_tokenizer("me/animals") is not None
    assert len(models.downloads) == downloads  # the cache has it
    commit = models.commit("me/animals")
    assert load(f"me/animals@{commit}")[2] == pipeline.class_names
    with pytest.raises(ValueError, match="has no revision v9"):
        load("me/animals@v9")


def test_a_cached_model_loads_without_a_network(models, export_folder, monkeypatch):
    hub.upload(export_folder, "me/animals")
    names = load("me/animals")[2]
    reach(f"http://127.0.0.1:{free_port()}", monkeypatch)
    assert load("me/animals")[2] == names
    with pytest.raises(ValueError, match="checkpoint me/other does not exist here, and the Hugging Face Hub failed"):
        load("me/other")


def test_files_that_no_export_has_are_neither_uploaded_nor_downloaded(models, export_folder):
    (export_folder / "notes.txt").write_text("private")
    hub.upload(export_folder, "me/animals")
    assert "notes.txt" not in models.files["me/animals"]
    models.files["me/animals"] |= {
        "pytorch_model.bin": b"x",
        "modeling.py": b"raise SystemExit",
        "a/b.safetensors": b"",
    }
    folder = hub.download("me/animals")
    assert not (folder / "pytorch_model.bin").exists() and not (folder / "modeling.py").exists()
    models.files["me/foreign"] = {"model.safetensors": b""}
    with pytest.raises(ValueError, match=r"me/foreign .* is no export of varlab"):
        load("me/foreign")


def test_private_models_need_the_token(models, export_folder, monkeypatch):
    hub.upload(export_folder, "me/animals", private=True)
    assert load("me/animals")[2]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "elsewhere")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match=r"me/animals exists neither here nor, for this user, on the Hugging Face Hub"):
        load("me/animals")
    with pytest.raises(ValueError, match=r"uploading to me/animals failed: .*401"):
        hub.upload(export_folder, "me/animals")


def test_paths_are_not_looked_for_on_the_hub(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in ("runs/var", "a/b/c", "/none/model", "../x/y", "runs/var.ckpt", "models/x.safetensors"):
        with pytest.raises(ValueError, match=r"does not exist; pretrained models are"):
            load(missing)
    with pytest.raises(ValueError, match="give user/name"):
        hub.upload(tmp_path, "glyphs")


def test_rounded_weights_are_not_pushed(models, export_folder):
    pipeline = VARPipeline.from_pretrained(export_folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"load with dtype=torch.float32 to save"):
        pipeline.push_to_hub("me/animals")
    assert models.files == {}


def test_export_uploads_when_asked(models, export_folder, tmp_path, capsys, monkeypatch):
    from support.runs import config

    export.run(
        config(tmp_path, f"checkpoint={export_folder}", f"out={tmp_path / 'mine'}", "hub=me/mine", verb="export")
    )
    assert f"{models.url}/me/mine" in capsys.readouterr().out
    assert load("me/mine")[2] == load(export_folder)[2]
    settings = [f"checkpoint={export_folder}", f"out={tmp_path / 'other'}"]
    with pytest.raises(ValueError, match="give user/name"):
        export.run(config(tmp_path, *settings, "hub=mine", verb="export"))
    assert not (tmp_path / "other").exists()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match=r"other is complete: `hf upload me/other .*other` tries again"):
        export.run(config(tmp_path, *settings, "hub=me/other", verb="export"))
    card = models.files["me/mine"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: varlab\n") and 'from_pretrained("me/mine")' in card


def test_without_the_library_a_sentence_says_what_to_install():
    code = """
import sys
sys.modules["huggingface_hub"] = None
from varlab.checkpoints.load import load
try:
    load("me/animals")
except ValueError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'varlab[hub]'" in answer.stdout

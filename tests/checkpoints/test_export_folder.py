"""A trained model leaves varlab and comes back: safetensors, released layout, programs; hostile files do nothing."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import PATCH_NUMS, make_tokenizer, make_var
from support.runs import EXPORTED, config, fit

from varlab.checkpoints.export_folder import load_pretrained, save_pretrained
from varlab.checkpoints.load import load, load_any, load_tokenizer
from varlab.checkpoints.programs import DecoderProgram, StepProgram, decoder_example, step_example
from varlab.checkpoints.released_layout import to_released
from varlab.commands import export, import_released
from varlab.models.transformer import BlockCache
from varlab.pipeline import VARPipeline, label_of
from varlab.sampling.generate import generate

NAMES = ["tench, Tinca tinca", "golden retriever", "tabby cat"]


@pytest.fixture
def folder(tmp_path, tokenizer, var):
    save_pretrained(tmp_path / "model", tokenizer, var, NAMES, {"val_loss": 3.2})
    return tmp_path / "model"


def export_to(tmp_path, *settings):
    export.run(config(tmp_path, *settings, verb="export"))


def test_the_folder_gives_back_the_same_networks(folder, tokenizer, var):
    again, transformer, names = load_pretrained(folder)
    assert names == NAMES and transformer is not None
    for a, b in [(tokenizer, again), (var, transformer)]:
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    card = (folder / "model_card.md").read_text()
    assert "16 px" in card and "3 classes" in card and "val_loss: 3.2" in card and "VARPipeline.from_pretrained" in card


def test_the_pipeline_needs_neither_lightning_nor_hydra(folder):
    code = f"""
import sys
from varlab.pipeline import VARPipeline
images = VARPipeline.from_pretrained({str(folder)!r})(labels=["golden retriever", 2, "tench"], cfg_scale=4.0, seed=0)
assert [image.size for image in images] == [(16, 16)] * 3
found = [name for name in ("lightning", "hydra", "omegaconf", "wandb", "pickle5") if name in sys.modules]
assert not found, found
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_pipeline_draws_what_generate_draws(folder, tokenizer, var):
    images = VARPipeline.from_pretrained(folder)([0, "tabby cat", 1], cfg_scale=2.0, top_k=5, seed=3, batch_size=2)
    expected = generate(var, tokenizer, torch.tensor([0, 2, 1]), cfg_scale=2.0, top_k=5, seed=3)
    for image, pixels in zip(images, expected, strict=True):
        levels = torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1)
        assert (levels - 255 * pixels).abs().max() <= 0.51


def test_classes_go_by_name_or_number_and_unknown_ones_list_the_nearest():
    assert [label_of(label, NAMES, 3) for label in ("Golden Retriever", "tinca tinca", "2", 1, 3)] == [1, 0, 2, 1, 3]
    with pytest.raises(ValueError, match="no class is called 'golden retreiver': the nearest are 'golden retriever'"):
        label_of("golden retreiver", NAMES, 3)
    with pytest.raises(ValueError, match="label 9 is out of range: there are 3 classes, 0..2"):
        label_of(9, NAMES, 3)
    with pytest.raises(ValueError, match="label 77 is out of range"):
        label_of("77", NAMES, 3)


def test_a_training_checkpoint_goes_out_and_is_read_by_all(tmp_path, var_overrides, capsys):
    fit(tmp_path / "run", *var_overrides, *EXPORTED)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'averaged'}")
    export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'raw'}", "ema=false")
    saved = torch.load(checkpoint, weights_only=True)
    for name, source in [("averaged", saved["ema"]), ("raw", saved["state_dict"])]:
        assert torch.equal(load_file(tmp_path / name / "var.safetensors")["head.weight"], source["net.head.weight"])
    assert "images_seen: 72" in (tmp_path / "raw/model_card.md").read_text()
    assert load(tmp_path / "raw")[2] == [str(digit) for digit in range(10)]
    with pytest.raises(ValueError, match="raw already exists: remove it, or choose another out="):
        export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'raw'}")
    with pytest.raises(ValueError, match="to='zip': choose one of safetensors, released"):
        export_to(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'zip'}", "to=zip")


def test_released_files_come_in_and_go_out_to_the_letter(tmp_path):
    tokenizer, var = make_tokenizer(channels=32, num_groups=32).eval(), make_var().eval()
    torch.save(to_released(tokenizer), tmp_path / "vae.pth")
    torch.save(to_released(var), tmp_path / "var.pth")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    settings = [f"tokenizer={tmp_path / 'vae.pth'}", f"var={tmp_path / 'var.pth'}", f"patch_nums={PATCH_NUMS}"]
    settings += [f"class_names={tmp_path / 'names.txt'}", f"out={tmp_path / 'in'}"]
    import_released.run(config(tmp_path, *settings, verb="import"))
    export_to(tmp_path, f"checkpoint={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "to=released")
    for ours, theirs in [("tokenizer", "vae"), ("var", "var")]:
        out, released = (
            torch.load(tmp_path / file, weights_only=True) for file in (f"out/{ours}.pth", f"{theirs}.pth")
        )
        assert list(out) == list(released)
        assert all(torch.equal(out[key], released[key]) for key in out)
    assert VARPipeline.from_pretrained(tmp_path / "in")("tabby cat")[0].size == (16, 16)


def test_weights_of_other_sizes_name_the_first_tensor_that_does_not_fit(folder):
    state = load_file(folder / "var.safetensors")
    save_file({**state, "blocks.0.attention.proj.weight": torch.zeros(3, 3)}, folder / "var.safetensors")
    message = r"var.safetensors: tensor 'blocks.0.attention.proj.weight' has shape \(3, 3\), expected \(32, 32\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "var.safetensors").unlink(), "var.safetensors is missing: the folder is incomplete"),
        (
            lambda f: (f / "var.safetensors").write_bytes(b"x" * 100),
            "var.safetensors is not a safetensors file, or it is damaged",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"format": 0})),
            "has format 0, this version reads 1 to 2: export it again",
        ),
    ],
)
def test_a_broken_folder_is_named(break_it, message, folder):
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        VARPipeline.from_pretrained(folder)


class Hostile:
    """Would touch a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["evil.pth", "evil.ckpt"])
def test_a_hostile_file_is_refused_unread(name, tmp_path):
    marker = tmp_path / "was-here"
    torch.save({"state_dict": Hostile(marker)}, tmp_path / name)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(marker)))
    for file in (tmp_path / name, tmp_path / "plain.pth"):
        with pytest.raises(ValueError, match="is not a checkpoint of tensors and plain values, or it is damaged"):
            load_any(file)
        with pytest.raises(ValueError, match="is not a checkpoint of tensors and plain values"):
            load_tokenizer(file)
    assert not marker.exists()


def test_exported_programs_compute_the_same(folder, tokenizer, var, tmp_path):
    export_to(tmp_path, f"checkpoint={folder}", "to=torch_export", f"out={tmp_path / 'programs'}")
    f_hat = torch.randn(3, 6, 4, 4)
    decoder = torch.export.load(tmp_path / "programs/decoder.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(decoder(f_hat), tokenizer.decode_features(f_hat) / 2 + 0.5)
    step = torch.export.load(tmp_path / "programs/step_03.pt2").module()
    inputs, labels = torch.randn(3, 29, 6), torch.tensor([0, 2, 3])
    with torch.no_grad():
        cache = [BlockCache(torch.empty(3, 2, 30, 16), torch.empty(3, 2, 30, 16)) for _ in var.blocks]
        for k, (first, last) in enumerate(var.step_bounds):
            logits = var.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], labels, cache)
        keys, values = (torch.stack([getattr(c, kind)[:, :, :14] for c in cache]) for kind in ("keys", "values"))
        found, new_keys, _ = step(inputs[:, 13:], labels, keys, values)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(new_keys, torch.stack([c.keys for c in cache]))
    assert StepProgram(var, 3)(*step_example(var, 3))[0].shape == (2, 16, 12)


def test_the_decoder_agrees_in_onnx_runtime(folder, tokenizer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_to(tmp_path, f"checkpoint={folder}", "to=onnx", f"out={tmp_path / 'onnx'}")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/decoder.onnx"))
    f_hat = torch.randn(5, 6, 4, 4)
    (images,) = session.run(None, {session.get_inputs()[0].name: f_hat.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(images), DecoderProgram(tokenizer)(f_hat), rtol=1e-4, atol=1e-5)
    assert decoder_example(tokenizer)[0].shape == (2, 6, 4, 4)

"""Exported programs compute what the networks do."""

import pytest
import torch
from support.runs import config

from varlab.checkpoints.programs import DecoderProgram, StepProgram, decoder_example, step_example
from varlab.commands import export


def export_to(tmp_path, *settings):
    export.run(config(tmp_path, *settings, verb="export"))


def test_exported_programs_compute_the_same(export_folder, tokenizer, var, tmp_path):
    export_to(tmp_path, f"checkpoint={export_folder}", "to=torch_export", f"out={tmp_path / 'programs'}")
    f_hat = torch.randn(3, 6, 4, 4)
    decoder = torch.export.load(tmp_path / "programs/decoder.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(decoder(f_hat), tokenizer.decode_features(f_hat) / 2 + 0.5)
    step = torch.export.load(tmp_path / "programs/step_03.pt2").module()
    inputs, labels = torch.randn(3, 29, 6), torch.tensor([0, 2, 3])
    with torch.no_grad():
        cache = var.start_cache(labels)
        for k, (first, last) in enumerate(var.step_bounds):
            logits = var.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], cache)
        keys, values = (torch.stack([getattr(c, kind)[:, :, :14] for c in cache.blocks]) for kind in ("keys", "values"))
        found, new_keys, _ = step(inputs[:, 13:], labels, keys, values)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(new_keys, torch.stack([c.keys for c in cache.blocks]))
    assert StepProgram(var, 3)(*step_example(var, 3))[0].shape == (2, 16, 12)


def test_the_decoder_agrees_in_onnx_runtime(export_folder, tokenizer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_to(tmp_path, f"checkpoint={export_folder}", "to=onnx", f"out={tmp_path / 'onnx'}")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/decoder.onnx"))
    f_hat = torch.randn(5, 6, 4, 4)
    (images,) = session.run(None, {session.get_inputs()[0].name: f_hat.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(images), DecoderProgram(tokenizer)(f_hat), rtol=1e-4, atol=1e-5)
    assert decoder_example(tokenizer)[0].shape == (2, 6, 4, 4)

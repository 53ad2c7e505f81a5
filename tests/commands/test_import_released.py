"""`varlab import_released`: released files come in and go out."""

import torch
from support.networks import CLASS_NAMES, PATCH_NUMS, make_tokenizer, make_var
from support.runs import config

from varlab.checkpoints.released_layout import to_released
from varlab.commands import export, import_released
from varlab.pipeline import VARPipeline


def export_to(tmp_path, *settings):
    export.run(config(tmp_path, *settings, verb="export"))


def test_released_files_come_in_and_go_out_to_the_letter(tmp_path):
    tokenizer, var = make_tokenizer(channels=32, num_groups=32).eval(), make_var().eval()
    torch.save(to_released(tokenizer), tmp_path / "vae.pth")
    torch.save(to_released(var), tmp_path / "var.pth")
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES))
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

"""`varlab audit`, on shards and on tokens."""

import json

import numpy as np
import pytest
from PIL import Image
from support.networks import make_tokenizer, make_var
from support.runs import config
from support.shards import make_shards

from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.load import load_tokenizer
from varlab.commands import audit, tokenize


def test_a_checkpoint_is_audited_with_one_command(tmp_path, capsys, tokenizer_run):
    shards = make_shards(tmp_path / "shards", num_train=120, num_val=110)
    tokenizer = load_tokenizer(tokenizer_run / "checkpoints/last.ckpt")
    var = make_var(num_classes=10, codebook_size=12, codebook_dim=6).eval()
    save_pretrained(tmp_path / "model", tokenizer, var, [str(digit) for digit in range(10)], {})
    cache = [f"tokenizer={tmp_path / 'model'}", f"shards={shards}", f"out={tmp_path / 'tokens'}", "resize_ratio=1.0"]
    tokenize.run(config(tmp_path, *cache, verb="tokenize"))
    shared = [f"checkpoint={tmp_path / 'model'}", "num_images=120"]
    audit.run(config(tmp_path, *shared, f"shards={tmp_path / 'tokens'}", f"out={tmp_path / 'cached'}", verb="audit"))
    (tmp_path / "samples").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * i, dtype=np.uint8)).save(tmp_path / f"samples/{i}.png")
    capsys.readouterr()
    given = [f"shards={shards}", f"samples={tmp_path / 'samples'}", f"out={tmp_path / 'audit'}"]
    audit.run(config(tmp_path, *shared, *given, verb="audit"))
    assert "likelihood" in (said := capsys.readouterr().out) and "a line in" in said
    told, cached = (json.loads((tmp_path / f"{name}/audit.json").read_text()) for name in ("audit", "cached"))
    assert told["membership"] == cached["membership"], "shards and their tokens say the same"
    assert told["protocol"]["train_images"] == 120 and told["protocol"]["val_images"] == 110
    assert told["memorization"]["median_distance_samples"] > told["memorization"]["median_distance_held_out"]
    assert all((tmp_path / f"audit/{name}.png").is_file() for name in ("audit", "nearest"))
    card = (tmp_path / "model/README.md").read_text()
    assert card.count("membership inference: AUC") == 1
    with pytest.raises(ValueError, match="tokens only"):
        audit.run(config(tmp_path, *shared, f"shards={tmp_path / 'tokens'}", "samples=x", "out=y", verb="audit"))
    other = tmp_path / "other"
    save_pretrained(other, make_tokenizer(), var, None, {})
    with pytest.raises(ValueError, match="made by another tokenizer"):
        audit.run(config(tmp_path, f"checkpoint={other}", f"shards={tmp_path / 'tokens'}", "out=y", verb="audit"))

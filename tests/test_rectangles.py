"""Images that are not square, from shards to scores."""

import json

import numpy as np
from PIL import Image
from support.runs import SHORT, TOKENIZER, VAR, command, config, draw, fit, score

from varlab.commands import edit, export, tokenize
from varlab.commands import train as train_command

SIZE = ["data.resolution=[16,24]", "patch_nums=[1,[2,3],[4,6]]"]


def test_the_whole_way(tmp_path, digits_folder, capsys):
    fit(tmp_path / "tokenizer", *TOKENIZER, *SHORT, *SIZE, f"data.path={digits_folder}", "data.random_flip=true")
    tokenizer = tmp_path / "tokenizer/checkpoints/last.ckpt"
    made = [f"tokenizer={tokenizer}", f"shards={digits_folder}", f"out={tmp_path / 'tokens'}", "crops=2", "flips=true"]
    tokenize.run(config(tmp_path, *made, verb="tokenize"))
    assert np.load(tmp_path / "tokens/train.tokens.npy").shape[2] == 1 + 6 + 24
    fit(tmp_path / "var", *VAR, *SHORT, f"data.path={tmp_path / 'tokens'}", f"tokenizer={tokenizer}")
    images = [f"data.path={digits_folder}", "data=images", SIZE[0], f"tokenizer={tokenizer}"]
    fit(tmp_path / "from_images", *VAR, *SHORT, *images)
    checkpoint = tmp_path / "var/checkpoints/last.ckpt"
    samples = draw(checkpoint, tmp_path / "samples")
    assert {image.shape for image in samples.values()} == {(16, 24, 3)}
    export.run(config(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'model'}", verb="export"))
    assert "at 16 x 24 px" in (tmp_path / "model/README.md").read_text()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray(np.repeat(np.uint8([255, 0]), 20)[:, None].repeat(90, 1)).save(tmp_path / "mask.png")
    for region in ("box=[0.2,0.2,0.8,0.6]", f"mask={tmp_path / 'mask.png'}"):
        settings = [f"checkpoint={checkpoint}", f"image={tmp_path / 'photo.png'}", f"out={tmp_path / 'edit'}", region]
        edit.run(config(tmp_path, *settings, verb="edit"))
        told = json.loads((tmp_path / "edit/edit.json").read_text())
        assert told["fitted"] == "center crop of 40 x 60 pixels, resized to 16 x 24"
        assert Image.open(tmp_path / "edit/edit-000.png").size == (24, 16)
    network = "+features._target_=support.features.Corner"
    score(tmp_path, f"samples={tmp_path / 'samples'}", f"reference={digits_folder}", network)
    for scored in (tokenizer, checkpoint):
        score(tmp_path, f"checkpoint={scored}", f"shards={digits_folder}", network)
    protocol = json.loads((tmp_path / "scores/generation.json").read_text())["protocol"]
    assert protocol["resolution"] == [16, 24]
    capsys.readouterr()
    train_command.run(config(tmp_path / "plan", *VAR, *images, "plan=true"))
    assert "31 tokens" in capsys.readouterr().out


def test_a_resolution_in_numbers_is_one_of_the_data(tmp_path, digits_folder):
    answer = command(tmp_path, *TOKENIZER, *SHORT, f"data.path={digits_folder}", "resolution=[16,24]")
    assert "data.resolution=[16, 24], but the tokenizer encodes images of (16, 16) pixels" in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr

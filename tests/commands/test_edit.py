"""`varlab edit`."""

import json

import numpy as np
import pytest
from PIL import Image
from support.runs import config

from varlab.checkpoints.export_folder import save_pretrained
from varlab.commands import edit as verb


@pytest.fixture
def place(tmp_path, tokenizer, var):
    """A model and a photograph of another size than the model's."""
    save_pretrained(tmp_path / "model", tokenizer, var, ["one", "two", "three"], {})
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    return tmp_path


def run(place, *settings):
    files = [f"checkpoint={place / 'model'}", f"image={place / 'image.png'}", f"out={place / 'out'}"]
    verb.run(config(place, *files, "num=2", *settings, verb="edit"))
    return json.loads((place / "out/edit.json").read_text())


def test_an_image_of_any_size_is_edited_and_told_how(place):
    told = run(place, "box=[0.25,0.25,0.75,0.75]", "label=two")
    assert told["fitted"] == "center crop of 40 x 40 pixels, resized to 16 x 16" and told["label"] == 1
    assert told["errors_in_levels"]["result"]["outside"] == 0 < told["errors_in_levels"]["network"]["outside"]
    results = [np.asarray(Image.open(place / f"out/edit-00{i}.png")).astype(int) for i in (0, 1)]
    assert (results[0] != results[1])[4:12, 4:12].any() and (results[0] == results[1])[:4].all()
    sheet = Image.open(place / "out/edit.png")
    assert sheet.width == 4 * 66 - 2 and sheet.height == 64


def test_a_mask_is_white_where_to_edit_and_out_painting_turns_it_round(place):
    mask = np.zeros((40, 56), dtype=np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(place / "mask.png")
    original = run(place, f"mask={place / 'mask.png'}")
    inside = np.asarray(Image.open(place / "out/edit-000.png")).astype(int)
    run(place, f"mask={place / 'mask.png'}", "outpaint=true")
    outside = np.asarray(Image.open(place / "out/edit-000.png")).astype(int)
    assert original["errors_in_levels"]["result"]["outside"] == 0
    assert (inside[:8] != outside[:8]).any() and (inside[8:] != outside[8:]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give either mask=FILE"),
        (["box=[0.5,0,0.2,1]"], r"box=\[0.5, 0, 0.2, 1\]: give y0, x0, y1, x1 between 0 and 1, y0 < y1"),
        (["mask=nowhere.png"], "mask=nowhere.png cannot be used: .*No such file"),
        (["mask={image_of_other_size}"], r"is \(8, 8\) pixels, but the image is \(56, 40\)"),
        (["mask={black}"], "the mask is empty: nothing would be edited"),
        (["box=[0,0,1,1]", "label=twoo"], "no class is called 'twoo': the nearest are 'two'"),
        (["box=[0,0,1,1]", "blend=pixels"], "blend='pixels': choose one of tokens, latents"),
    ],
)
def test_a_wrong_setting_is_named(settings, message, place):
    Image.new("L", (8, 8)).save(place / "small.png")
    Image.new("L", (56, 40)).save(place / "black.png")
    files = {"image_of_other_size": place / "small.png", "black": place / "black.png"}
    with pytest.raises(ValueError, match=message):
        run(place, *(setting.format(**files) for setting in settings))

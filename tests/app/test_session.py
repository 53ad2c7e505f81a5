"""What the page shows, without the page."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from varlab.app.session import Model, indices_picture, read_upload
from varlab.image_grid import to_uint8
from varlab.sampling.generate import generate


@pytest.mark.parametrize("size", [(16, 16), (90, 30), (7, 200)])
def test_uploads_become_the_square_that_the_model_sees(size, tmp_path):
    Image.new("RGB", size, (200, 30, 10)).save(tmp_path / "a.png")
    seen = read_upload(tmp_path / "a.png", 16)
    assert seen.size == (16, 16) and seen.getpixel((8, 8)) == (200, 30, 10)


def test_a_bomb_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (10_000, 6_000)).save(buffer, "png")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="10000 x 6000 pixels, more than 50,000,000: upload a PNG"):
        read_upload(tmp_path / "bomb.png", 16)


def test_the_last_sample_is_the_image_of_generate_and_energy_falls(page_models):
    model = Model(str(page_models / "first"), "cpu")
    frames = [drawn for drawn, _ in model.sample("1", 3, 7, cfg_scale=2.0, top_k=5)]
    assert len(frames) == 4 and all(len(frame) == 3 for frame in frames)
    images = generate(model.var, model.tokenizer, torch.tensor([1, 1, 1]), seed=7, cfg_scale=2.0, top_k=5)
    for shown, pixels in zip(frames[-1], to_uint8(images), strict=True):
        assert np.array_equal(np.asarray(shown), pixels)
    found = model.dissect(frames[-1][0])
    features = model.tokenizer.features(model.tensor(frames[-1][0])).detach()
    partial = model.tokenizer.quantizer.partial_sums(model.tokenizer.encode(model.tensor(frames[-1][0])))
    left = [100 * float((features - f_hat.detach()).square().mean() / features.square().mean()) for f_hat in partial]
    assert [row[3] for row in found.rows] == pytest.approx(left, abs=0.06)


def test_the_same_code_has_the_same_color_and_others_another():
    picture = np.asarray(indices_picture(np.array([[3, 700], [3, 701]])))
    side = len(picture) // 2
    assert (picture[0, 0] == picture[side, 0]).all()
    colors = {tuple(color) for color in np.asarray(indices_picture(np.arange(4096).reshape(64, 64))).reshape(-1, 3)}
    assert len(colors) > 4000


def test_a_class_is_selected_or_typed_by_name_or_number():
    model = Model("glyphs32", "cpu")
    assert [model.label(choice) for choice in ("7: H", "H", "7", "h", "12")] == [7, 7, 59, 33, 12]
    assert model.label("") == model.label(None) == model.var.null_label == 62

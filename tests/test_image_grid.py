"""Grids of images, and the levels of their files."""

import numpy as np
import pytest
import torch

from varlab import image_grid


def test_images_stand_row_by_row_on_white():
    images = torch.stack([torch.full((3, 64, 64), value) for value in (0.0, 0.2, 0.4)])
    sheet = np.asarray(image_grid.grid(images, columns=2))
    assert sheet.shape == (130, 130, 3)
    assert [sheet[0, 0, 0], sheet[0, 66, 0], sheet[66, 0, 0]] == [0, 51, 102]
    assert (sheet[66:, 66:] == 255).all() and (sheet[:, 64:66] == 255).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    assert image_grid.grid(torch.zeros(1, 3, 30, 30), columns=1).size == (90, 90)


def test_columns_show_image_i_of_each_batch_in_row_i():
    a, b = torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1)
    assert image_grid.columns_of(a, b)[:, 0, 0, 0].tolist() == [0, 1, 0, 1]


def test_levels_are_rounded_to_the_nearest_and_read_back(tmp_path):
    images = torch.tensor([0.4, 0.6, 254.4, 300.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4) / 255
    levels = image_grid.to_uint8(images)
    assert levels.shape == (1, 1, 4, 3) and levels[0, 0, :, 0].tolist() == [0, 1, 254, 255]
    image_grid.save(image_grid.Image.fromarray(levels[0]), tmp_path / "image.png")
    assert torch.equal(image_grid.read(tmp_path / "image.png")[0, 0] * 255, torch.tensor([0.0, 1, 254, 255]))


def test_an_npz_holds_the_files_in_order_and_refuses_another_size(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        image_grid.Image.new("RGB", (5, 4), (i, 2 * i, 3 * i)).save(file)
    image_grid.save_npz(files, tmp_path / "all.npz")
    array = np.load(tmp_path / "all.npz")["arr_0"]
    assert array.shape == (3, 4, 5, 3) and array[:, 0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [2, 4, 6]]
    image_grid.Image.new("RGB", (4, 5)).save(files[2])
    with pytest.raises(ValueError, match=r"2.png is 4x5 pixels, but the first image is 5x4"):
        image_grid.save_npz(files, tmp_path / "other.npz")
    assert not (tmp_path / "other.npz").exists()

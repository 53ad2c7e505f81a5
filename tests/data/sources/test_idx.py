"""MNIST as its authors publish it."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from support.fuzz import FUZZ, damaged, is_read_or_refused

from varlab.data.decoding import open_image
from varlab.data.sources.idx import idx_source, read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


def test_images_and_labels_are_read_also_gzipped(mnist):
    source = idx_source(str(mnist), val_share=0.5)
    assert source.class_names == ["0", "1", "2"] and [len(items) for items in source.splits.values()] == [3, 3]
    (mnist / "t10k-images.idx3-ubyte").write_bytes(idx(IMAGES[:2]))
    (mnist / "t10k-labels.idx1-ubyte").write_bytes(idx(LABELS[:2]))
    source = idx_source(str(mnist))
    assert [len(items) for items in source.splits.values()] == [6, 2]
    for item, image, label in zip(source.splits["train"], IMAGES, LABELS, strict=True):
        assert item.label == label
        assert (np.asarray(open_image(item.load()))[..., 0] == image).all()


def test_what_does_not_belong_together_is_named(mnist):
    with pytest.raises(ValueError, match="is not an idx file of bytes in 3 dimensions, or it is truncated"):
        read_idx(mnist / "train-labels-idx1-ubyte", 3)
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:5]))
    with pytest.raises(ValueError, match="holds 6 images, but there are 5 labels"):
        idx_source(str(mnist))
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="holds no train-images-idx3-ubyte and train-labels"):
        idx_source(str(mnist))
    with pytest.raises(ValueError, match="needs path=FOLDER"):
        idx_source(None)


@FUZZ
@given(content=damaged(idx(IMAGES)))
def test_damaged_idx_files(content, mnist):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(content)
    assert is_read_or_refused(lambda: idx_source(str(mnist)), mnist / "train-images-idx3-ubyte.gz")
    (mnist / "train-images-idx3-ubyte.gz").rename(mnist / "plain")
    assert is_read_or_refused(lambda: read_idx(mnist / "plain", 3), mnist / "plain")

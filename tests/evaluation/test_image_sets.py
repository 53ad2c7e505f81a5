"""Sets of images whose features are extracted once."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from support.fuzz import FUZZ, damaged, is_read_or_refused

from varlab.distributed import WorkSplit
from varlab.evaluation.image_sets import ImageSet, extract, load_features, stored_statistics


def test_processes_share_the_images_out(tmp_path):
    images = torch.rand(11, 3, 8, 8)

    class Mean(torch.nn.Module):
        def pooled(self, batch):
            return batch.mean(dim=(2, 3))

    def run(cache, rank, num_ranks):
        return extract(Mean(), 11, lambda indices: images[list(indices)], 2, cache, "x", WorkSplit(rank, num_ranks))

    alone = run(tmp_path / "alone.npz", 0, 1)
    run(tmp_path / "three.npz", 2, 3)
    run(tmp_path / "three.npz", 1, 3)
    together = run(tmp_path / "three.npz", 0, 3)
    np.testing.assert_allclose(alone.pooled, together.pooled)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alone.npz", "three.npz"]


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


NPZ = archive(arr_0=np.zeros((3, 4, 4, 3), dtype=np.uint8), mu=np.zeros(2), sigma=np.eye(2))


@FUZZ
@given(content=damaged(NPZ))
def test_damaged_archives(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    for read in (ImageSet, stored_statistics, load_features):
        assert is_read_or_refused(lambda read=read: read(tmp_path / "a.npz"), tmp_path / "a.npz")


def test_archives_of_something_else_are_named(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, arr_0=np.array([{}]))
    with pytest.raises(ValueError, match="a.npz cannot be read as an archive of arrays: Object arrays"):
        ImageSet(file)
    file.write_bytes(archive(images=np.zeros(3)))
    with pytest.raises(ValueError, match="a.npz holds no images as arr_0"):
        ImageSet(file)
    file.write_bytes(archive(mu=np.zeros(3), sigma=np.eye(2)))
    with pytest.raises(ValueError, match=r"mu \(3,\) and sigma \(2, 2\) do not belong together"):
        stored_statistics(file)

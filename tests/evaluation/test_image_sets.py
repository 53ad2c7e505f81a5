"""Sets of images whose features are extracted once."""

import numpy as np
import torch

from varlab.distributed import WorkSplit
from varlab.evaluation.image_sets import extract


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

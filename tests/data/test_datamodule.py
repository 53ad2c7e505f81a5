"""Batches: the same for any workers and ranks."""

import pytest
from support.shards import make_shards

from varlab.data.images import ImageDataModule


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(digits_folder, num_workers):
    def batches(workers: int) -> list[list[float]]:
        data = ImageDataModule(str(digits_folder), 16, 8, num_workers=workers, resize_ratio=1.25, lanes=4, window=6)
        data.setup()
        return [batch.images.sum(dim=(1, 2, 3)).tolist() for batch in data.train_dataloader()]

    assert batches(num_workers) == batches(0)


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 3), (4, 0), (4, 2), (8, 1)])
@pytest.mark.parametrize(("num_train", "num_val"), [(48, 11), (9, 3)])
def test_every_rank_gets_as_many_batches_and_validation_sees_each_image_once(
    num_train, num_val, num_ranks, num_workers, tmp_path_factory
):
    """Fewer shards than ranks (3 or 1 for 4 and 8), and fewer validation images than ranks x workers."""
    folder = make_shards(tmp_path_factory.mktemp("few"), num_train, num_val)

    def of_rank(rank):
        data = ImageDataModule(str(folder), 16, 8, num_workers=num_workers, resize_ratio=1.0)
        data.ranks = lambda: (rank, num_ranks)
        data.trainer = Alone
        data.setup()
        return list(data.train_dataloader()), list(data.val_dataloader())

    class Alone:
        accumulate_grad_batches = 1

    def real_images(batches):
        return [image.numpy().tobytes() for batch in batches for image in batch.images[batch.weight > 0]]

    train, val = zip(*(of_rank(rank) for rank in range(num_ranks)), strict=True)
    assert {len(batches) for batches in train} == {num_train // 8}
    seen = [image for batches in train for image in real_images(batches)]
    assert len(seen) == len(set(seen)) == num_train // 8 * 8
    assert len({len(batches) for batches in val}) == 1
    counted = [image for batches in val for image in real_images(batches)]
    assert len(counted) == len(set(counted)) == num_val


def test_a_rank_without_images_is_an_error_at_the_start(digits_folder):
    data = ImageDataModule(str(digits_folder), 16, 96, num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match="48 images, fewer than one step of 1 x 96"):
        data.train_dataloader()

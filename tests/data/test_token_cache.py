"""The token cache holds what the tokenizer says, in the smallest type, and knows whom it belongs to."""

import numpy as np
import pytest
import torch

from varlab.checkpoints.load import load_tokenizer
from varlab.data import token_cache as cache
from varlab.data.images import Crop, ImageDataset, to_tensor
from varlab.data.shards import ShardReader
from varlab.data.token_cache import crop_of_view, smallest_type, views_of
from varlab.data.token_datamodule import TokenDataModule
from varlab.distributed import WorkSplit
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer


def test_the_cache_holds_the_tokens_of_each_view(token_cache, digits_folder, tokenizer_run):
    tokenizer = load_tokenizer(tokenizer_run / "checkpoints/last.ckpt")
    images = ImageDataset(ShardReader(digits_folder, "val"), 16, 1.0, random_crop=False, random_flip=False)
    tokens = np.load(token_cache / "val.tokens.npy")
    assert tokens.dtype == np.uint8 and tokens.shape == (11, 2, 30)
    for view, is_flipped in enumerate((False, True)):
        batch = to_tensor([images.image(i, Crop(is_flipped=is_flipped)) for i in range(11)])
        with torch.no_grad():
            assert np.array_equal(torch.cat(tokenizer.encode(batch), dim=1).numpy(), tokens[:, view])
    assert np.array_equal(np.load(token_cache / "val.labels.npy"), images.reader.labels)


def test_random_crops_are_recorded_and_repeatable():
    views = views_of(crops=2, flips=True, seed=7)
    assert [view["seed"] for view in views] == [7, 7, 8, 8]
    assert [view["is_flipped"] for view in views] == [False, True, False, True]
    crops = [crop_of_view(view, 3) for view in views]
    assert crops[0][:2] == crops[1][:2] != crops[2][:2]
    assert crops == [crop_of_view(view, 3) for view in views]


def cache_arguments(digits_folder, tokenizer_run):
    tokenizer = load_tokenizer(tokenizer_run / "checkpoints/last.ckpt")
    return dict(
        shards=str(digits_folder),
        tokenizer=tokenizer,
        resize_ratio=1.0,
        crops=0,
        flips=True,
        seed=0,
        batch_size=4,
        device="cpu",
    )


def test_a_killed_call_continues_with_the_missing_parts(
    token_cache, digits_folder, tokenizer_run, tmp_path, monkeypatch
):
    arguments = cache_arguments(digits_folder, tokenizer_run)
    written = []
    original = cache.write_part

    def write_part(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.removeprefix("parts/"))
        original(file, *rest)

    monkeypatch.setattr(cache, "write_part", write_part)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache(tmp_path, **arguments, part_images=10)
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        TokenDataModule(str(tmp_path), global_batch_size=8).setup()
    written.clear()
    monkeypatch.setattr(
        cache, "write_part", lambda file, *rest: (written.append(file.removeprefix("parts/")), original(file, *rest))
    )
    cache.write_cache(tmp_path, **arguments, part_images=10)
    assert written == [f"train-10-0000{i}.npz" for i in (2, 3, 4)] + ["val-10-00000.npz", "val-10-00001.npz"]
    for name in ("train.tokens.npy", "train.labels.npy", "val.tokens.npy"):
        assert (tmp_path / name).read_bytes() == (token_cache / name).read_bytes()
    assert not (tmp_path / "parts").exists()


def test_processes_share_the_parts_out(token_cache, digits_folder, tokenizer_run, tmp_path):
    arguments = cache_arguments(digits_folder, tokenizer_run)
    second = cache.write_cache(tmp_path, **arguments, part_images=10, work=WorkSplit(1, 2))
    assert second[tmp_path]["splits"] == {}
    parts = sorted(file.name for file in (tmp_path / "parts").glob("*.npz"))
    assert parts == [
        "train-10-00001.npz",
        "train-10-00003.npz",
        "val-10-00001.npz",
    ]
    cache.write_cache(tmp_path, **arguments, part_images=10, work=WorkSplit(0, 2))
    assert (tmp_path / "train.tokens.npy").read_bytes() == (token_cache / "train.tokens.npy").read_bytes()


@pytest.mark.parametrize(
    ("codes", "kind"), [(256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32"), (2**32, "uint32")]
)
def test_the_smallest_type_holds_the_highest_token(codes, kind):
    with torch.device("meta"):
        tokenizer = MSVQVAE(MultiScaleQuantizer([1, 2], codes, 2), channels=8, channel_mult=(1, 1), num_groups=4)
    assert smallest_type(tokenizer) == kind

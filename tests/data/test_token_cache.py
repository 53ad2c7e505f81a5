"""The token cache holds what the tokenizer says, in the smallest type, and knows whom it belongs to."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.runs import config

from varlab.checkpoints.load import load_tokenizer
from varlab.commands import tokenize
from varlab.config import check_types
from varlab.data import token_cache as cache
from varlab.data.images import Crop, ImageDataset, to_tensor
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader
from varlab.data.token_cache import crop_of_view, views_of
from varlab.data.token_datamodule import TokenDataModule, TokenDataset
from varlab.distributed import WorkSplit


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


def test_views_take_turns_over_the_epochs(token_cache):
    data = TokenDataModule(str(token_cache), global_batch_size=4)
    data.setup()
    tokens = np.load(token_cache / "train.tokens.npy")
    rows = [data.train_set.__getitems__([SampleRequest(5, epoch, True)]).sequence[0].numpy() for epoch in range(3)]
    for epoch, row in enumerate(rows):
        assert np.array_equal(row, tokens[5, (5 + epoch) % 2])


def test_validation_sees_the_first_view_only(token_cache):
    data = TokenDataModule(str(token_cache), global_batch_size=4)
    data.setup()
    seen = np.concatenate([batch.sequence[batch.weight > 0].numpy() for batch in data.val_dataloader()])
    assert np.array_equal(seen, np.load(token_cache / "val.tokens.npy")[:, 0])


@pytest.mark.parametrize("keep", ["disk", "device"])
def test_batches_are_the_same_wherever_the_tokens_lie(keep, token_cache):
    class Alone:
        global_rank, world_size, accumulate_grad_batches = 0, 1, 1

        class strategy:
            root_device = torch.device("cpu")

    def batches(keep):
        data = TokenDataModule(str(token_cache), global_batch_size=8, keep=keep)
        data.trainer = Alone
        data.setup()
        return data.train_set, [*data.train_dataloader(), *data.val_dataloader()]

    rows, kept = batches(keep)
    assert isinstance(rows.tokens, torch.Tensor if keep == "device" else np.memmap)
    for a, b in zip(kept, batches("memory")[1], strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("largest", "kind"), [(200, torch.uint8), (4095, torch.int16), (40_000, torch.int32)])
def test_tokens_on_a_device_take_the_smallest_type_that_holds_them(largest, kind):
    tokens = np.array([[[0, largest]]], dtype=np.uint16)
    rows = TokenDataset(tokens, np.zeros(1, dtype=np.int64)).on_device(torch.device("cpu"))
    assert rows.tokens.dtype == kind
    assert rows.__getitems__([SampleRequest(0, 0, True)]).sequence.tolist() == [[0, largest]]


def test_settings_that_exclude_each_other_are_refused(token_cache, tmp_path):
    with pytest.raises(ValueError, match="data.keep='ram': choose one of memory, disk, device"):
        check_types(config(tmp_path, f"data.path={token_cache}", "tokenizer=t.ckpt", "data.keep=ram"))
    with pytest.raises(ValueError, match="data.keep=device needs data.num_workers=0, not 2"):
        TokenDataModule(str(token_cache), 8, num_workers=2, keep="device")


def test_random_crops_are_recorded_and_repeatable():
    views = views_of(crops=2, flips=True, seed=7)
    assert [view["seed"] for view in views] == [7, 7, 8, 8]
    assert [view["is_flipped"] for view in views] == [False, True, False, True]
    crops = [crop_of_view(view, 3) for view in views]
    assert crops[0][:2] == crops[1][:2] != crops[2][:2]
    assert crops == [crop_of_view(view, 3) for view in views]


def settings(folder, digits_folder, tokenizer_run, *more):
    checkpoint = tokenizer_run / "checkpoints/last.ckpt"
    return config(
        folder,
        f"tokenizer={checkpoint}",
        f"shards={digits_folder}",
        f"out={folder}",
        "resize_ratio=1.0",
        *more,
        verb="tokenize",
    )


def test_another_cache_is_not_overwritten_and_the_same_is_kept(token_cache, digits_folder, tokenizer_run, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(token_cache, copy)
    before = (copy / "train.tokens.npy").stat().st_mtime_ns
    tokenize.run(settings(copy, digits_folder, tokenizer_run, "flips=true"))
    assert (copy / "train.tokens.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already holds a token cache with different views"):
        tokenize.run(settings(copy, digits_folder, tokenizer_run, "flips=false"))


def test_a_damaged_cache_is_refused(token_cache, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(token_cache, copy)
    content = (copy / "train.tokens.npy").read_bytes()
    (copy / "train.tokens.npy").write_bytes(content[:500])
    with pytest.raises(ValueError, match="the train tokens cannot be read"):
        TokenDataModule(str(copy), global_batch_size=8).setup()
    (copy / "train.tokens.npy").write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["num_images"] = 12
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="val holds 11 rows and 11 labels"):
        TokenDataModule(str(copy), global_batch_size=8).setup()


def test_shards_are_no_token_cache(digits_folder):
    with pytest.raises(ValueError, match="describes 'shards' of format 2, expected tokens"):
        TokenDataModule(str(digits_folder), global_batch_size=8).setup()


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
        written.append(file.name)
        original(file, *rest)

    monkeypatch.setattr(cache, "write_part", write_part)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache(tmp_path, **arguments, part_images=10)
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        TokenDataModule(str(tmp_path), global_batch_size=8).setup()
    written.clear()
    monkeypatch.setattr(cache, "write_part", lambda file, *rest: (written.append(file.name), original(file, *rest)))
    cache.write_cache(tmp_path, **arguments, part_images=10)
    assert written == [f"train-10-0000{i}.npz" for i in (2, 3, 4)] + ["val-10-00000.npz", "val-10-00001.npz"]
    for name in ("train.tokens.npy", "train.labels.npy", "val.tokens.npy"):
        assert (tmp_path / name).read_bytes() == (token_cache / name).read_bytes()
    assert not (tmp_path / "parts").exists()


def test_processes_share_the_parts_out(token_cache, digits_folder, tokenizer_run, tmp_path):
    arguments = cache_arguments(digits_folder, tokenizer_run)
    second = cache.write_cache(tmp_path, **arguments, part_images=10, work=WorkSplit(1, 2))
    assert second["splits"] == {}
    parts = sorted(file.name for file in (tmp_path / "parts").glob("*.npz"))
    assert parts == [
        "train-10-00001.npz",
        "train-10-00003.npz",
        "val-10-00001.npz",
    ]
    cache.write_cache(tmp_path, **arguments, part_images=10, work=WorkSplit(0, 2))
    assert (tmp_path / "train.tokens.npy").read_bytes() == (token_cache / "train.tokens.npy").read_bytes()

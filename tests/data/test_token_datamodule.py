"""Batches of cached tokens."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.runs import config

from varlab.config import check_types
from varlab.data.order import SampleRequest
from varlab.data.token_datamodule import TokenDataModule, TokenDataset


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
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize(("largest", "kind"), [(200, torch.uint8), (4095, torch.int16), (40_000, torch.int32)])
def test_tokens_on_a_device_take_the_smallest_type_that_holds_them(largest, kind):
    tokens = np.array([[[0, largest]]], dtype=np.uint16)
    rows = TokenDataset(tokens, np.zeros(1, dtype=np.int64)).on_device(torch.device("cpu"))
    assert rows.tokens.dtype == kind
    assert rows.__getitems__([SampleRequest(0, 0, True)]).sequence.tolist() == [[0, largest]]


def test_settings_that_exclude_each_other_are_refused(token_cache, tmp_path):
    with pytest.raises(ValueError, match="data.keep='ram': choose one of disk, memory, device"):
        check_types(config(tmp_path, f"data.path={token_cache}", "tokenizer=t.ckpt", "data.keep=ram"))
    with pytest.raises(ValueError, match="data.keep=device needs data.num_workers=0, not 2"):
        TokenDataModule(str(token_cache), 8, num_workers=2, keep="device")


def test_a_damaged_cache_is_refused(token_cache, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(token_cache, copy)
    content = (copy / "train.tokens.npy").read_bytes()
    (copy / "train.tokens.npy").write_bytes(content[:500])
    with pytest.raises(ValueError, match="train.tokens.npy cannot be read as an array"):
        TokenDataModule(str(copy), global_batch_size=8).setup()
    (copy / "train.tokens.npy").write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["num_images"] = 12
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"val.tokens.npy holds an array \(11, 2, 30\) of uint8, expected \(12, 2, 30\)"
    ):
        TokenDataModule(str(copy), global_batch_size=8).setup()


def test_shards_are_no_token_cache(digits_folder):
    with pytest.raises(ValueError, match="kind is 'shards', expected 'tokens'"):
        TokenDataModule(str(digits_folder), global_batch_size=8).setup()

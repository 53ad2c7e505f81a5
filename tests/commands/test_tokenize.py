"""`varlab tokenize`."""

import shutil

import pytest
from support.runs import (
    config,
    fit,
    images_overrides,
)

from varlab.commands import tokenize


def test_a_token_cache_of_another_tokenizer_is_refused(tmp_path, digits_folder, var_overrides):
    fit(tmp_path / "other", *images_overrides(digits_folder), "seed=1")
    with pytest.raises(ValueError, match=r"was made by tokenizer \w+, but this one is \w+: run `varlab tokenize`"):
        fit(tmp_path / "var", *var_overrides, f"tokenizer={tmp_path / 'other/checkpoints/last.ckpt'}")
    fit(tmp_path / "coarse", *images_overrides(digits_folder), "patch_nums=[1,2,4]")
    with pytest.raises(ValueError, match=r"patch_nums \[1, 2, 3, 4\], but the tokenizer has \[1, 2, 4\]"):
        fit(tmp_path / "var", *var_overrides, f"tokenizer={tmp_path / 'coarse/checkpoints/last.ckpt'}")


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

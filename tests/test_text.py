"""Captions, from files beside images to pictures of words."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from support.runs import SHORT, VAR, command, config, fit, kill_at, log_to, logged_losses, weights
from support.shards import digits
from torch.utils.flop_counter import FlopCounterMode

from varlab.app.session import Model
from varlab.commands import audit, edit, evaluate, export, pack, sample, tokenize
from varlab.commands import train as train_command
from varlab.cost.flops import training_flops
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader, verify
from varlab.data.sources.folder import folder_source
from varlab.data.token_datamodule import TokenDataModule
from varlab.models.text_encoder import TextEncoder
from varlab.pipeline import VARPipeline

LAST = "checkpoints/last.ckpt"
NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEXT = ["embedder@model.embedder=text", "data.condition=text"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Packed digits with one to three captions each; every eleventh image has none."""
    folder = tmp_path_factory.mktemp("captioned")
    for split, items in digits().splits.items():
        for i, item in enumerate(items):
            file = folder / f"images/{split}/{item.label}/{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(item.load())
            lines = [f"number {NUMERALS[item.label]}", f"{item.label}", "handwritten"][: 1 + i % 3]
            if i % 11 < 10:
                file.with_suffix(".txt").write_text("\n".join(lines) + "\n\n")
    pack.run(config(folder, f"path={folder / 'images'}", f"out={folder / 'shards'}", "num_workers=1", verb="pack"))
    return folder / "shards"


@pytest.fixture(scope="module", params=[0, 4], ids=["vectors", "prefix"])
def tokens(tmp_path_factory, captioned, tokenizer_run, request):
    """A token cache with vectors of captions, or also of four tokens of each."""
    out = tmp_path_factory.mktemp("text") / "tokens"
    settings = [f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}", f"shards={captioned}", f"out={out}"]
    settings += ["resize_ratio=1.0", "flips=true", "text=minilm", "max_captions=2", f"text_tokens={request.param}"]
    tokenize.run(config(out, *settings, verb="tokenize"))
    return out


@pytest.fixture(scope="module")
def settings(tokens, tokenizer_run):
    return [*VAR, *SHORT, *TEXT, f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}", f"data.path={tokens}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, *settings, *log_to(folder / "losses"))
    return folder


def test_shards_hold_the_captions_of_each_image(captioned):
    reader = ShardReader(captioned, "train")
    captions = reader.captions()
    assert len(captions) == len(reader) and {len(texts) for texts in captions} == {0, 1, 2, 3}
    for label, texts in zip(reader.labels, captions, strict=True):
        assert texts == [f"number {NUMERALS[label]}", str(label), "handwritten"][: len(texts)]
    assert verify(captioned) == 59
    notes = json.loads((captioned / "manifest.json").read_text())["notes"]
    assert any("images with captions, in text files of their names: 5" in note for note in notes)
    assert not any(".txt" in note for note in notes)
    images = captioned.parent / "images"
    (words := next(images.glob("train/*/*.txt"))).write_text("changed")
    with pytest.raises(ValueError, match="holds shards packed with different captions"):
        pack.run(config(captioned, f"path={images}", f"out={captioned}", "num_workers=1", verb="pack"))
    words.write_text("\xff", encoding="latin-1")
    with pytest.raises(ValueError, match=f"{words} is not UTF-8 text"):
        folder_source(images)
    (captioned / "val.captions.json").rename(captioned / "kept.json")
    with pytest.raises(ValueError, match=r"val.captions.json is missing"):
        verify(captioned)
    (captioned / "kept.json").rename(captioned / "val.captions.json")


def test_the_cache_holds_a_vector_of_each_caption_and_zeros_where_there_is_none(captioned, tokens):
    vectors, captions = np.load(tokens / "train.text.npy"), ShardReader(captioned, "train").captions()
    text = json.loads((tokens / "manifest.json").read_text())["text"]
    rows = (5,) if text["tokens"] else ()
    assert vectors.dtype == np.float16 and vectors.shape == (48, 2, *rows, 384)
    encoder = TextEncoder("minilm", tokens=text["tokens"])
    for rows, texts in zip(vectors, captions, strict=True):
        expected = encoder([(texts or [""])[0], (texts or [""])[min(1, max(len(texts), 1) - 1)]]).numpy()
        np.testing.assert_allclose(rows, expected, atol=1e-3)
    assert text.pop("data") and text.pop("tokens") in (0, 4)
    assert text == {"encoder": "minilm", "fingerprint": encoder.fingerprint, "captions": 2}


def test_each_caption_meets_each_view_and_validation_sees_the_first(tokens):
    data = TokenDataModule(str(tokens), 8, condition="text")
    data.setup()
    vectors = np.load(tokens / "train.text.npy")
    i = next(i for i, rows in enumerate(vectors) if not (rows[0] == rows[1]).all())
    met = set()
    for epoch in range(4):
        batch = data.train_set.__getitems__([SampleRequest(i, epoch, True)])
        caption = [(batch.condition[0].numpy() == row).all() for row in vectors[i].astype(np.float32)].index(True)
        view = [(batch.sequence[0].numpy() == row).all() for row in data.train_set.tokens[i]].index(True)
        met.add((caption, view))
    assert met == {(0, 0), (0, 1), (1, 0), (1, 1)}
    on_device = data.train_set.on_device(torch.device("cpu")).__getitems__([SampleRequest(i, 1, True)])
    assert torch.equal(on_device.condition, data.train_set.__getitems__([SampleRequest(i, 1, True)]).condition)
    first = data.val_set.__getitems__([SampleRequest(0, 3, True)]).condition
    np.testing.assert_array_equal(first[0].numpy(), np.load(tokens / "val.text.npy")[0, 0].astype(np.float32))


def test_a_killed_run_continues_bit_by_bit(settings, trained, tmp_path):
    command(tmp_path / "run", *settings, "ckpt_path=last", *log_to(tmp_path / "losses"), *kill_at(5))
    fit(tmp_path / "run", *settings, "ckpt_path=last", *log_to(tmp_path / "losses"))
    assert logged_losses(tmp_path / "losses") == logged_losses(trained / "losses")
    again, whole = weights(tmp_path / "run"), weights(trained)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_words_become_pictures_by_command_pipeline_page_and_edit(trained, tmp_path):
    checkpoint = trained / "checkpoints/last.ckpt"
    out, model = tmp_path / "samples", tmp_path / "model"
    given = [f"checkpoint={checkpoint}", f"out={out}", "num=3", "text=['number three','number five']", "seed=4"]
    sample.run(config(out, *given, verb="sample"))
    told = json.loads((out / "samples.json").read_text())
    assert told["labels"] == ["number three", "number five", "number three"]
    export.run(config(tmp_path, f"checkpoint={checkpoint}", f"out={model}", verb="export"))
    pipeline = VARPipeline.from_pretrained(model)
    drawn = pipeline(text=["number three", "number five", "number three"], seed=4, cfg_scale=1.5)
    files = sorted((out / "images").glob("*.png"))
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    for file, image in zip(files, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
    page = Model(str(model), "cpu")
    assert page.takes_text
    *_, (frame, _) = page.sample("number three", 1, 4, cfg_scale=1.5)
    np.testing.assert_array_equal(np.asarray(frame[0]), np.asarray(drawn[0]))
    assert not page.condition(None, 2).any()
    with pytest.raises(ValueError, match="this text has 1,001 characters: give at most 1,000"):
        page.condition("a" * 1001, 1)
    assert 'text=["a red heart", "a cat"]' in (model / "README.md").read_text()
    assert "conditioned on text, by the encoder minilm" in (model / "README.md").read_text()
    for other in ("classes=[1]", "condition=x.npy"):
        with pytest.raises(
            ValueError, match=r"classes=\[1\] and text=|text=\[.*\] and condition=x.npy: give one of them"
        ):
            sample.run(config(out, *given, other, verb="sample"))
    changed = [
        f"checkpoint={model}",
        f"image={files[0]}",
        "box=[0.2,0.2,0.9,0.9]",
        "num=1",
        "cfg_scale=300",
        "text='number nine'",
    ]
    edit.run(config(tmp_path, *changed, f"out={tmp_path / 'edit'}", verb="edit"))
    assert json.loads((tmp_path / "edit/edit.json").read_text())["text"] == "number nine"
    changed[-1] = "text=''"
    edit.run(config(tmp_path, *changed, f"out={tmp_path / 'none'}", verb="edit"))
    assert (tmp_path / "none/edit-000.png").read_bytes() != (tmp_path / "edit/edit-000.png").read_bytes()
    with pytest.raises(ValueError, match="takes no class label: give text='...', vectors of shape"):
        sample.run(config(out, *given[:3], verb="sample"))
    with pytest.raises(ValueError, match="label=3: this network takes no class label"):
        edit.run(config(tmp_path, *changed[:-1], "label=3", f"out={tmp_path / 'x'}", verb="edit"))


def test_likelihood_and_retrieval_are_scored(trained, tokens, captioned, tmp_path):
    given = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", f"out={tmp_path}", "retrieval=4"]
    evaluate.run(config(tmp_path, *given, f"shards={tokens}", verb="evaluate"))
    found = json.loads((tmp_path / "likelihood.json").read_text())
    assert found["retrieval_candidates"] == 4 and found["retrieval_images"] >= 8 and 0 <= found["retrieval"] <= 100
    with pytest.raises(
        ValueError, match="holds captions, and the network takes vectors of them: `varlab tokenize text"
    ):
        evaluate.run(config(tmp_path, *given, f"shards={captioned}", verb="evaluate"))


def test_captions_of_another_encoder_are_refused(trained, tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "other")
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["text"]["fingerprint"] = "0"
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest))
    given = [f"checkpoint={trained / LAST}", f"shards={tmp_path / 'other'}"]
    for verb, run in (("evaluate", evaluate.run), ("audit", audit.run)):
        with pytest.raises(ValueError, match=r"vectors of minilm \(0\), but the network takes those of minilm"):
            run(config(tmp_path, *given, f"out={tmp_path / verb}", verb=verb))
    audit.run(config(tmp_path, given[0], f"shards={tokens}", f"out={tmp_path / 'audit'}", verb="audit"))
    membership = json.loads((tmp_path / "audit/audit.json").read_text())["membership"]
    assert all(0 <= scores["auc"] <= 1 for scores in membership.values())


def test_a_plan_counts_a_network_of_texts(settings, tmp_path, capsys):
    train_command.run(config(tmp_path, *settings, "plan=true"))
    assert "30 tokens" in capsys.readouterr().out


def test_parameters_and_flops_are_counted(trained):
    told, network = json.loads((trained / "run.json").read_text()), VARPipeline.from_pretrained(trained / LAST).var
    assert told["params_total"] == sum(parameter.numel() for parameter in network.parameters())
    condition = torch.zeros(1, *network.embedder.condition_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(torch.zeros(1, 29, network.codebook_dim, device="meta"), condition)
    pairs = {0: 1 + 4 * 5 + 9 * 14 + 16 * 30, 4: 4 * 4 + 1 * 5 + 4 * 9 + 9 * 18 + 16 * 34}[network.num_prefix]
    masked = 4 * 32 * 2 * ((30 + network.num_prefix) ** 2 - pairs)  # the counter knows no mask
    embedder = 2 * 384 * 32 * (1 + network.num_prefix)  # is not counted: below a thousandth in networks of real size
    assert training_flops(network.sizes) == 3 * (counter.get_total_flops() - masked - embedder)


def test_a_network_of_classes_becomes_one_of_texts(settings, var_overrides, tmp_path):
    fit(tmp_path / "classes", *var_overrides)
    start = [f"module.init_from={tmp_path / 'classes/checkpoints/last.ckpt'}", "module.base_lr=0.0"]
    fit(tmp_path / "texts", *settings, *start, "module.reinitialized=[embedder.*]")
    before, after = weights(tmp_path / "classes"), weights(tmp_path / "texts")
    taken = [name for name in before if name.startswith("net.") and not name.startswith("net.embedder")]
    assert taken and all(torch.equal(before[name], after[name]) for name in taken)
    assert after["net.embedder.linear.weight"].shape == (32, 384)
    with pytest.raises(
        ValueError, match=r"has a ClassEmbedder, but this run a TextEmbedder: .*reinitialized=\[embedder"
    ):
        fit(tmp_path / "refused", *settings, *start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["+model.embedder.dim=7"], r"gives conditions of shape \(.*384,?\), but TextEmbedder takes \(.*7,?\)"),
        (["data.condition=label"], "model.embedder=text takes texts: set data.condition=text"),
        (
            ["embedder@model.embedder=label"],
            r"data.condition=text gives conditions of shape \(.*384,?\), but ClassEmb",
        ),
        (["data.path=PLAIN"], "holds no vectors of captions: make it with `varlab tokenize text=minilm`"),
    ],
)
def test_what_does_not_fit_is_named(change, message, settings, token_cache, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *settings, *[setting.replace("PLAIN", str(token_cache)) for setting in change])


def test_a_set_without_captions_or_with_another_encoder_is_refused(
    digits_folder, captioned, tokens, tokenizer_run, tmp_path
):
    plain = [f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}", "resize_ratio=1.0", "text=minilm"]
    with pytest.raises(ValueError, match="has no captions: its shards hold no .txt files"):
        tokenize.run(config(tmp_path, *plain, f"shards={digits_folder}", f"out={tmp_path / 'a'}", verb="tokenize"))
    with pytest.raises(ValueError, match="already holds a token cache with different .*text"):
        tokenize.run(
            config(tmp_path, *plain[:2], f"shards={captioned}", f"out={tokens}", "flips=true", verb="tokenize")
        )


def test_tables_and_foreign_shards_bring_captions(tmp_path, captioned):
    item = digits(4, 4).splits["train"][0]
    (tmp_path / "a.png").write_bytes(item.load())
    lines = [
        "image,label,words",
        *(f"a.png,{i % 2},{text}" for i, text in enumerate(["one", '"two, half\n2"', "", "x"])),
    ]
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    given = ["source=csv", f"train={tmp_path / 'table.csv'}", f"val={tmp_path / 'table.csv'}", "num_workers=1"]
    pack.run(config(tmp_path, *given, "caption_column=words", f"out={tmp_path / 'csv'}", verb="pack"))
    assert sorted(ShardReader(tmp_path / "csv", "val").captions()) == [[], ["one"], ["two, half", "2"], ["x"]]
    rows = [{"image": item.load(), "label": 0, "words": words} for words in (["a", "b"], None, [])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    given = ["source=parquet", f"train={tmp_path / 'train-0.parquet'}", f"val={tmp_path / 'train-0.parquet'}"]
    settings = [*given, "num_workers=1", f"out={tmp_path / 'parquet'}"]
    pack.run(config(tmp_path, *settings, "caption_column=words", verb="pack"))
    assert sorted(ShardReader(tmp_path / "parquet", "train").captions()) == [[], [], ["a", "b"]]
    with pytest.raises(ValueError, match=r"row 0: expected captions \(a text or a list of texts\), found 0"):
        pack.run(config(tmp_path, *settings[:-1], "caption_column=label", f"out={tmp_path / 'b'}", verb="pack"))
    given = ["source=shards", f"train={captioned}/train-*.tar", f"val={captioned}/val-*.tar", "num_workers=1"]
    pack.run(config(tmp_path, *given, f"out={tmp_path / 'theirs'}", verb="pack"))
    theirs = ShardReader(tmp_path / "theirs", "train")
    assert theirs.captions() == ShardReader(captioned, "train").captions() and theirs.labels.max() == 9
    pack.run(config(tmp_path, *given, "caption_member=null", f"out={tmp_path / 'without'}", verb="pack"))
    assert not any(ShardReader(tmp_path / "without", "train").captions())
    with tarfile.open(tmp_path / "json.tar", "w") as tar:
        for i, field in enumerate(
            ['"words": "a dog"', '"words": ["b", "c\\nd"]', '"words": 3', '"words": null', '"x": 1']
        ):
            content = {"png": item.load(), "cls": b"0", "json": f"{{{field}}}".encode()}
            for extension, data in content.items():
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    given = ["source=shards", f"train={tmp_path / 'json.tar'}", f"val={tmp_path / 'json.tar'}", "max_skipped_share=1.0"]
    pack.run(config(tmp_path, *given, "caption_member=json:words", f"out={tmp_path / 'json'}", verb="pack"))
    assert ShardReader(tmp_path / "json", "val").captions() == [["a dog"], ["b", "c", "d"], [], []]
    with pytest.raises(ValueError, match="no text .caption_member=null packs the images without captions"):
        pack.run(config(tmp_path, *given[:-1], "caption_member=json:words", f"out={tmp_path / 'strict'}", verb="pack"))

"""Images of several shapes in one run, from shards to scores."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import SHORT, VAR, command, config, draw, fit, kill_at, log_to, logged_losses, score
from support.shards import digits

from varlab import VARPipeline
from varlab.app.session import Model
from varlab.checkpoints.load import load, load_tokenizer
from varlab.commands import edit, export, tokenize
from varlab.cost.flops import training_flops
from varlab.data import token_cache as cache
from varlab.data.decoding import open_image
from varlab.data.manifests import cache_folders
from varlab.data.shards import ShardReader
from varlab.data.sources.items import Item
from varlab.data.token_datamodule import TokenDataModule
from varlab.data.write_shards import Source, pack
from varlab.models import scales

SHAPES = "shapes=[[16,24],[24,16],[16,64]]"  # no image is near to the last one
WIDE, TALL = [1, [2, 3], [3, 4], [4, 6]], [1, [3, 2], [4, 3], [6, 4]]


def stretched(items: list[Item]) -> list[Item]:
    """Every third image is wide, the others are tall."""
    found = []
    for i, item in enumerate(items):
        stream = io.BytesIO()
        image = Image.open(io.BytesIO(item.load()))
        image.resize((50, 32) if i % 3 == 0 else (30, 44)).save(stream, "png")
        found.append(Item(item.label, "png", stream.getvalue()))
    return found


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("mixed"), digits()
    splits = {split: stretched(items) for split, items in source.splits.items()}
    pack(Source("mixed", "digits", source.class_names, splits), folder, shard_images=20, seed=0)
    return folder


@pytest.fixture(scope="module")
def shapes_cache(tmp_path_factory, mixed_shards, tokenizer_run):
    folder = tmp_path_factory.mktemp("shapes")
    made = [f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}", f"shards={mixed_shards}", f"out={folder}"]
    tokenize.run(config(folder, *made, SHAPES, "resize_ratio=1.0", "flips=true", "part_images=10", verb="tokenize"))
    return folder


@pytest.fixture(scope="module")
def settings(shapes_cache, tokenizer_run):
    tokenizer = f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}"
    return [*VAR, *SHORT, f"data.path={shapes_cache}", tokenizer, "model.position=coordinates"]


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("shapes_run")
    fit(folder, *settings, *log_to(folder / "losses"))
    return folder


def test_each_image_is_in_the_cache_of_its_shape(shapes_cache, mixed_shards, tokenizer_run, capsys):
    assert [folder.name for folder in cache_folders(shapes_cache)] == ["24x16", "16x24"]  # the most frequent first
    assert {file.name for file in shapes_cache.iterdir()} == {"24x16", "16x24", "manifest.json"}
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in cache_folders(shapes_cache)]
    assert [manifest["patch_nums"] for manifest in manifests] == [TALL, WIDE]
    assert [manifest["splits"]["train"]["num_images"] for manifest in manifests] == [32, 16]
    assert sum(manifest["splits"]["val"]["num_images"] for manifest in manifests) == 11
    reader = ShardReader(str(mixed_shards), "train")
    is_tall = np.array([image.height > image.width for image in (open_image(reader.read(i), str) for i in range(48))])
    for folder, own in zip(cache_folders(shapes_cache), (is_tall, ~is_tall), strict=True):
        assert np.array_equal(np.load(folder / "train.labels.npy"), np.asarray(reader.labels)[own])
    files = [f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}", f"shards={mixed_shards}", f"out={shapes_cache}"]
    files += ["resize_ratio=1.0", "flips=true"]
    before = (shapes_cache / "24x16/train.tokens.npy").stat().st_mtime_ns
    tokenize.run(config(shapes_cache, *files, SHAPES, "part_images=10", verb="tokenize"))
    assert "32 train, " in capsys.readouterr().out
    assert (shapes_cache / "24x16/train.tokens.npy").stat().st_mtime_ns == before
    for wrong in ("shapes=[[16,24],[24,16]]", "shapes=[[32,32]]", "shapes=[]"):
        with pytest.raises(ValueError, match="already holds"):
            tokenize.run(config(shapes_cache, *files, wrong, verb="tokenize"))
    with pytest.raises(ValueError, match="already holds a token cache with different .*shapes"):
        inner = [f"out={shapes_cache / '24x16'}" if o.startswith("out") else o for o in files]
        tokenize.run(config(shapes_cache, *inner, verb="tokenize"))
    with pytest.raises(ValueError, match="images of 18 x 24 pixels: this tokenizer needs multiples of 4"):
        tokenize.run(config(shapes_cache, *files, "shapes=[[18,24]]", verb="tokenize"))


def test_a_killed_call_continues_and_the_tokens_are_those_of_the_images(
    shapes_cache, mixed_shards, tokenizer_run, tmp_path, monkeypatch
):
    files = [
        f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}",
        f"shards={mixed_shards}",
        f"out={tmp_path / 'again'}",
    ]
    files += [SHAPES, "resize_ratio=1.0", "flips=true", "part_images=10"]
    written, original = [], cache.write_part

    def write_part(name, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        original(name, *rest)

    monkeypatch.setattr(cache, "write_part", write_part)
    with pytest.raises(KeyboardInterrupt):
        tokenize.run(config(tmp_path, *files, verb="tokenize"))
    monkeypatch.undo()
    (tmp_path / "again/16x64/precious.txt").write_text("not of this command")
    with pytest.raises(ValueError, match="different shapes"):
        tokenize.run(config(tmp_path, *files[:-4], "shapes=[[16,24]]", *files[-3:], verb="tokenize"))
    assert not (tmp_path / "again/manifest.json").exists()
    tokenize.run(config(tmp_path, *files, verb="tokenize"))
    assert [file.name for file in (tmp_path / "again/16x64").iterdir()] == ["precious.txt"]
    for folder in cache_folders(tmp_path / "again"):
        for name in ("train.tokens.npy", "val.tokens.npy", "val.labels.npy"):
            assert (folder / name).read_bytes() == (shapes_cache / folder.name / name).read_bytes()
    tokenizer = load_tokenizer(tokenizer_run / "checkpoints/last.ckpt")
    data = TokenDataModule(str(shapes_cache), global_batch_size=4)
    data.setup()
    for pyramid, part in zip(data.pyramids, data.val_parts, strict=True):
        maps = list(torch.from_numpy(np.array(part.tokens[:, 0], dtype=np.int64)).split(scales.lengths(pyramid), dim=1))
        again = tokenizer.at(pyramid).decode(maps)
        assert again.shape[2:] == tuple(4 * side for side in scales.sides(pyramid)[-1])


def test_a_batch_has_one_shape_and_costs_what_its_tokens_cost(shapes_run, settings, shapes_cache):
    row = json.loads((shapes_run / "run.json").read_text())
    tokenizer, var, _ = load(shapes_run / "checkpoints/last.ckpt")
    assert var.pyramids == row["pyramids"] == [TALL, WIDE]
    assert var.patch_nums == tokenizer.patch_nums == row["patch_nums"] == TALL
    assert row["images_seen"] == 72 and row["unique_images"] == 48 and row["val_images"] == 11
    lengths = [scales.num_tokens(pyramid) for pyramid in (TALL, WIDE)]
    assert lengths[0] == lengths[1] == 43 and row["tokens_seen"] == 72 * 43
    assert row["flops_exact"] == 72 * training_flops(var.sizes)


def test_shapes_of_other_lengths_cost_what_they_cost(tmp_path, mixed_shards, tokenizer_run, settings):
    made = [
        f"tokenizer={tokenizer_run / 'checkpoints/last.ckpt'}",
        f"shards={mixed_shards}",
        f"out={tmp_path / 'tokens'}",
    ]
    tokenize.run(config(tmp_path, *made, "shapes=[[16,24],[28,20]]", "resize_ratio=1.0", verb="tokenize"))
    changed = [f"data.path={tmp_path / 'tokens'}" if o.startswith("data.path") else o for o in settings]
    fit(tmp_path / "run", *changed)
    row = json.loads((tmp_path / "run/run.json").read_text())
    data = TokenDataModule(str(tmp_path / "tokens"), global_batch_size=8)
    data.setup()
    loader = data.train_dataloader()
    batches = [*loader, *loader][:9]
    pyramids = [data.pyramids[batch.shape] for batch in batches]
    assert row["tokens_seen"] == sum(8 * batch.sequence.shape[1] for batch in batches)
    sizes = load(tmp_path / "run/checkpoints/last.ckpt")[1].sizes
    assert row["flops_exact"] == sum(8 * training_flops({**sizes, "patch_nums": pyramid}) for pyramid in pyramids)


def test_a_killed_run_of_several_shapes_resumes_to_the_same_losses(tmp_path, shapes_run, settings):
    log = log_to(tmp_path / "losses")
    killed = command(tmp_path / "run", *settings, *log, *kill_at(5), "ckpt_path=last")
    assert killed.returncode == -9
    fit(tmp_path / "run", *settings, *log, "ckpt_path=last")
    assert logged_losses(tmp_path / "losses") == logged_losses(shapes_run / "losses")
    rows = [json.loads((folder / "run.json").read_text()) for folder in (shapes_run, tmp_path / "run")]
    assert rows[0]["val_loss"] == rows[1]["val_loss"] and rows[0]["flops_exact"] == rows[1]["flops_exact"]


@pytest.mark.slow
def test_two_processes_get_the_same_losses(tmp_path, shapes_run, settings):
    still = [*settings, "model.drop_path=0.0", "model.label_dropout=0.0"]
    fit(tmp_path / "one", *still)
    answer = command(tmp_path / "two", *still, "trainer.devices=2", "trainer.strategy=ddp", processes=2)
    assert answer.returncode == 0, answer.stderr
    losses = [json.loads((tmp_path / name / "run.json").read_text())["val_loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_scores_are_those_of_each_shape_and_their_mean_over_images(tmp_path, shapes_run, shapes_cache):
    checkpoint = shapes_run / "checkpoints/last.ckpt"
    score(tmp_path, f"checkpoint={checkpoint}", f"shards={shapes_cache}")
    found = json.loads((tmp_path / "scores/likelihood.json").read_text())
    row = json.loads((shapes_run / "run.json").read_text())
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-5) and found["num_images"] == 11
    assert set(found["by_shape"]) == {"24x16", "16x24"}
    alone = json.loads((tmp_path / "scores/16x24/likelihood.json").read_text())
    assert alone["loss"] == found["by_shape"]["16x24"]["loss"] != found["by_shape"]["24x16"]["loss"]


def test_a_shape_without_validation_images_is_trained_and_left_out_of_scores(tmp_path, shapes_run, shapes_cache):
    shutil.copytree(shapes_cache, tmp_path / "few")
    file = tmp_path / "few/16x24/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["val"]["num_images"] = 0
    file.write_text(json.dumps(manifest))
    for name in ("tokens", "labels"):
        array = np.load(tmp_path / f"few/16x24/val.{name}.npy")
        np.save(tmp_path / f"few/16x24/val.{name}.npy", array[:0])
    data = TokenDataModule(str(tmp_path / "few"), global_batch_size=8, keep="memory")
    data.setup()
    assert {batch.shape for batch in data.train_dataloader()} == {0, 1}
    assert {batch.shape for batch in data.val_dataloader()} == {0}
    assert len(data.marginal_entropies()) == 4
    score(tmp_path, f"checkpoint={shapes_run / 'checkpoints/last.ckpt'}", f"shards={tmp_path / 'few'}")
    found = json.loads((tmp_path / "scores/likelihood.json").read_text())
    assert list(found["by_shape"]) == ["24x16"] and found["num_images"] == data.num_val


def test_an_objective_counts_the_tokens_of_its_shape(tmp_path, shapes_cache, settings):
    own = [f"data.path={shapes_cache / '16x24'}" if o.startswith("data.path") else o for o in settings]
    objective = "module.objective={_target_: varlab.training.tuning.ConditionContrast}"
    fit(tmp_path, *own, objective, "model.label_dropout=0.0", "model.drop_path=0.0", "steps=2", "val_every=2")
    assert json.loads((tmp_path / "run.json").read_text())["tokens_seen"] == 2 * 8 * 43


def test_a_plan_knows_the_tokens_of_the_shapes(tmp_path, settings, capsys):
    fit(tmp_path, *settings, "plan=true")
    assert "43 tokens" in capsys.readouterr().out


def test_a_cache_of_one_shape_is_a_cache(tmp_path, shapes_cache, settings):
    """With learned positions, too: the network is made for the shape."""
    alone = [f"data.path={shapes_cache / '16x24'}" if o.startswith("data.path") else o for o in settings]
    fit(tmp_path / "wide", *[o for o in alone if not o.startswith("model.position")])
    tokenizer, var, _ = load(tmp_path / "wide/checkpoints/last.ckpt")
    assert var.patch_nums == tokenizer.patch_nums == WIDE and var.pyramids is None
    assert {image.shape for image in draw(tmp_path / "wide/checkpoints/last.ckpt", tmp_path / "samples").values()} == {
        (16, 24, 3)
    }


def test_samples_of_any_shape(tmp_path, shapes_run, shapes_cache):
    checkpoint = shapes_run / "checkpoints/last.ckpt"
    export.run(config(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'model'}", verb="export"))
    for given, size in (("null", (24, 16)), ("[16,24]", (16, 24)), ("20", (20, 20)), ("[32,48]", (32, 48))):
        images = draw(tmp_path / "model", tmp_path / f"{size[0]}x{size[1]}", f"image_size={given}")
        assert {image.shape[:2] for image in images.values()} == {size}
    assert json.loads((tmp_path / "16x24/samples.json").read_text())["resolution"] == [16, 24]
    with pytest.raises(ValueError, match="images of 16 x 25 pixels: this tokenizer needs multiples of 4"):
        draw(tmp_path / "model", tmp_path / "wrong", "image_size=[16,25]")
    with pytest.raises(ValueError, match="made with other settings"):
        draw(tmp_path / "model", tmp_path / "20x20", "image_size=[16,24]")
    page = Model(str(tmp_path / "model"), "cpu", image_size=[16, 24])
    assert page.size == (16, 24) and page.scales == ["1x1", "2x3", "3x4", "4x6"]
    assert [image.size for image in list(page.sample("1", 2, 0))[-1][0]] == [(24, 16)] * 2
    pipeline = VARPipeline.from_pretrained(tmp_path / "model")
    assert [image.size for image in pipeline([0, 1], image_size=(16, 24))] == [(24, 16)] * 2
    assert pipeline([0])[0].size == (16, 24)
    kept = pipeline.of_sizes[16, 24]
    pipeline([0], image_size=[16, 24])
    assert pipeline.of_sizes[16, 24] is kept and not pipeline.to("cpu").of_sizes
    made = draw(tmp_path / "model", tmp_path / "likewise", "classes=data", f"shards={shapes_cache}")
    assert len(made) == 7


def test_a_photo_is_edited_at_its_own_aspect(tmp_path, shapes_run):
    rng = np.random.default_rng(0)
    for name, size, edited in (("wide", (60, 90), (16, 24)), ("tall", (90, 60), (24, 16))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        made = [f"checkpoint={shapes_run / 'checkpoints/last.ckpt'}", f"image={tmp_path / name}.png"]
        edit.run(config(tmp_path, *made, f"out={tmp_path / name}", "box=[0.2,0.2,0.8,0.8]", "num=1", verb="edit"))
        told = json.loads((tmp_path / name / "edit.json").read_text())["fitted"]
        assert told == f"center crop of {size[0]} x {size[1]} pixels, resized to {edited[0]} x {edited[1]}"
    edit.run(config(tmp_path, *made, f"out={tmp_path / 'other'}", "box=[0,0,1,0.5]", "image_size=[16,24]", verb="edit"))
    assert Image.open(tmp_path / "other/edit-000.png").size == (24, 16)


def test_a_model_of_one_shape_becomes_one_of_several_and_what_cannot_be_is_refused(
    tmp_path, settings, shapes_cache, shapes_run
):
    learned = [o for o in settings if not o.startswith("model.position")]
    alone = [f"data.path={shapes_cache / '24x16'}" if o.startswith("data.path") else o for o in learned]
    fit(tmp_path / "tall", *alone)
    start = f"module.init_from={tmp_path / 'tall/checkpoints/last.ckpt'}"
    with pytest.raises(ValueError, match="position=learned, but this run has position=coordinates"):
        fit(tmp_path / "refused", *settings, start)
    fit(tmp_path / "started", *settings, start, "module.reinitialized=[position.*]", "steps=1", "val_every=1")
    before, after = (load(tmp_path / name / "checkpoints/last.ckpt")[1] for name in ("tall", "started"))
    assert (before.word_embed.weight - after.word_embed.weight).norm() < 0.1 * before.word_embed.weight.norm()
    with pytest.raises(ValueError, match="train one with model.position=coordinates"):
        fit(tmp_path / "learned", *learned)
    objective = "module.objective={_target_: varlab.training.tuning.ConditionContrast}"
    with pytest.raises(
        ValueError, match="several shapes, which module.objective, trainer=fsdp and hsdp do not support"
    ):
        fit(tmp_path / "objective", *settings, objective, "model.label_dropout=0.0", "model.drop_path=0.0")
    with pytest.raises(ValueError, match="learns positions, it has no coordinates"):
        made = [f"checkpoint={shapes_run / 'checkpoints/last.ckpt'}", f"out={tmp_path / 'var.pth'}", "to=released"]
        export.run(config(tmp_path, *made, verb="export"))
    with pytest.raises(ValueError, match=r"16x24 has 16 training images, fewer than data.global_batch_size=24"):
        fit(tmp_path / "large", *settings, "data.global_batch_size=24")
    with pytest.raises(ValueError, match="train one with model.position=coordinates"):
        fit(tmp_path / "planned", *learned, "plan=true")
    back = f"module.init_from={shapes_run / 'checkpoints/last.ckpt'}"
    fit(tmp_path / "back", *alone, back, "module.reinitialized=[position]", "steps=1", "val_every=1")
    broken = tmp_path / "broken"
    shutil.copytree(shapes_cache, broken)
    for key, value, told in [
        ("class_names", ["x"], "its class_names differs"),
        ("patch_nums", [1, 2], "has 2 scales, not 4"),
    ]:
        manifest = json.loads((shapes_cache / "16x24/manifest.json").read_text())
        (broken / "16x24/manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(ValueError, match=told):
            TokenDataModule(str(broken), global_batch_size=8).setup()
    (broken / "manifest.json").write_text(json.dumps({"kind": "shapes", "format": 1, "shapes": ["../24x16"]}))
    with pytest.raises(ValueError, match="shapes"):
        TokenDataModule(str(broken), global_batch_size=8).setup()

"""Super-resolution, from a token cache with smaller images to larger ones."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.networks import make_tokenizer, make_var
from support.runs import SHORT, VAR, command, config, fit, kill_at, log_to, logged_losses
from torch.utils.flop_counter import FlopCounterMode

from varlab.app.session import Model
from varlab.commands import audit, edit, evaluate, export, sample, tokenize, train
from varlab.cost.flops import training_flops
from varlab.data.images import CenterCrops
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader
from varlab.data.token_datamodule import TokenDataModule
from varlab.models.conditioning import ImageEmbedder
from varlab.pipeline import VARPipeline
from varlab.sampling.upscaling import match_means, upscale

LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, digits_folder, tokenizer_run):
    """A token cache in two views, each also stored at half its size."""
    out = tmp_path_factory.mktemp("halves") / "tokens"
    settings = [
        f"tokenizer={tokenizer_run / LAST}",
        f"shards={digits_folder}",
        f"out={out}",
        "part_images=20",
        "batch_size=7",
    ]
    tokenize.run(config(out, *settings, "resize_ratio=1.0", "flips=true", "low_res=2", verb="tokenize"))
    return out


@pytest.fixture(scope="module")
def settings(tokens, tokenizer_run):
    image = ["embedder@model.embedder=image", "data.condition=image"]
    return [*VAR, *SHORT, *image, f"tokenizer={tokenizer_run / LAST}", f"data.path={tokens}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, *settings, *log_to(folder / "losses"))
    return folder


def crops(digits_folder, split):
    """The images of a split, in [0, 255]."""
    return (
        torch.cat(list(CenterCrops(ShardReader(digits_folder, split), 16, 1.0, None, 8, torch.device("cpu")))) + 1
    ) * 127.5


def test_the_cache_holds_the_block_means_of_each_view(tokens, digits_folder):
    halves = {split: np.load(tokens / f"{split}.image.npy") for split in ("train", "val")}
    assert halves["train"].shape == (48, 2, 3, 8, 8) and halves["train"].dtype == np.uint8
    for split, found in halves.items():
        expected = F.avg_pool2d(crops(digits_folder, split), 2)
        assert np.abs(found[:, 0] - expected.numpy()).max() <= 0.5 + 1e-4
        np.testing.assert_array_equal(found[:, 1], found[:, 0, :, :, ::-1])
    assert json.loads((tokens / "manifest.json").read_text())["low_res"] == 2 and not (tokens / "parts").exists()


def test_a_view_meets_its_own_image(tokens):
    data = TokenDataModule(str(tokens), 8, condition="image")
    data.setup()
    halves, rows = np.load(tokens / "train.image.npy"), np.load(tokens / "train.tokens.npy")
    assert data.condition_shape == (3, 8, 8)
    for dataset in (data.train_set, data.train_set.on_device(torch.device("cpu"))):
        for epoch, view in ((0, 1), (1, 0)):
            batch = dataset.__getitems__([SampleRequest(7, epoch, True)])
            np.testing.assert_array_equal(batch.sequence[0], rows[7, view])
            np.testing.assert_allclose(batch.condition[0], halves[7, view] / 127.5 - 1, atol=1e-6)
    validated = data.val_set.__getitems__([SampleRequest(3, 1, True)]).condition
    np.testing.assert_allclose(validated[0], np.load(tokens / "val.image.npy")[3, 0] / 127.5 - 1, atol=1e-6)


def test_a_killed_run_continues_bit_by_bit(settings, trained, tmp_path):
    command(tmp_path / "run", *settings, "ckpt_path=last", *log_to(tmp_path / "losses"), *kill_at(5))
    fit(tmp_path / "run", *settings, "ckpt_path=last", *log_to(tmp_path / "losses"))
    assert logged_losses(tmp_path / "losses") == logged_losses(trained / "losses")


def test_parameters_and_flops_are_counted(settings, trained, tmp_path, capsys):
    told, network = json.loads((trained / "run.json").read_text()), VARPipeline.from_pretrained(trained / LAST).var
    assert told["params_total"] == sum(parameter.numel() for parameter in network.parameters())
    image = torch.zeros(1, 3, 8, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(torch.zeros(1, 29, network.codebook_dim, device="meta"), image)
    masked = 4 * 32 * 2 * (30**2 - (1 + 4 * 5 + 9 * 14 + 16 * 30))  # the counter knows no mask
    embedder = 2 * 192 * 32 * (1 + 30)  # is not counted: below a thousandth in networks of real size
    assert training_flops(network.sizes) == 3 * (counter.get_total_flops() - masked - embedder)
    train.run(config(tmp_path, *settings, "plan=true"))
    assert "30 tokens" in capsys.readouterr().out


def test_the_command_enlarges_a_picture_and_keeps_its_pixels_as_means(trained, digits_folder, tmp_path):
    small = F.avg_pool2d(crops(digits_folder, "val")[:1], 2).round().byte()[0].permute(1, 2, 0).numpy()
    Image.fromarray(small).save(tmp_path / "small.png")
    given = [f"checkpoint={trained / LAST}", f"image={tmp_path / 'small.png'}", f"out={tmp_path / 'out'}"]
    edit.run(config(tmp_path, *given, "num=3", "upscale=2", "cfg_scale=1", verb="edit"))
    told = json.loads((tmp_path / "out/edit.json").read_text())
    assert told["upscale"] == 2 and told["fitted"] == "center crop of 8 x 8 pixels, resized to 8 x 8"
    assert told["errors_in_levels"]["result"] < 0.01 < told["errors_in_levels"]["network"]
    assert "strength" not in told and told["cfg_scale"] == 1 and told["num"] == 3 and told["composite"] is True
    results = [np.asarray(Image.open(tmp_path / f"out/edit-00{i}.png")).astype(float) for i in range(3)]
    assert results[0].shape == (16, 16, 3) and (results[0] != results[1]).any()
    for result in results:
        assert np.abs(result.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) - small).max() <= 0.5
    assert Image.open(tmp_path / "out/edit.png").width == 4 * 66 - 2
    edit.run(config(tmp_path, *given, "num=3", "upscale=2", "cfg_scale=1", "composite=false", verb="edit"))
    assert json.loads((tmp_path / "out/edit.json").read_text())["composite"] is False
    raw = [np.asarray(Image.open(tmp_path / f"out/edit-00{i}.png")) for i in range(3)]
    pipeline = VARPipeline.from_pretrained(trained / LAST)
    condition = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].repeat(3, 1, 1, 1) / 127.5 - 1
    drawn = pipeline(condition=condition, seed=0, cfg_scale=1.0, top_p=0.95)
    assert all((np.asarray(image) == array).all() for image, array in zip(drawn, raw, strict=True))


def test_a_large_photo_is_reduced_as_in_training_and_older_results_are_removed(trained, digits_folder, tmp_path):
    large = crops(digits_folder, "val")[:1].round().byte()
    Image.fromarray(large[0].permute(1, 2, 0).numpy()).save(tmp_path / "large.png")
    given = [f"checkpoint={trained / LAST}", f"image={tmp_path / 'large.png'}", f"out={tmp_path / 'out'}", "upscale=2"]
    edit.run(config(tmp_path, *given, "num=3", "cfg_scale=[0,0,1,1]", verb="edit"))
    result = np.asarray(Image.open(tmp_path / "out/edit-000.png")).astype(float)
    means = F.avg_pool2d(large.float(), 2)[0].permute(1, 2, 0).round().numpy()
    assert np.abs(result.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) - means).max() <= 0.5
    told = json.loads((tmp_path / "out/edit.json").read_text())
    assert told["cfg_scale"] == [0, 0, 1, 1] and told["fitted"] == "center crop of 16 x 16 pixels, resized to 8 x 8"
    edit.run(config(tmp_path, *given, "num=1", verb="edit"))
    assert [file.name for file in sorted((tmp_path / "out").glob("edit-*.png"))] == ["edit-000.png"]


def test_every_step_sees_its_part_of_the_image():
    """Sampled step by step as with teacher forcing, and in both orders of prediction."""
    for order in ("scales", "raster"):
        var = make_var(embedder=partial(ImageEmbedder, image_size=(8, 8)), order=order).eval()
        image = torch.randn(2, 3, 8, 8)
        inputs = torch.randn(2, 29, var.codebook_dim)
        with torch.no_grad():
            whole, cache = var(inputs, image), var.start_cache(image)
            steps = [
                var.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], cache)
                for k, (first, last) in enumerate(var.step_bounds)
            ]
            other = image.clone()
            other[:, :, 6:, 6:] += 1  # under the last token alone of the finest map
            changed = (var(inputs, other) - whole).abs().amax(dim=2)[0]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-4)
        assert changed[-16:].argmax() == 15


def test_scores_of_a_token_cache_and_of_shards_agree(trained, tokens, digits_folder, tmp_path):
    given = f"checkpoint={trained / LAST}"
    for name, data in (("cache", tokens), ("shards", digits_folder)):
        settings = [given, f"shards={data}", f"out={tmp_path / name}", "retrieval=4"]
        evaluate.run(config(tmp_path, *settings, "resize_ratio=1.0", verb="evaluate"))
    cache, shards = (json.loads((tmp_path / name / "likelihood.json").read_text()) for name in ("cache", "shards"))
    assert cache["retrieval_candidates"] == 4 and cache["num_images"] == 11
    for name in ("loss", "unconditional_loss", "retrieval"):
        assert cache[name] == pytest.approx(shards[name], rel=1e-5)
    assert cache["loss"] != cache["unconditional_loss"]


def test_an_audit_compares_samples_with_training_images(trained, tokens, digits_folder, tmp_path):
    given = [f"checkpoint={trained / LAST}", "num_images=8"]
    audit.run(config(tmp_path, *given, f"shards={tokens}", f"out={tmp_path / 'a'}", verb="audit"))
    np.savez(
        tmp_path / "samples.npz", arr_0=np.random.default_rng(0).integers(256, size=(4, 16, 16, 3), dtype=np.uint8)
    )
    more = [
        f"shards={digits_folder}",
        f"out={tmp_path / 'b'}",
        f"samples={tmp_path / 'samples.npz'}",
        "resize_ratio=1.0",
    ]
    audit.run(config(tmp_path, *given, *more, verb="audit"))
    found = [json.loads((tmp_path / name / "audit.json").read_text()) for name in "ab"]
    assert all("membership" in audit for audit in found) and "memorization" in found[1]


def test_other_sizes_of_the_condition_are_refused(trained, digits_folder, tokenizer_run, tmp_path):
    quarters = [f"tokenizer={tokenizer_run / LAST}", f"shards={digits_folder}", f"out={tmp_path / 'quarters'}"]
    tokenize.run(config(tmp_path, *quarters, "resize_ratio=1.0", "low_res=4", verb="tokenize"))
    given = [f"checkpoint={trained / LAST}", f"shards={tmp_path / 'quarters'}", f"out={tmp_path / 'out'}"]
    for verb, scored in (("evaluate", evaluate), ("audit", audit)):
        with pytest.raises(
            ValueError, match=r"quarters gives conditions of shape \(3, 4, 4\), but ImageEmbedder takes \(3, 8, 8"
        ):
            scored.run(config(tmp_path, *given, verb=verb))
    with pytest.raises(
        ValueError, match=r"image_size=\[32, 32\]: this network enlarges images of one size, to \[16, 16\]"
    ):
        VARPipeline.from_pretrained(trained / LAST)(condition=torch.zeros(1, 3, 8, 8), image_size=32)


def test_samples_of_an_exported_network_take_images_of_a_file(trained, tokens, tmp_path):
    export.run(config(tmp_path, f"checkpoint={trained / LAST}", f"out={tmp_path / 'model'}", verb="export"))
    card = (tmp_path / "model/README.md").read_text()
    assert "conditioned on images of 8 x 8 pixels in [-1, 1]" in card and "condition=images" in card
    pixels = np.load(tokens / "val.image.npy")[:2, 0]
    images = torch.from_numpy(pixels / 127.5 - 1)
    drawn = VARPipeline.from_pretrained(tmp_path / "model")(condition=images.float(), seed=4, cfg_scale=1.0)
    for name, rows in (("bytes", pixels), ("fp32", images.float().numpy()), ("fp64", images.numpy())):
        np.save(tmp_path / f"{name}.npy", rows)
        settings = [f"checkpoint={tmp_path / 'model'}", f"condition={tmp_path / name}.npy", "num=2", "seed=4"]
        sample.run(config(tmp_path, *settings, "cfg_scale=1", f"out={tmp_path / name}", verb="sample"))
        files = [tmp_path / name / f"images/00000{i}.png" for i in (0, 1)]
        assert all((np.asarray(image) == Image.open(file)).all() for image, file in zip(drawn, files, strict=True))
        told = json.loads((tmp_path / name / "samples.json").read_text())["labels"]
        assert len(set(told)) == 2 and all(len(row) == 16 for row in told)
    for name, rows, message in (
        ("levels", 255 * np.ones((1, 3, 8, 8), np.float32), "have values from 255 to 255: give -1 to 1"),
        ("nothing", np.full((1, 3, 8, 8), np.nan, np.float32), "have values from nan to nan: give -1 to 1"),
        ("number", np.float32(1), "is not an array of numbers with a row for each image"),
        ("other", np.zeros((1, 3, 4, 4), np.float32), r"has shape \(1, 3, 4, 4\), but the network takes rows of shape"),
    ):
        np.save(tmp_path / f"{name}.npy", rows)
        given = [f"checkpoint={tmp_path / 'model'}", f"condition={tmp_path / name}.npy", f"out={tmp_path / name}"]
        with pytest.raises(
            ValueError, match=f"{name}.npy:? {message}|{name}.npy: the images of the condition {message}"
        ):
            sample.run(config(tmp_path, *given, "num=2", verb="sample"))
        assert not (tmp_path / name / "begun.json").exists()
    with pytest.raises(ValueError, match="takes no class label: give condition=FILE.npy, images of shape"):
        sample.run(
            config(tmp_path, f"checkpoint={tmp_path / 'model'}", f"out={tmp_path / 'x'}", "num=2", verb="sample")
        )
    with pytest.raises(
        ValueError, match="the page draws classes and texts, and this network takes conditions of shape"
    ):
        Model(str(tmp_path / "model"), "cpu")
    with pytest.raises(ValueError, match="no ImageEmbedder"):
        export.run(
            config(tmp_path, f"checkpoint={trained / LAST}", "to=released", f"out={tmp_path / 'r'}", verb="export")
        )
    assert not (tmp_path / "r/tokenizer.pth").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["upscale=4"], "upscale=4: this network turns 8 x 8 pixels into 16 x 16: give upscale=2"),
        (["upscale='2'"], "upscale='2': this network turns"),
        (["upscale=2", "label=3"], "upscale=2 and label=3: super-resolution takes the image alone"),
        (
            ["upscale=2", "strength=0.5", "outpaint=true"],
            "upscale=2 and outpaint=True and strength=0.5: super-resolution",
        ),
        (["upscale=2", "num=1.5"], "num=1.5: give the number of images, 1 or more"),
        (["upscale=2", "composite=maybe"], "composite=maybe: give true or false"),
        (["upscale=2", "box=[0,0,1,1]"], r"upscale=2 and box=\[0, 0, 1, 1\]: super-resolution takes the image alone"),
    ],
)
def test_what_does_not_fit_is_named(changed, message, trained, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    given = [f"checkpoint={trained / LAST}", f"image={tmp_path / 'small.png'}", f"out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=message):
        edit.run(config(tmp_path, *given, *changed, verb="edit"))
    assert not (tmp_path / "out").exists()


def test_networks_and_caches_without_images_are_named(settings, tokens, token_cache, export_folder, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    given = [f"checkpoint={export_folder}", f"image={tmp_path / 'small.png'}", f"out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="this network does not take images: train one with embedder@model"):
        edit.run(config(tmp_path, *given, "upscale=2", verb="edit"))
    with pytest.raises(ValueError, match=rf"data.condition=image: {token_cache} holds no smaller images: make it with"):
        fit(tmp_path / "a", *settings, f"data.path={token_cache}")
    with pytest.raises(
        ValueError, match="data.condition=image: the size of such a network follows from the data: set data.path"
    ):
        train.run(config(tmp_path, *settings, "data.path=???", "plan=true"))
    with pytest.raises(ValueError, match="model.embedder=image takes images: set data.condition=image"):
        fit(tmp_path / "b", *settings, "data.condition=label")
    with pytest.raises(ValueError, match="patch=0 of the condition: give 1 or more"):
        fit(tmp_path / "c", *settings, "model.embedder.patch=0")
    shutil.copytree(tokens, tmp_path / "two/16x16")
    (tmp_path / "two/manifest.json").write_text(
        json.dumps({"kind": "shapes", "format": 1, "shapes": ["16x16", "16x24"]})
    )
    shutil.copytree(tokens, tmp_path / "two/16x24")
    with pytest.raises(ValueError, match="data.condition=image takes images of one shape: set data.path=.*16x16"):
        fit(tmp_path / "d", *settings, f"data.path={tmp_path / 'two'}")


@pytest.mark.parametrize("low_res", [1, 3, -2, 128, "'2'"])
def test_a_factor_that_does_not_divide_the_images_is_named(low_res, digits_folder, tokenizer_run, tokens, tmp_path):
    given = [f"tokenizer={tokenizer_run / LAST}", f"shards={digits_folder}", f"low_res={low_res}", "resize_ratio=1.0"]
    with pytest.raises(ValueError, match=f"low_res={low_res}: give [2a]"):
        tokenize.run(config(tmp_path, *given, f"out={tmp_path / 'tokens'}", verb="tokenize"))
    with pytest.raises(ValueError, match=f"{tokens} already holds a token cache with different low_res"):
        tokenize.run(config(tmp_path, *given, "low_res=4", "flips=true", f"out={tokens}", verb="tokenize"))


def test_the_nearest_images_with_these_means():
    """Against a projection by a general solver: alternating projections of Dykstra on the means and on [0, 1]."""
    drawn, images = torch.rand(2, 3, 8, 8).double(), torch.rand(2, 3, 4, 4).double() ** 3
    images[0, 0, 0, 0], images[1, 2, 3, 3] = 0.0, 1.0
    found = match_means(drawn.float(), images.float()).double()
    torch.testing.assert_close(F.avg_pool2d(found, 2), images, atol=1e-6, rtol=0)
    expected, correction = drawn.clone(), torch.zeros_like(drawn)
    for _ in range(500):
        matched = expected + F.interpolate(images - F.avg_pool2d(expected, 2), scale_factor=2.0)
        expected = (matched + correction).clamp(0, 1)
        correction = matched + correction - expected
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    within = drawn.float()
    torch.testing.assert_close(match_means(within, F.avg_pool2d(within, 2)), within, atol=1e-6, rtol=0)


def test_a_network_of_classes_is_refused():
    with pytest.raises(ValueError, match="this network does not take images"):
        upscale(make_var().eval(), make_tokenizer().eval(), torch.zeros(1, 3, 8, 8))

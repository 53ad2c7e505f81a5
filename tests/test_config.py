"""Every yaml composes, and builds what it names."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from support.runs import config

from varlab.config import (
    check_names,
    check_types,
    conf_dir,
    one_sentence,
    override_of,
    report_user_errors,
    reported_error,
)
from varlab.models import scales

CONF = Path(conf_dir())
GIVEN = ["data.path=somewhere", "tokenizer=some.ckpt"]


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def compose_experiment(tmp_path, name: str, *overrides: str):
    return config(tmp_path, f"experiment={name}", *GIVEN, *overrides)


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_composes_with_the_right_types_and_builds_its_network(name, tmp_path):
    cfg = compose_experiment(tmp_path, name)
    check_types(cfg)
    with torch.device("meta"):
        net = instantiate(cfg.model, _convert_="all")
        if not isinstance(net, torch.nn.Module):
            net = net(patch_nums=[1, 2, 3], codebook_size=16, codebook_dim=4, num_classes=5)
    assert sum(parameter.numel() for parameter in net.parameters()) > 0
    assert instantiate(cfg.data, _convert_="all").global_batch_size == cfg.data.global_batch_size
    for callback in cfg.callbacks.values():
        assert callback is None or instantiate(callback)
    assert cfg.epochs > 0 or cfg.steps > 0 or name in ("depth_scaling", "isoflop", "var_vs_raster")


@pytest.mark.parametrize("name", names("resolution"))
def test_every_pyramid_fits_its_resolution_and_the_released_ones_are_exact(name, tmp_path):
    named = {"16px": "tiny", "64px": "f8_64", "256px": "f16", "512px": "f16_512"}.get(name, name)
    cfg = compose_experiment(tmp_path, f"tokenizer_{named}")
    with torch.device("meta"):
        tokenizer = instantiate(cfg.model, _convert_="all")
    assert tokenizer.image_size == (cfg.resolution, cfg.resolution) == (int(name[:-2]), int(name[:-2]))
    tokens = {"16px": 30, "32px": 130, "64px": 130, "128px": 680, "256px": 680, "512px": 2240}
    assert scales.num_tokens(tokenizer.patch_nums) == tokens[name]
    if name in ("256px", "512px"):
        assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 108_948_355


@pytest.mark.parametrize(
    ("depth", "peak", "end"),
    [(16, 3e-4, 0.05), (20, 3e-4, 0.05), (24, 2.4e-4, 0.05), (30, 3.2e-4, 0.08), (36, 2.4e-4, 0.08)],
)
def test_the_recipes_are_the_published_ones(depth, peak, end, tmp_path):
    cfg = compose_experiment(tmp_path, f"var_d{depth}")
    assert cfg.module.base_lr * cfg.data.global_batch_size / 256 == pytest.approx(peak)
    assert (cfg.module.weight_decay_end or cfg.module.weight_decay) == end
    gammas = {16: 1e-3, 20: 1e-3, 24: 1e-4, 30: 1e-5, 36: 5e-6}
    with torch.device("meta"):
        net = instantiate(cfg.model)(patch_nums=[1, 2], codebook_size=8, codebook_dim=4, num_classes=2)
    assert net.init_adaln_gamma == gammas[depth]
    assert net.shared_adaln == (depth == 36)
    assert cfg.epochs == {16: 200, 20: 250}.get(depth, 350)
    assert cfg.module.gradient_clip_val == 2.0


@pytest.mark.parametrize("name", names("trainer"))
def test_every_trainer_has_only_settings_that_lightning_knows(name, tmp_path):
    cfg = compose_experiment(tmp_path, "var_d16", f"trainer={name}")
    check_types(cfg)
    assert not cfg.trainer.use_distributed_sampler


@pytest.mark.parametrize("name", [n for n in names("model") if n.startswith("var_")])
def test_every_size_builds_with_width_and_heads_from_depth(name, tmp_path):
    cfg = compose_experiment(tmp_path, "var_d16", f"model={name}")
    with torch.device("meta"):
        var = instantiate(cfg.model)(patch_nums=[1, 2], codebook_size=8, codebook_dim=4, num_classes=2)
    depth = int(name.removeprefix("var_d"))
    assert (var.depth, var.width, var.num_heads) == (depth, 64 * depth, depth)


@pytest.mark.parametrize("verb", ["pack", "tokenize", "evaluate", "sample", "scaling"])
def test_every_verb_composes(verb):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        assert compose(verb)
    assert (CONF / f"{verb}.yaml").read_text().startswith(f"# varlab {verb}")


@pytest.mark.parametrize("name", [name for name in names("experiment") if name.startswith("tokenizer_")])
def test_every_tokenizer_takes_other_codes(name, tmp_path):
    for codes in ("bsq", "simvq"):
        cfg = compose_experiment(tmp_path, name, f"quantizer@model.quantizer={codes}")
        check_types(cfg)


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g in ("perceptual", "adversarial") for n in names(g) if n != "recipe"]
)
def test_every_choice_of_losses_composes_with_the_right_types(group, name, tmp_path):
    cfg = compose_experiment(tmp_path, "tokenizer_f8_64", f"{group}={name}")
    check_types(cfg)
    assert (cfg[group] is None) == (name == "none")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("path=a b", "path=a b"),
        ("path=ünïcode/猫", "path='ünïcode/猫'"),
        ("path=it's {x}", r"path='it\'s {x}'"),
        ("train=data/{000..002}.tar", "train='data/{000..002}.tar'"),
        ("path='ü'", "path='ü'"),
        ("classes=[1,2]", "classes=[1,2]"),
        ("steps=1,2", "steps=1,2"),
        ("+a.b={_target_: x.y}", "+a.b={_target_: x.y}"),
        ("text=a cat, sitting", "text='a cat, sitting'"),
        ("text=it's 7", r"text='it\'s 7'"),
        ("text=7", "text='7'"),
        ("text=null", "text=null"),
        ("text=['a, b','c']", "text=['a, b','c']"),
        ("--multirun", "--multirun"),
        ("word", "word"),
        ("resolution=32px", "resolution=32px"),
        ("resolution=48", "data.resolution=48"),
        ("resolution=[16, 24]", "data.resolution=[16, 24]"),
    ],
)
def test_values_that_hydra_cannot_parse_are_quoted_and_sizes_go_to_the_data(given, expected):
    assert override_of(given) == expected


def test_a_name_too_long_for_a_file_system_is_told():
    check_names(["name=" + "x" * 240, "path=" + "x" * 300, "name=" + ",".join(["a"] * 300)])
    with pytest.raises(SystemExit, match="name=x+... has 241 bytes in one file name"):
        check_names(["name=" + "x" * 241])
    with pytest.raises(SystemExit, match="out=.* has 300 bytes"):
        check_names(["out=runs/" + "ü" * 150])


def test_full_memory_and_lost_processes_are_told_in_a_sentence():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\nmore")
    lost = RuntimeError("Read error [127.0.0.1]:6845: Connection reset by peer. This is typically caused by")
    hanging = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")
    waited = RuntimeError("Application timeout caused pair closure")
    assert all(reported_error(error) is error for error in (full, lost, hanging, waited))
    assert reported_error(RuntimeError("shape mismatch")) is None
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0" in one_sentence(full)
    assert "accumulate=2" in one_sentence(full) and "\n" not in one_sentence(full)
    assert "died or hangs (Read error [127.0.0.1]:6845: Connection reset by peer): see" in one_sentence(lost)
    assert "ckpt_path=last" in one_sentence(hanging)


def test_a_dead_worker_is_told_wherever_its_signal_arrives(monkeypatch):
    death = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    class Code:
        @property
        def __signature__(self):
            raise death

        def __call__(self): ...

    with pytest.raises(TypeError) as wrapped:  # `inspect` wraps whatever is raised in it
        inspect.getfullargspec(Code())
    assert reported_error(wrapped.value) is death
    assert "a data worker died or hangs (DataLoader worker (pid 7)" in one_sentence(death)
    with pytest.raises(SystemExit), report_user_errors("train"):
        raise wrapped.value
    assert reported_error(TypeError("unsupported callable")) is None

"""Every command of the documentation runs, in its order, page by page: as printed, but small."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import warm
from support.docs import PAGES, ROOT, code, commands
from support.image_files import make_idx, make_ilsvrc, make_parquet, make_tables
from support.networks import make_tokenizer, make_var
from support.scaling_runs import make_runs
from support.servers import free_port
from support.shards import digits

from varlab.checkpoints.released_layout import to_released

SMALLER = [  # what the test runs in place of an argument as printed
    ("trainer=(gpu|ddp)", "trainer=cpu"),
    ("trainer=hsdp", "trainer=hsdp trainer.accelerator=cpu devices=2"),
    ("nodes=4", "nodes=1"),
    ("data.global_batch_size=64", "data.global_batch_size=4"),
    (r"(perceptual|features)\.weights=download", ""),
    ("features=inception", "features=efficientnet_lite0"),
    (r"resolution=\w+px", "resolution=16px"),
    (r"patch_nums=\[[\d,]*\]", "patch_nums=[1,2,3,4]"),
    ("top_k=900", "top_k=9"),
    (r"(grid\.)?num=\d+", r"\g<1>num=12"),
    (r"\+sources\.spirals=.*", "+sources.spirals={_target_: spirals.spirals, count: 40}"),
    (r"grid\.cfg_scale=.*", "grid.cfg_scale=[1,2]"),
    (r"(steps=\d+|epochs=10)", "steps=2"),
    ("model.depth=2,3,4,6,8,10", "model.depth=1,2"),
    ("branch=1,0.5,0.25,0.125", "branch=1,0.5"),
    ("short_side=288", "short_side=20"),
    (r"(train|val)=s3://bucket/.*", r"\g<1>=theirs/\g<1>-*.tar"),
    ("run=d6-.*", "run=d6-76800"),
    ("retrieval=8", "retrieval=2"),
    ("images=3e7", "images=3e5"),
    ("compute=1e18", "compute=5e13"),
]
SHORT = [
    *(
        "data.global_batch_size=4",
        "++data.num_workers=0",
        "epochs=-1",
        "val_every=2",
        "save_every=2",
        "log_every=1",
        "logger=csv",
    ),
    *("callbacks.progress=null", "+trainer.enable_progress_bar=false", "trainer.precision=32-true"),
]
TOKENIZER = [
    *(
        "resolution=16px",
        "perceptual=none",
        "adversarial=none",
        "model.channels=32",
        "model.num_groups=32",
        "model.num_blocks=1",
    ),
]
CODES = ["model.quantizer.codebook_size=12", "model.quantizer.codebook_dim=6"]
NETWORK = ["model.depth=2", "model.width=32", "model.num_heads=2"]
ADDED = [  # to commands that match, unless they set it already
    ("train .*experiment=tokenizer", TOKENIZER),
    ("train (?!.*quantizer=(custom|bsq|fsq)).*experiment=tokenizer", CODES),
    ("train .*experiment=(var_d[0-9]|depth_scaling)", NETWORK),
    ("(train|tune) (?!.*plan=true)", [*SHORT, "steps=2"]),
    ("train (?!.*plan=true).*experiment=depth_scaling", ["name=small"]),
    ("(tokenize|import) .*vae_ch160", ["patch_nums=[1,2,3,4]"]),
    ("sample", ["batch_size=6", "film_rows=2"]),
    ("scaling", ["bootstraps=50"]),
    ("evaluate", ["batch_size=6", "curve_images=6"]),
]


def small(command: str) -> list[str]:
    """The same command at other sizes; as printed it takes a GPU for days."""
    words = shlex.split(command)
    if words[0] == "make":
        recipe = ["make", "-n", "--no-print-directory", "-o", ".venv/.base", *words[1:]]
        printed = subprocess.run(recipe, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        words = ["varlab", *shlex.split(printed.splitlines()[-1])[1:]]
    start, verb = [sys.executable, "-m", "varlab", words[1]], words[1]
    arguments = words[2:]
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        verb, arguments = words[module + 1], words[module + 2 :]
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            words[module],
            verb,
        ]
    for pattern, replacement in SMALLER:
        arguments = [re.sub(f"^{pattern}$", replacement, argument) for argument in arguments]
    arguments = [
        word
        for argument in arguments
        for word in (argument.split() if re.match("(?!text=)[^{]* ", argument) else [argument])
        if word
    ]
    if verb == "train":
        arguments = [re.sub("^tokenizer=vae_ch160.*", "tokenizer=var_d16", argument) for argument in arguments]
    if verb == "sweep":
        arguments = [argument.replace("depth_scaling", "small") for argument in arguments]
    for pattern, added in ADDED:
        if re.match(pattern, f"{verb} {' '.join(arguments)}"):
            names = {argument.split("=")[0].lstrip("+") for argument in arguments}
            arguments += [setting for setting in added if setting.split("=")[0].lstrip("+") not in names]
    return [*start, *arguments]


def make_foreign_tables() -> None:
    """Runs at four budgets, with tokens (table.csv) or with compute (points.csv)."""
    grid = [(n, c / (6 * n)) for c in (1e19, 1e20, 1e21, 1e22) for n in np.geomspace(1e8, 1e10, 7)]
    runs = [(n, d, float(1.8 + 480 / n**0.35 + 2100 / d**0.37)) for n, d in grid]
    theirs = ["params,tokens,loss", *[f"{n},{d},{loss}" for n, d, loss in runs]]
    Path("table.csv").write_text("\n".join(theirs), encoding="utf-8")
    points = ["Model Size,Training FLOP,loss", *[f"{n},{6 * n * d},{loss}" for n, d, loss in runs]]
    Path("points.csv").write_text("\n".join(points), encoding="utf-8")


@pytest.fixture
def world(tmp_path, tokenizer_run, token_cache, digits_folder, monkeypatch):
    """What the pages take for granted: images, archives, other people's shards, released weights, a sweep that ran."""
    monkeypatch.chdir(tmp_path)
    for i, item in enumerate(digits(24, 11).splits["train"]):
        folder = Path("my_images") / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(item.load())
    shutil.copytree("my_images", "captioned")
    for image in sorted(Path("captioned").rglob("*.png")):
        image.with_suffix(".txt").write_text(f"a {image.parent.name}\nnumber {image.stem}", encoding="utf-8")
    photo = Image.open("my_images/cat/1.png").convert("RGB")
    photo.save("photo.jpg")
    Image.new("L", photo.size, 255).save("mask.png")
    shutil.copytree(digits_folder, "packed")
    Path("theirs").mkdir()
    for shard in digits_folder.glob("*.tar"):
        shutil.copy(shard, "theirs")
    Path("hub").mkdir()
    make_parquet(Path("hub"), names=["ant", "bee", "cat"])
    make_tables(Path())
    make_idx(Path("mnist"))
    for file in Path("hub").glob("val-*.parquet"):
        file.rename(file.with_name(file.name.replace("val-", "validation-")))
    make_ilsvrc(Path("archives"))
    for file, name in [
        ("train.tar", "img_train.tar"),
        ("val.tar", "img_val.tar"),
        ("devkit.tar.gz", "devkit_t12.tar.gz"),
    ]:
        (Path("archives") / file).rename(f"ILSVRC2012_{name}")
    released = make_tokenizer(channels=32, channel_mult=(1, 2, 2), num_groups=32, num_blocks=1)
    torch.save(to_released(released), "vae_ch160v4096z32.pth")
    torch.save(to_released(make_var(width=64, num_heads=1)), "var_d16.pth")
    np.savez(
        "VIRTUAL_imagenet256_labeled.npz",
        arr_0=np.random.default_rng(0).integers(256, size=(40, 16, 16, 3), dtype=np.uint8),
    )
    make_runs(Path("runs/depth_scaling"), depths=(2, 3, 4, 6, 8), budgets=(9600, 19200, 38400, 76800), noise=0.003)
    for recipe in ("idea", "baseline"):
        make_runs(Path("runs") / recipe, depths=(2, 3, 4, 6, 8), noise=0.003)
    make_foreign_tables()
    Path("FILE").symlink_to(tokenizer_run / "checkpoints/last.ckpt")
    Path("TOKENS").symlink_to(token_cache)
    return tmp_path


def run(words: list[str], printed: str) -> None:
    """Runs a command that must succeed."""
    environment = {**os.environ, "WANDB_MODE": "offline"}
    answer = warm.run(words, env=environment)
    said = f"{answer.stdout[-2000:]}\n{answer.stderr[-3000:]}"
    assert answer.returncode == 0, f"{printed}\n\n{shlex.join(words)}\n\n{said}"


def serve(words: list[str]) -> None:
    """The page comes up, answers, and ends when told to."""
    port = free_port()
    words = [word for word in words if not word.startswith("port=")] + [f"port={port}"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in said, said
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as page:
            assert '"title":"varlab"' in page.read().decode()
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_run(page, world):
    for kind in ("python", "yaml"):
        for title, text in code(page, kind):
            if title:
                Path(title).parent.mkdir(parents=True, exist_ok=True)
                Path(title).write_text(text, encoding="utf-8")
    for packed in ("data/mine", "data/imagenet"):
        if f"out={packed}" not in " ".join(commands(page)).split():
            shutil.copytree("packed", packed)
    for command in commands(page):
        words = small(command)
        print(shlex.join(words), flush=True)
        serve(words) if "app" in words else run(words, command)
    for title, text in code(page, "python"):
        if not title:
            run([sys.executable, "-c", f"{text}\nassert len(images) == 2"], text)


def test_the_readme_repeats_commands_of_the_pages():
    known = {command for page in PAGES for command in commands(page)}
    assert [command for command in commands(ROOT / "README.md") if command not in known] == []


def test_the_site_builds_and_a_broken_link_stops_it(tmp_path):
    def build(folder: Path) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--config-file",
            folder / "mkdocs.yml",
            "--site-dir",
            tmp_path / "site",
        ]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    answer = build(ROOT)
    assert answer.returncode == 0, answer.stderr
    reference = (tmp_path / "site/reference/index.html").read_text()
    assert "MultiScaleQuantizer" in reference and "teacher_forcing_inputs" in reference
    for name in ("docs", "experiments", "src", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with open(tmp_path / "docs/design.md", "a", encoding="utf-8") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    answer = build(tmp_path)
    assert answer.returncode == 1 and "nowhere.md" in answer.stderr

"""Does the loss of a VAR follow a power law in size, data and compute? Glyphs of free fonts (study `glyphs`), and emoji64, a small
data set (`emoji`). Finished steps are skipped; an interrupted run continues.

    python experiments/depth_scaling/run.py glyphs          (needs data/glyphs32; two CPU cores: two hours)
    python experiments/depth_scaling/run.py emoji           (400 images, 19 passes: seven minutes; needs data/emoji64)
    python experiments/depth_scaling/run.py glyphs --refit  (fits the committed tables again: seconds)
    python experiments/depth_scaling/run.py glyphs --plan   (prints FLOP and time of all jobs, starts none)
    python experiments/depth_scaling/run.py glyphs --full --device gpu    (one GPU: depths 2 to 10; not run yet)
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from varlab.files import load_json, save_json, sha256

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import finished, varlab  # noqa: E402

SHARES = "1,0.5,0.25,0.125"


class Study:
    """One data set, one tokenizer, its sweeps."""

    def __init__(
        self, name: str, shards: Path, tokenizer: str | list[str], depths: str, steps: int, settings: list[str]
    ) -> None:
        """`tokenizer`: a pretrained one, or the settings to train one."""
        self.name, self.shards, self.tokenizer, self.depths, self.steps = name, shards, tokenizer, depths, steps
        self.settings, self.runs = settings, Path("runs") / name
        self.plans: list[str] = []

    def tokens(self, name: str = "tokens", *patch_nums: str) -> list[str]:
        """Trains a tokenizer and caches tokens, unless finished; returns the settings that name both."""
        run, cache = self.runs / f"{name}-tokenizer", self.runs / name
        if not isinstance(self.tokenizer, str) and not finished(run):
            training = [f"name={self.name}/{run.name}", f"data.path={self.shards}", "ckpt_path=last", "logger=csv"]
            varlab("train", *training, *self.tokenizer, *patch_nums)
        checkpoint = self.tokenizer if isinstance(self.tokenizer, str) else run / "checkpoints/last.ckpt"
        if not (cache / "manifest.json").is_file():
            varlab("tokenize", f"tokenizer={checkpoint}", f"shards={self.shards}", f"out={cache}", "resize_ratio=1.0")
        return [f"tokenizer={checkpoint}", f"data.path={cache}"]

    def sweep(self, name: str, tokens: list[str], *settings: str) -> Path:
        """Runs a sweep over depth and other settings; finished jobs are kept."""
        own = [f"name={self.name}/{name}", f"steps={self.steps}", *tokens, *self.settings, *self.plans]
        quiet = ["logger=csv", "callbacks.pictures=null", "callbacks.best=null"]
        varlab("train", "--multirun", "experiment=depth_scaling", *own, *quiet, *settings)
        return self.runs / name

    def fit(self, name: str, source: Path | None = None, *settings: str) -> None:
        """Fits the scaling law of a sweep, or of a table, and copies tables and figures next to this script."""
        out = self.runs / f"{name}-fit"
        varlab("scaling", f"source={source or self.runs / name}", f"out={out}", f"title={self.name}: {name}", *settings)
        target = HERE / f"{self.name}-{name}"
        target.mkdir(exist_ok=True)
        for file in sorted(out.iterdir()):
            if file.suffix in (".csv", ".json", ".png", ".md"):
                shutil.copy(file, target / file.name)


def first_images(cache: Path, num: int) -> Path:
    """A token cache of the first training images of another one, with the same validation set."""
    out = cache.with_name(f"{cache.name}-{num}")
    if not (out / "manifest.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        for file in cache.glob("*.npy"):
            np.save(out / file.name, np.load(file)[: num if file.name.startswith("train") else None])
        manifest = load_json(cache / "manifest.json", "varlab tokenize")
        manifest["splits"]["train"] |= {"num_images": num, "sha256": sha256(out / "train.tokens.npy")}
        save_json(out / "manifest.json", manifest)
    return out


def shared_settings(device: str) -> list[str]:
    """Settings of all studies."""
    return [f"trainer={device}", "trainer.precision=bf16-mixed", "module.lr_reference_depth=3"]


def glyphs(is_full: bool = False, device: str = "cpu") -> Study:
    """The study of glyphs. On two cores the networks are half as wide as the paper's, 32 times the depth."""
    batch, depths, steps = (256, "2,3,4,6,8,10", 900) if is_full else (64, "1,2,3,4,5,6", 800)
    settings = [*shared_settings(device), f"data.global_batch_size={batch}", f"val_every={steps}"]
    settings += ["log_every=25", "save_every=200", f"module.base_lr={8.0e-3 if is_full else 2.0e-2}"]
    settings += [] if is_full else ["model.width=${mul:32,${model.depth}}"]
    name = "glyphs-full" if is_full else "glyphs"
    return Study(name, Path("data/glyphs32/shards"), "glyphs32", depths, steps, settings)


def emoji(is_full: bool = False, device: str = "cpu") -> Study:
    """The study of few images, each seen many times."""
    settings = [
        *shared_settings(device),
        "module.base_lr=8.0e-3",
        "data.global_batch_size=64",
        "log_every=5",
        "save_every=60",
    ]
    depths, steps = ("2,3,4,6,8,10", 20_000) if is_full else ("1,2,3", 120)
    settings += [f"val_every={steps // 8}"]
    name = "emoji-full" if is_full else "emoji"
    return Study(name, Path("data/emoji64/shards"), ["experiment=tokenizer_emoji64"], depths, steps, settings)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", choices=["glyphs", "emoji"])
    parser.add_argument("--full", action="store_true", help="the size for a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refit", action="store_true", help="fit the committed tables again, train nothing")
    parser.add_argument("--plan", action="store_true", help="print the cost of the sweep, start nothing")
    given = parser.parse_args()
    study = {"glyphs": glyphs, "emoji": emoji}[given.study](given.full, given.device)
    if given.refit:
        study.fit("var", HERE / f"{study.name}-var/runs.csv")
        return
    tokens = study.tokens()
    if given.study == "emoji" and not given.full:  # few enough for many epochs on two cores
        tokens[1] = f"data.path={first_images(study.runs / 'tokens', 400)}"
    if given.plan:
        study.plans = ["plan=true", "planned_flops=1.5e11"]
        study.sweep("var", tokens, f"model.depth={study.depths}", f"branch={SHARES}")
        return
    study.sweep("var", tokens, f"model.depth={study.depths}", f"branch={'1' if given.study == 'emoji' else SHARES}")
    if given.study == "glyphs":  # the noise of a run
        study.sweep("var", tokens, "model.depth=1,2,3", "seed=1,2", f"branch={SHARES}")
    study.fit("var")


if __name__ == "__main__":
    main()

"""The models that are installed with varlab: tokenizer and transformer for glyphs32 and fashion32, trained on two CPU cores,
scored by a classifier of the same data, exported. Finished steps are skipped; an interrupted run continues.

    python experiments/data/glyphs.py && python experiments/pretrained/run.py glyphs32
    python experiments/data/fashion.py && python experiments/pretrained/run.py fashion32
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varlab import image_grid
from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.load import PRETRAINED, load
from varlab.files import save_json
from varlab.pipeline import VARPipeline
from varlab.sampling.generate import decode, generate, generate_scales
from varlab.sampling.token_sampling import SamplingSettings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "data"))
from scores import Judge  # noqa: E402
from steps import finished, varlab, write_table  # noqa: E402

GUIDANCE, SHOWN = (0.0, 1.5, 3.0), 1.5


@dataclass(frozen=True)
class Model:
    """What a model is trained on, and for how long."""

    data: str
    tokenizer: list[str]
    var: list[str]
    per_class: int  # samples per class that are scored
    columns: int  # of the figure


MODELS = {
    "glyphs32": Model("letters and digits of 3,761 faces of free fonts in Debian's packages", [], [], 16, 13),
    "fashion32": Model(
        "Fashion-MNIST (Xiao et al. 2017, MIT license), 60,000 photographs",
        ["steps=4000", "val_every=1000"], ["model.width=128"], 100, 10,
    ),
}  # fmt: skip


def train(name: str, experiment: str, run: str, *settings: str) -> Path:
    """Trains, unless finished; returns the checkpoint."""
    folder = Path("runs") / name / run
    if not finished(folder):
        shared = [f"name={name}/{run}", "trainer=cpu", "trainer.precision=bf16-mixed", "logger=csv", "ckpt_path=last"]
        varlab("train", f"experiment={experiment}", *shared, *settings)
    return folder / "checkpoints/last.ckpt"


def draw_figures(name: str, columns: int, **settings: Any) -> None:
    """Samples of all classes (without digits, where there are letters) and how six of them form, with the installed model."""
    pipeline = VARPipeline.from_pretrained(name, device="cpu")
    numbers = [number for number, label in enumerate(pipeline.class_names) if not label.isdigit()]
    labels = torch.tensor(numbers * (8 * columns // len(numbers)))
    images = generate(pipeline.var, pipeline.tokenizer, labels, seed=0, **settings)
    image_grid.save(image_grid.grid(images, columns=columns, min_side=64), HERE / f"{name}.png")
    scales = generate_scales(pipeline.var, pipeline.tokenizer, labels[:6], SamplingSettings(**settings), seed=0)
    columns_of_scales = [decode(pipeline.tokenizer, f_hat) for f_hat, _ in scales]
    strips = image_grid.grid(image_grid.columns_of(*columns_of_scales), columns=len(columns_of_scales), min_side=64)
    image_grid.save(strips, HERE / f"{name}-scales.png")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        sys.exit(f"give one of {', '.join(MODELS)}")
    name = sys.argv[1]
    model, runs, judge = MODELS[name], Path("runs") / name, Judge(Path("data") / name)
    if not (judge.shards / "manifest.json").is_file():
        sys.exit(f"{judge.shards} does not exist: run experiments/data/{name.removesuffix('32')}.py first")
    tokenizer = train(name, "tokenizer_glyphs32", "tokenizer", f"data.path={judge.shards}", *model.tokenizer)
    tokens = runs / "tokens"
    if not (tokens / "manifest.json").is_file():
        varlab("tokenize", f"tokenizer={tokenizer}", f"shards={judge.shards}", f"out={tokens}", "resize_ratio=1.0")
    checkpoint = train(name, "var_glyphs32", "var", f"tokenizer={tokenizer}", f"data.path={tokens}", *model.var)
    reconstructions = judge.of_reconstructions(tokenizer, HERE / f"{name}-reconstructions.png")
    save_json(HERE / f"{name}-reconstructions.json", reconstructions)
    rows = []
    for scale in GUIDANCE:
        settings = {"cfg_scale": scale, "cfg_schedule": "constant", "top_p": 0.97}
        rows.append(judge.of_samples(checkpoint, runs / f"samples-{scale:g}", model.per_class, **settings))
        print(json.dumps(rows[-1]), flush=True)
    write_table(HERE / f"{name}-samples.csv", rows)
    run = json.loads((runs / "var/run.json").read_text())
    facts = {
        "trained on": model.data,
        "reconstructions of held-out images": f"{reconstructions['psnr']:.1f} dB PSNR; a classifier of the same data reads"
        f" {reconstructions['accuracy_reconstruction']:.1f} % of them right, and {reconstructions['accuracy_original']:.1f} %"
        " of the originals",
        "validation loss": f"{run['val_loss']:.3f} nats per token",
        "samples with cfg_schedule=constant top_p=0.97": "; ".join(
            f"cfg_scale={row['cfg_scale']:g}: {row['class_agreement']:.1f} % are read as the requested class"
            for row in rows
        ),
        "license of the weights": "MIT",
    }
    shutil.rmtree(PRETRAINED / name, ignore_errors=True)
    save_pretrained(PRETRAINED / name, *load(checkpoint), facts, dtype=torch.bfloat16)
    draw_figures(name, model.columns, cfg_scale=SHOWN, cfg_schedule="constant", top_p=0.97)


if __name__ == "__main__":
    main()

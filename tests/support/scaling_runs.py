"""Synthetic runs of a sweep with a known scaling law."""

import json

import numpy as np

from support.runs import config
from varlab.commands import scaling
from varlab.cost.flops import parameter_counts, training_flops


def sizes(depth):
    return {
        "depth": depth, "width": 64 * depth, "num_heads": depth, "patch_nums": [1, 2], "codebook_size": 512, "codebook_dim": 8,
        "num_classes": 10, "mlp_ratio": 4.0, "drop_path": 0.0, "label_dropout": 0.1, "shared_adaln": False, "qk_norm": True,
    }  # fmt: skip


def surface(size, images):
    """The truth of the synthetic runs: E 2, alpha 0.3, beta 0.4."""
    return 2 + (1e6 / size) ** 0.3 + (3e3 / images) ** 0.4


def make_row(depth, images=38400, **changes):
    size = parameter_counts(sizes(depth))["params_main"]
    loss = float(surface(size, images))
    row = {
        "run_id": f"d{depth}-{images}", "name": f"d{depth}-{images}", "kind": "var", "state": "finished", "depth": depth,
        "width": 64 * depth, "sizes": sizes(depth), "step": 10, "params_main": size, "images_seen": images, "unique_images": 10**6,
        "flops_exact": training_flops(sizes(depth)) * images, "tokenizer_id": "t", "dataset_id": "d", "patch_nums": [1, 2],
        "order": "scales", "val_loss": loss, "val_loss_last": loss + 0.1, "val_err": 80 - depth, "val_err_last": 82 - depth,
        "val_loss_scale_00": loss - 0.1, "val_loss_scale_01": loss + 0.1, "parent_run": f"d{depth}",
    }  # fmt: skip
    return {**row, **changes}


def make_runs(folder, depths=(1, 2, 3, 4), budgets=(38400,), noise=0.0, **changes):
    """`changes` are those of the first run."""
    rng, first = np.random.default_rng(0), True
    for depth in depths:
        for images in budgets:
            row = make_row(depth, images, **(changes if first else {}))
            for key in ("val_loss", "val_loss_last"):
                row[key] *= float(np.exp(rng.normal(0, noise)))
            first = False
            (folder / row["name"]).mkdir(parents=True)
            (folder / row["name"] / "run.json").write_text(json.dumps(row))
            log = "step,train/loss,val/loss,val/loss_last,val/err,count/images_seen,count/flops_exact,lr\n"
            losses = f"{row['val_loss'] + 0.1},{row['val_loss']},{row['val_loss_last']}"
            for share in (0.5, 1.0):
                log += f"{share * 10:.0f},{losses},80,{images * share},{row['flops_exact'] * share},0.1\n"
            (folder / row["name"] / "metrics.csv").write_text(log)


def scale(folder, source, *overrides):
    given = [f"source={source}", f"out={folder / 'fit'}", "bootstraps=50"]
    scaling.run(config(folder, *given, *overrides, verb="scaling"))


def noisy_run(seed: int, offset: float = 0.0, from_step: int = 0) -> dict[str, dict[int, float]]:
    """A falling loss and a gradient norm, noisy; the loss lies off from some step on."""
    random = np.random.default_rng(seed)
    level = 0.02 * random.standard_normal()
    steps = range(0, 2000, 10)
    loss = {
        i: 5 * (i + 50) ** -0.2 + level + 0.02 * random.standard_normal() + offset * (i >= from_step) for i in steps
    }
    return {"train/loss": loss, "train/grad_norm": {i: 1 + 0.1 * random.standard_normal() for i in steps}}

"""Makes the reference curves of `varlab doctor`: trains each experiment of the demo with four seeds, three of which
give the band; the fourth tests it.

    make demo && python experiments/reference/make.py      (about a quarter of an hour on two CPU cores)
"""

import platform
import sys
import time
from pathlib import Path

import torch

from varlab.files import read_curves
from varlab.training.reference_curves import band, compare_to_bands, read_band, settings_of, write_band

HERE, RUNS = Path(__file__).parent, Path("runs/reference")
sys.path.insert(0, str(HERE.parent))
from steps import finished, varlab  # noqa: E402

DEMO = Path("runs/demo")
SEEDS, HELD_OUT = [0, 1, 2], 3
EXPERIMENTS = {
    "tokenizer_tiny": [f"data.path={DEMO}/shards"],
    "var_digits": [f"data.path={DEMO}/tokens", f"tokenizer={DEMO}/tokenizer/checkpoints/last.ckpt"],
}


def curves_of(experiment: str, seed: int) -> dict[str, dict[int, float]]:
    """The curves of a run, trained unless it is already finished."""
    folder = RUNS / f"{experiment}-{seed}"
    if not finished(folder):
        command = [
            f"experiment={experiment}",
            f"name=reference/{folder.name}",
            f"seed={seed}",
            *EXPERIMENTS[experiment],
        ]
        command += ["logger=csv", "ckpt_path=last", "callbacks.pictures=null"]
        varlab("train", *command)
    return read_curves(folder / "metrics.csv")


def main() -> None:
    for experiment in EXPERIMENTS:
        runs = [curves_of(experiment, seed) for seed in SEEDS]
        facts = {
            "experiment": experiment,
            "seeds": SEEDS,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU cores",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "settings": settings_of(RUNS / f"{experiment}-{SEEDS[0]}"),
        }
        write_band(HERE / f"{experiment}.csv", band(runs), facts)
        comparisons = compare_to_bands(curves_of(experiment, HELD_OUT), read_band(HERE / f"{experiment}.csv"))
        out = {
            comparison.metric: round(comparison.share_inside, 2)
            for comparison in comparisons
            if not comparison.is_normal
        }
        print(
            f"{experiment}: seed {HELD_OUT} is in the band for {len(comparisons) - len(out)} of {len(comparisons)} metrics; outside: {out}"
        )


if __name__ == "__main__":
    main()

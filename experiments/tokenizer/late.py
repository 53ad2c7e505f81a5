"""Does a discriminator help that comes in late? A tokenizer with perceptual loss, k-means initialization and revival is trained on
emoji64 as long as those of run.py, then for a fifth more with and without a discriminator, from the same weights.
Finished steps are skipped; an interrupted run continues.

    python experiments/tokenizer/prepare.py && python experiments/tokenizer/late.py        (an hour on one core)

Writes late.csv and late.png beside this file.
"""

from run import (
    ADVERSARIAL,
    ARMS,
    HERE,
    PERCEPTUAL,
    RUNS,
    check_data,
    draw_reconstructions,
    train_and_score,
    write_scores,
)

from varlab import image_grid

STEPS = 1500
CONTINUED = [
    *PERCEPTUAL,
    f"module.init_from={RUNS / 'long/checkpoints/last.ckpt'}",
    f"steps={STEPS // 5}",
    "module.base_lr=2.4e-3",  # where the first run ended
    f"val_every={STEPS // 10}",
]
LATE = {
    "long": [*PERCEPTUAL, *ARMS["kmeans_revive"], f"steps={STEPS}", f"val_every={STEPS // 3}"],
    "long_continued": CONTINUED,
    "long_adversarial": [*CONTINUED, *ADVERSARIAL, "adversarial.discriminator_start=0"],
}


def main() -> None:
    check_data()
    write_scores(HERE / "late.csv", {arm: train_and_score(arm, settings) for arm, settings in LATE.items()})
    image_grid.save(draw_reconstructions(list(LATE)), HERE / "late.png")


if __name__ == "__main__":
    main()

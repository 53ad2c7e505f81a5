"""The tokenizers of the five codes on emoji64, with 2^9 codes each and everything else as in experiments/tokenizer. Finished steps are
skipped; an interrupted run continues.

    python experiments/tokenizer/prepare.py && python experiments/codes/emoji.py          (two CPU cores: an hour; not run yet)
    python experiments/codes/emoji.py bsq fsq                  (trains these only, beside another process)

Writes emoji.csv and emoji.png beside this file.
"""

import sys
from pathlib import Path

from varlab import image_grid

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent / "tokenizer")  # its run.py, not the one beside this file
import run as study  # noqa: E402

CODES = {
    "residual": ["quantizer@model.quantizer=residual_512", *study.ARMS["kmeans_revive"]],
    "simvq": ["quantizer@model.quantizer=simvq", "model.quantizer.codebook_size=512"],
    "fsq": ["quantizer@model.quantizer=fsq", "model.quantizer.levels=[8,8,8]"],
    "bsq": ["quantizer@model.quantizer=bsq", "model.quantizer.bits=9"],
    "lfq": ["quantizer@model.quantizer=lfq", "model.quantizer.bits=9"],
}


def main() -> None:
    chosen = sys.argv[1:] or list(CODES)
    study.check_data()
    found = {code: study.train_and_score(f"codes_{code}", CODES[code]) for code in chosen}
    if chosen == list(CODES):
        study.write_scores(HERE / "emoji.csv", found)
        image_grid.save(study.draw_reconstructions([f"codes_{code}" for code in CODES]), HERE / "emoji.png")


if __name__ == "__main__":
    main()

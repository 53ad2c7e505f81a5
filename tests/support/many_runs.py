"""Several training runs, one after another in the same processes: torchrun -m support.many_runs FILE.

FILE is JSON: a list of [folder, overrides...]. Writes FILE.RANK: for each, null or what went wrong.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from support.runs import fit


def main() -> None:
    """Makes the runs."""
    outcomes = []
    for folder, *overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            fit(Path(folder), *overrides)
            outcomes.append(None)
        except Exception:
            outcomes.append(traceback.format_exc())
    Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`varlab scaling`: runs -> table, power laws with intervals, figure."""

from pathlib import Path

from omegaconf import DictConfig

from varlab.config import verb

PUBLISHED = {
    ("val_loss", "params_main"): 0.20,
    ("val_loss_last", "params_main"): 0.23,
    ("val_err", "params_main"): 0.010,
    ("val_err_last", "params_main"): 0.016,
}


def run(cfg: DictConfig) -> None:
    """Fits loss and error against parameters and compute; prints exponents beside the paper's."""
    from dataclasses import asdict

    from varlab.files import save_json
    from varlab.scaling.fit import fit
    from varlab.scaling.plot import figure, words
    from varlab.scaling.runs import check_same, finished, read_runs, write_csv

    loss_floor = floor_of(cfg.floor)
    out = Path(cfg.out)
    rows, left_out = finished(read_runs(Path(cfg.source)))
    for row in left_out:
        print(f"left out: {row['name']} (depth {row['depth']}, {row['state']} at step {row['step']})")
    check_same(rows)
    write_csv(rows, out / "runs.csv")
    laws = {}
    for x in ("params_main", "flops_exact"):
        for y in ("val_loss", "val_loss_last", "val_err", "val_err_last"):
            floor = loss_floor if "loss" in y else 0.0
            laws[y, x] = fit([row[x] for row in rows], [row[y] for row in rows], floor, cfg.bootstraps, cfg.seed)
    files = figure(rows, laws, out)
    print(f"{len(rows)} runs, depths {sorted({row['depth'] for row in rows})}; one row each in {out / 'runs.csv'}")
    for (y, x), law in laws.items():
        paper = f"   [paper, ImageNet 256: {PUBLISHED[y, x]}]" if (y, x) in PUBLISHED else ""
        print(f"  {y:14} against {x:12} {words(law)}, r {law.r:.3f}{paper}")
    print(
        "The paper's exponents belong to reducible losses (floors 5 and 4.5 nats) of ImageNet runs; they are no target here."
    )
    save_json(out / "fits.json", [{"y": y, "x": x, **asdict(law)} for (y, x), law in laws.items()])
    print(f"figure: {', '.join(str(file) for file in files)}")


def floor_of(setting: str | float) -> float | None:
    """None for `fitted`, 0 for `none`, else the number given in nats."""
    named = {"fitted": None, "none": 0.0}
    if setting in named:
        return named[setting]  # pyright: ignore[reportArgumentType]
    try:
        return float(setting)
    except ValueError:
        raise ValueError(f"floor={setting!r}: choose none, fitted, or a number in nats") from None


main = verb("scaling")(run)

if __name__ == "__main__":
    main()

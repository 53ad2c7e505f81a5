"""`varlab scaling`: runs -> tables, power laws with intervals, figures, report; and answers from the fits."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from varlab.config import hydra_command

ASKS = ("predict", "optimal", "compare", "next")
PUBLISHED = {
    ("val_loss", "params_main"): 0.20,
    ("val_loss_last", "params_main"): 0.23,
    ("val_err", "params_main"): 0.010,
    ("val_err_last", "params_main"): 0.016,
}


def run(cfg: DictConfig) -> None:
    """Collects runs, fits, plots and reports; with `ask`, answers one question instead."""
    from varlab.scaling.analysis import analyse
    from varlab.scaling.predict import Limits, answer

    check(cfg)
    if cfg.ask == "compare" and (cfg.a is not None or cfg.b is not None):
        compare_recipes(cfg)
        return
    if cfg.source is None:
        raise ValueError("source=RUNS is missing: a folder of runs, a table, or wandb:ENTITY/PROJECT")
    runs = collected(cfg, cfg.source)
    for line in runs.left_out:
        print(line)
    if cfg.ask is not None:
        given: dict[str, Any] = {key: cfg[key] for key in ("depth", "images", "n", "d", "compute", "run")}
        analysis = analyse(runs, settings_of(cfg), is_loss_enough=True)
        for row, reason in analysis.outliers:
            print(f"outlier: {row['name']}, {reason} (outliers={cfg.outliers})")
        print("\n".join(answer(analysis, cfg.ask, given, Limits(float(cfg.max_extrapolation), cfg.force))))
        return
    report(cfg, analyse(runs, settings_of(cfg)))


def check(cfg: DictConfig) -> None:
    """Raises ValueError for a setting out of range."""
    choices = {"unfinished": ("leave_out", "use"), "report": ("html", "wandb"), "outliers": ("leave_out", "keep")}
    for name, allowed in choices.items():
        if cfg[name] not in allowed:
            raise ValueError(f"{name}={cfg[name]!r}: choose {' or '.join(allowed)}")
    for name, least in (("bootstraps", 0), ("seed", 0)):
        if not isinstance(cfg[name], int) or cfg[name] < least:
            raise ValueError(f"{name}={cfg[name]!r}: must be a whole number, at least {least}")
    if 0 < cfg.bootstraps < 20:
        raise ValueError(f"bootstraps={cfg.bootstraps}: an interval needs at least 20 draws; 0 gives none")
    if cfg.order not in ("scales", "raster"):
        raise ValueError(f"order={cfg.order!r}: choose scales or raster")
    if cfg.columns is not None and not isinstance(cfg.columns, DictConfig):
        raise ValueError(f"columns={cfg.columns!r}: give names as in columns={{params: N, tokens: D, loss: L}}")
    if not isinstance(cfg.repeated, bool) and not (isinstance(cfg.repeated, int | float) and cfg.repeated > 0):
        raise ValueError(f"repeated={cfg.repeated!r}: choose false, true, or R* as a number above 0")
    if not isinstance(cfg.max_extrapolation, int | float) or not cfg.max_extrapolation >= 1:
        raise ValueError(f"max_extrapolation={cfg.max_extrapolation}: must be at least 1")


def settings_of(cfg: DictConfig) -> Any:
    """The settings of the fits."""
    from varlab.scaling.analysis import FitSettings, parse_floor
    from varlab.scaling.parametric import parse_form

    floor = parse_floor(cfg.floor)
    form = parse_form(cfg.form, floor)
    return FitSettings(floor, form, cfg.repeated, cfg.bootstraps, cfg.seed, cfg.outliers, cfg.intermediate)


def collected(cfg: DictConfig, source: Any) -> Any:
    """The runs of one source, or of a list of sources."""
    from varlab.scaling.runs import collect

    sources = [str(one) for one in source] if isinstance(source, ListConfig) else [str(source)]
    return collect(sources, cfg.unfinished == "use", cfg.order, dict(cfg.columns or {}))


def compare_recipes(cfg: DictConfig) -> None:
    """Prints how much compute recipe `a` saves over recipe `b`, and with `out` draws it."""
    from varlab.files import save_json
    from varlab.scaling.analysis import analyse
    from varlab.scaling.plot import STYLE, recipes_panels, save
    from varlab.scaling.recipes import multiplier

    if cfg.a is None or cfg.b is None:
        raise ValueError("compare needs a=RUNS and b=RUNS, the two recipes (or source=RUNS run=NAME)")
    first, second = (
        analyse(collected(cfg, source), settings_of(cfg), is_loss_enough=True) for source in (cfg.a, cfg.b)
    )
    for source, one in ((cfg.a, first), (cfg.b, second)):
        for line in [*one.runs.left_out, *[f"outlier: {row['name']}, {reason}" for row, reason in one.outliers]]:
            print(f"{source}: {line}")
    found = multiplier(first, second)
    print(found.sentence(str(cfg.a), str(cfg.b)))
    if cfg.out is not None:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            save(recipes_panels(found, str(cfg.a), str(cfg.b)), Path(cfg.out), "recipes")
        told = {
            "multiplier": found.value,
            "interval": found.interval,
            "is_paired": found.is_paired,
            "by_pair": found.by_pair,
        }
        save_json(Path(cfg.out) / "recipes.json", {"a": str(cfg.a), "b": str(cfg.b), **told, "runs": found.num_runs})
        print(f"{cfg.out}: recipes.json, recipes.png (svg, pdf)")


def report(cfg: DictConfig, analysis: Any) -> None:
    """Writes tables, fits, figures and reports."""
    from varlab.scaling.plot import captions, figures
    from varlab.scaling.record import is_own, write_json
    from varlab.scaling.report import summary_lines, write_reports
    from varlab.scaling.tables import write_csv

    if cfg.out is None:
        raise ValueError("out=FOLDER is missing: the folder for tables, figures and report")
    out = Path(cfg.out)
    write_csv(analysis.runs.rows, out / "runs.csv")
    write_csv(analysis.runs.curves, out / "curves.csv")
    write_json(analysis, out / "fits.json")
    plotted = figures(analysis, out, cfg.published)
    page = write_reports(analysis, plotted, captions(analysis), out, cfg.title)
    print("\n".join(summary_lines(analysis)))
    published = {
        key: exponent for key, exponent in PUBLISHED.items() if key in analysis.laws and is_own(analysis.runs.rows)
    }
    for (y, x), exponent in published.items():
        print(f"  {y} against {x}: {analysis.laws[y, x].alpha:.3f}   [paper, ImageNet 256: {exponent}]")
    if published:
        print(
            "The paper's exponents are for reducible losses (floors 5 and 4.5 nats) of ImageNet runs; other data gives other exponents."
        )
    drawn = ", ".join(f"{name}.png" for name in plotted)
    print(f"{out}: runs.csv, curves.csv, fits.json, report.html, report.md, captions.md, {drawn} (svg, pdf)")
    if cfg.report == "wandb":
        publish(analysis, cfg, page)


def publish(analysis: Any, cfg: DictConfig, page: Path) -> None:
    """Saves report and workspace to W&B; without a login, prints the path of the HTML report instead."""
    from varlab.scaling.report import wandb_report, wandb_workspace
    from varlab.training.loggers import has_wandb_login

    if not has_wandb_login():
        print(f"there is no W&B login (wandb login): the same report is {page}")
        return
    if "/" not in str(cfg.project):
        raise ValueError(f"project={cfg.project}: report=wandb needs project=ENTITY/PROJECT")
    entity, project = str(cfg.project).split("/", 1)
    try:
        report = wandb_report(analysis, entity, project, cfg.title)
        report.save()
        workspace = wandb_workspace(entity, project)
        workspace.save()
    except ImportError:
        raise ValueError("report=wandb needs the package wandb-workspaces: pip install 'varlab[report]'") from None
    print(f"W&B report: {report.url}\nW&B workspace: {workspace.url}")


start = hydra_command("scaling")(run)


def main() -> None:
    """`varlab scaling QUESTION ...` is short for `varlab scaling ask=QUESTION ...`."""
    if len(sys.argv) > 1 and sys.argv[1] in ASKS:
        sys.argv[1] = f"ask={sys.argv[1]}"
    start()


if __name__ == "__main__":
    main()

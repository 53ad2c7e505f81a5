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
    from varlab.files import save_json
    from varlab.scaling.analysis import FitSettings, analyse, parse_floor
    from varlab.scaling.parametric import parse_form
    from varlab.scaling.plot import figures
    from varlab.scaling.predict import answer
    from varlab.scaling.report import summary_lines, write_html
    from varlab.scaling.runs import collect, write_csv

    if cfg.unfinished not in ("leave_out", "use"):
        raise ValueError(f"unfinished={cfg.unfinished!r}: choose leave_out or use")
    if cfg.report not in ("html", "wandb"):
        raise ValueError(f"report={cfg.report!r}: choose html or wandb")
    floor = parse_floor(cfg.floor)
    settings = FitSettings(floor, parse_form(cfg.form, floor), cfg.repeated, cfg.bootstraps, cfg.seed)
    sources = list(cfg.source) if isinstance(cfg.source, ListConfig) else [cfg.source]
    runs = collect([str(source) for source in sources], cfg.unfinished == "use", cfg.order)
    for line in runs.left_out:
        print(line)
    analysis = analyse(runs, settings)
    if cfg.ask is not None:
        given: dict[str, Any] = {key: cfg[key] for key in ("depth", "images", "compute", "run")}
        print("\n".join(answer(analysis, cfg.ask, given)))
        return
    if cfg.out is None:
        raise ValueError("out=FOLDER is missing: the folder for tables, figures and report")
    out = Path(cfg.out)
    write_csv(runs.rows, out / "runs.csv")
    write_csv(runs.curves, out / "curves.csv")
    save_json(out / "fits.json", analysis.as_json())
    plotted = figures(analysis, out, cfg.published)
    page = write_html(analysis, plotted, out, cfg.title)
    print("\n".join(summary_lines(analysis)))
    for (y, x), exponent in PUBLISHED.items():
        if (y, x) in analysis.laws:
            print(f"  {y} against {x}: {analysis.laws[y, x].alpha:.3f}   [paper, ImageNet 256: {exponent}]")
    print(
        "The paper's exponents are for reducible losses (floors 5 and 4.5 nats) of ImageNet runs; other data gives other exponents."
    )
    print(
        f"{out}: runs.csv, curves.csv, fits.json, report.html, {', '.join(f'{name}.png' for name in plotted)} (svg, pdf)"
    )
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

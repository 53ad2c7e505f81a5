"""results.csv as a figure and as the table in README.md, between its two markers.

python experiments/performance/show.py [FILE.csv]
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by bench.py -->", "<!-- end of results -->"
COLOURS = {"released": "#888888", "varlab, masked": "#9ecae1", "varlab": "#3182bd", "varlab, compiled": "#08519c"}
HEADER = (
    "| work | code | | seconds | spread | ratio | ratio in the same precision | per second | of matmul rate | of copy rate | peak, GB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def percent(share: str) -> str:
    """0.62 -> 62 %."""
    return f"{100 * float(share):.0f} %" if share else ""


def work_of(row: dict[str, str]) -> tuple[str, str, str]:
    """What is compared like for like."""
    return row["what"], row["network"], row["precision"]


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table, below a sentence about the ceilings."""
    ceilings = {row["network"]: float(row["per_second"]) for row in rows if row["what"] == "ceiling"}
    products = ", ".join(
        f"{name.removeprefix('matrix product, ')} {rate / 1e9:,.0f} GFLOP/s"
        for name, rate in ceilings.items()
        if name != "copy"
    )
    first = rows[0]
    head = (
        f"{first['machine']}, torch {first['torch']}, {first['date']}. Ceilings measured in the same run: matrix product {products};"
        f" copy {ceilings['copy'] / 1e9:,.1f} GB/s.\n\n"
    )
    theirs = {work_of(row): float(row["seconds"]) for row in rows if row["code"] == "released"}
    like = {work: [row for row in rows if work_of(row) == work] for work in theirs}
    same = {id(row): f"{seconds / float(row['seconds']):.2f}" for work, seconds in theirs.items() for row in like[work]}
    lines = []
    for row in rows:
        if row["what"] in ("ceiling", "start"):
            continue
        cells = [
            f"{row['what']}: {row['network']}",
            row["code"],
            row["precision"],
            row["seconds"],
            percent(row["spread"]),
        ]
        cells += [row["ratio"], same.get(id(row), ""), f"{row['per_second']} {row['unit']}"]
        cells += [percent(row["share_of_matmul"]), percent(row["share_of_copy"]), row["peak_gb"]]
        lines.append(f"| {' | '.join(cells)} |")
    starts = "; ".join(f"`{row['network']}` {row['seconds']} s" for row in rows if row["what"] == "start")
    return head + "\n".join([HEADER, *lines]) + (f"\n\nFrom the shell to the end: {starts}.\n" if starts else "\n")


def draw(rows: list[dict[str, str]], file: Path) -> None:
    """Plots bars of the ratios to the reference, and the percentage of the matmul rate that each reaches."""
    shown = [row for row in rows if row["ratio"] and row["code"] in COLOURS]
    works = list(dict.fromkeys((row["what"], row["network"]) for row in shown))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.9 + 0.24 * len(shown)), sharey=True, layout="constrained", width_ratios=[3, 2]
    )
    place, ticks = 0.0, []
    for work in works:
        own = [row for row in shown if (row["what"], row["network"]) == work]
        for row in own:
            ratio, is_bf16 = float(row["ratio"]), row["precision"] == "bf16"
            colour = COLOURS[row["code"]]
            left.barh(place, ratio, color=colour, height=0.85, hatch="//" if is_bf16 else None, edgecolor="white")
            left.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
            if row["share_of_matmul"]:
                share = 100 * float(row["share_of_matmul"])
                right.barh(place, share, color=colour, height=0.85, hatch="//" if is_bf16 else None, edgecolor="white")
            place += 1
        ticks.append((place - (len(own) + 1) / 2, f"{work[0]}\n{work[1]}"))
        place += 0.8
    left.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("times as fast as the released code")
    right.set_xlabel("percent of the matmul rate of the precision")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="#bbbbbb", hatch="//", edgecolor="white"))
    figure.legend(handles, [*COLOURS, "hatched: bf16"], loc="outside lower center", ncol=5, fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def show(file: Path) -> None:
    """Writes a figure next to the CSV, and the table: into README.md for results.csv, else to stdout."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    draw(rows, file.with_suffix(".png"))
    readme = HERE / "README.md"
    text = readme.read_text()
    if file.resolve() == (HERE / "results.csv").resolve():
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{table(rows)}{END}{after}")
    else:
        print(table(rows))


if __name__ == "__main__":
    show(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.csv")

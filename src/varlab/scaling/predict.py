"""Answers from the fits: the loss of the next size, the best use of a compute budget, how far a run is from the fit of
the others, which run would narrow the prediction interval most. Every answer knows how far the fits reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from varlab.cost.flops import parameter_counts, training_flops
from varlab.scaling.analysis import COMPUTE, SIZE, Analysis, Surface, run_of
from varlab.scaling.parametric import evaluate, fit_parametric
from varlab.scaling.power_law import fit
from varlab.scaling.runs import Row, is_positive, loss_words

Answer = tuple[str, float, tuple[float, float] | None]  # law, loss, 95 % interval
DEPTHS = range(1, 129)
MAX_SEEDS = 8  # runs of one size that `next` weighs against one of another
SIMILAR = 1.1  # factor in images within which L(N) has a say beside L(N, D)


@dataclass(frozen=True)
class Limits:
    """How far answers may reach: beyond the fitted range by this factor at most, unless `force`."""

    factor: float | int = 10.0
    force: bool = False


@dataclass(frozen=True)
class Candidate:
    """A possible addition to the sweep: runs of one size and length that differ in their seed, their cost in FLOP
    together, and the width of the target's prediction interval after them relative to now."""

    size: float | int
    images: float | int
    seeds: int
    flops: float | int
    narrowing: float


def rule_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Sizes of the largest network, if all runs have one ratio of width to depth, from which other depths follow."""
    known = [row for row in rows if row.get("depth") and row.get("width") and isinstance(row.get("sizes"), dict)]
    if len(known) < len(rows) or len({row["width"] / row["depth"] for row in rows}) > 1:
        return None
    return max(known, key=lambda row: row["depth"])["sizes"]


def sizes_of(rows: Sequence[Row], depth: int) -> dict[str, Any]:
    """Sizes of a network of another depth, by the rule that the runs follow (width proportional to depth).

    Raises ValueError if they follow no such rule.
    """
    rule = rule_of(rows)
    if rule is None:
        raise ValueError(
            f"depth={depth}: the runs do not have one ratio of width to depth, or do not name them, so the size of other"
            " depths is not known: give the number of parameters instead, as in n=1e9"
        )
    return {**rule, "depth": depth, "width": rule["width"] // rule["depth"] * depth, "num_heads": depth}


def size_of(rows: Sequence[Row], depth: int) -> int:
    """N, the parameters of the blocks."""
    return parameter_counts(sizes_of(rows, depth))[SIZE]


def flops_of(rows: Sequence[Row], size: float | int) -> float:
    """Training FLOPs per image (or token) of a size: exact for a depth of the runs' rule, else by a smooth curve through
    the sizes of the runs, and proportional to N outside of them."""
    rule = rule_of(rows)
    if rule is not None:
        for depth in DEPTHS:
            if size_of(rows, depth) == size:
                return float(training_flops(sizes_of(rows, depth)))
    sizes = np.log([row[SIZE] for row in rows])
    ratios = np.log([row[COMPUTE] / row["images_seen"] / row[SIZE] for row in rows])  # 6 where C is 6 N D
    inside = np.clip(np.log(size), sizes.min(), sizes.max()) - sizes.mean()
    order = min(2, len(np.unique(sizes)) - 1) if np.ptp(ratios) > 0.05 else 0
    return float(size * np.exp(np.polyval(np.polyfit(sizes - sizes.mean(), ratios, order), inside)))


def choices(rows: Sequence[Row]) -> np.ndarray:
    """The sizes to choose from: those of all depths if the runs follow a rule, else a fine grid."""
    if rule_of(rows) is not None:
        return np.array([size_of(rows, depth) for depth in DEPTHS], dtype=float)
    sizes = [row[SIZE] for row in rows]
    return np.geomspace(min(sizes) / 1e3, max(sizes) * 1e3, 1201)


def named(rows: Sequence[Row], size: float | int) -> str:
    """A size for display: its depth, if the runs follow a rule, and its number of parameters."""
    depth = (
        next((depth for depth in DEPTHS if size_of(rows, depth) == size), None) if rule_of(rows) is not None else None
    )
    return f"depth {depth} ({size / 1e6:,.3g} M parameters in blocks)" if depth else f"N {size:.4g}"


def surface_of(analysis: Analysis) -> Surface:
    """L(N, D). Raises ValueError if it could not be fitted."""
    if analysis.surface is None:
        raise ValueError(next(line for line in analysis.missing if line.startswith("L(N, D)")))
    return analysis.surface


def unique_of(rows: Sequence[Row]) -> float | None:
    """The largest number of different images that a run could see; None if it is not known."""
    return max((float(row["unique_images"]) for row in rows if row.get("unique_images")), default=None)


def beyond(
    analysis: Analysis, limits: Limits, size: float | int, images: float | int, compute: float | int
) -> list[str]:
    """How an answer reaches farther than the fit, as text."""
    rows, found = analysis.runs.rows, []
    for name, value, values in (
        ("N", size, [row[SIZE] for row in rows]),
        (analysis.runs.counts, images, [row["images_seen"] for row in rows]),
        ("C", compute, [row[COMPUTE] for row in rows]),
        (f"{analysis.runs.counts} / N", images / size, [row["images_seen"] / row[SIZE] for row in rows]),
    ):
        for reach, word, end in (
            (value / max(values), "above the most", max(values)),
            (min(values) / value, "below the least", min(values)),
        ):
            if reach > limits.factor:
                times = f"{reach:,.0f}" if reach >= 100 else f"{reach:.3g}"
                found.append(
                    f"{name} {value:.3g} is {times} times {word} in the fit, {end:.3g} (limit {limits.factor:g} times)"
                )
    unique = unique_of(rows)
    is_discounted = analysis.surface is not None and analysis.surface.repeat_decay is not None
    if unique is not None and images > unique * 1.001 and not is_discounted:
        found.append(
            f"{images:,.0f} images are more than the {unique:,.0f} different ones that there are: repeats are worth less than new"
            " images (repeated=true)"
        )
    return found


def refuse(reasons: Sequence[str], limits: Limits) -> list[str]:
    """The reasons as warnings with `force`. Raises ValueError with them without it."""
    if reasons and not limits.force:
        raise ValueError(f"no answer: {'; '.join(reasons)} (force=true answers all the same)")
    return [f"warning: {reason}" for reason in reasons]


def interval_words(interval: tuple[float, float] | None) -> str:
    """A 95 % interval for display."""
    return "no interval" if interval is None else f"95 %: {loss_words(interval[0])} to {loss_words(interval[1])}"


def predict(
    analysis: Analysis, size: float | int, images: float | int | None = None, limits: Limits | None = None
) -> list[str]:
    """The loss of a size after `images`; by default, after the number that L(N) was fitted at. Warnings come first. If
    L(N) and L(N, D) contradict each other there, both are given, and no single number. Repeated images are refused
    unless they are discounted."""
    limits, rows, counts = limits or Limits(), analysis.runs.rows, analysis.runs.counts
    law = analysis.laws.get(("val_loss", SIZE))
    at = float(np.mean([row["images_seen"] for row in analysis.fixed])) if analysis.fixed else None
    if images is None and at is None:
        raise ValueError("give images=... (or d=...): the runs of the fit did not see equally many")
    seen = float(images if images is not None else at or 0)
    compute = flops_of(rows, size) * seen
    reasons = beyond(analysis, limits, size, seen, compute)
    repeats = [reason for reason in reasons if "different ones" in reason]
    lines = refuse(repeats, limits) + [f"warning: {reason}" for reason in reasons if reason not in repeats]
    answers: list[Answer] = []
    if analysis.surface is not None:
        surface = analysis.surface
        effective = surface.effective(seen, unique_of(rows))
        lines += [f"warning: {doubt}" for doubt in surface.lack_of_fit]
        answers.append(("L(N, D)", float(surface.law(size, effective)), surface.law.interval(size, effective)))
    if law is not None and at is not None and 1 / SIMILAR < seen / at < SIMILAR:
        answers.append(("L(N)", float(law(size)), law.interval(size)))
    if not answers:
        surface_of(analysis)
        raise ValueError(f"no law reaches {seen:,.0f} {counts}: L(N) is fitted at {at or 0:,.0f}")
    what = f"{named(rows, size)} after {seen:,.0f} {counts}"
    if len(answers) == 2 and contradict(*answers, is_doubted=bool(analysis.surface and analysis.surface.lack_of_fit)):
        lines.append(f"{what}: the laws contradict each other, so there is no single answer")
        lines += [f"  {name}: {loss_words(value)} ({interval_words(interval)})" for name, value, interval in answers]
    else:
        name, value, interval = answers[0]
        lines.append(f"{what}: loss {loss_words(value)} ({interval_words(interval)}) by {name}")
        lines += [
            f"  {name}: {loss_words(value)} ({interval_words(interval)})" for name, value, interval in answers[1:]
        ]
    largest, most = max(row[SIZE] for row in rows), max(row["images_seen"] for row in rows)
    lines.append(
        f"cost: {compute:.3g} FLOP; {size / largest:.3g} times the largest size and {seen / most:.3g} times the most {counts} in the fit"
    )
    return lines


def contradict(first: Answer, second: Answer, is_doubted: bool) -> bool:
    """Whether two laws disagree beyond their intervals: these have no value in common, or, where one of the laws is
    doubted and its interval means little, one's value lies outside of the other's interval."""
    (_, one, a), (_, two, b) = first, second
    if a is None or b is None:
        return False
    apart = a[1] < b[0] or b[1] < a[0]
    return apart or (is_doubted and not (a[0] <= two <= a[1] and b[0] <= one <= b[1]))


@dataclass(frozen=True)
class Optimum:
    """Sizes to choose from with the images and the predicted loss of each at one compute budget; the indices of the best
    size and of the ends of its 95 % interval (None without draws)."""

    sizes: np.ndarray
    images: np.ndarray
    losses: np.ndarray
    best: int
    interval: tuple[int, int] | None


def optimum(analysis: Analysis, compute: float | int) -> Optimum:
    """The size with the lowest predicted loss for a compute budget (FLOP), with the range over the draws and the forms
    that extrapolate about as well. Raises ValueError for a budget below one image."""
    surface, rows = surface_of(analysis), analysis.runs.rows
    sizes = choices(rows)
    images = compute / np.array([flops_of(rows, size) for size in sizes])
    usable = images >= 1
    if not usable.any():
        raise ValueError(f"compute={compute:g} FLOP is less than one image of the smallest network")
    sizes, images, interval = sizes[usable], images[usable], None
    effective = np.array([surface.effective(one, unique_of(rows)) for one in images])
    losses = surface.law(sizes, effective)
    if surface.law.draws is not None:
        found = evaluate(surface.law.draws[:, None, :-1], sizes, effective).argmin(axis=1)
        low, high = (int(i) for i in np.percentile(found, (2.5, 97.5), method="nearest"))
        others = [int(other(sizes, effective).argmin()) for other in surface.law.others]
        interval = (min([low, *others]), max([high, *others]))
    return Optimum(sizes, images, losses, int(losses.argmin()), interval)


def optimal(analysis: Analysis, compute: float | int, limits: Limits | None = None) -> list[str]:
    """Size and images with the lowest predicted loss for a compute budget (FLOP), with their 95 % interval. Raises
    ValueError where the law does not fit or does not reach."""
    limits, rows, counts = limits or Limits(), analysis.runs.rows, analysis.runs.counts
    found = optimum(analysis, compute)
    sizes, images, best = found.sizes, found.images, found.best
    doubts = surface_of(analysis).lack_of_fit
    reasons = [*doubts, *beyond(analysis, limits, float(sizes[best]), float(images[best]), compute)]
    if best in (0, len(sizes) - 1):
        reasons.append("the best size is at the edge of the range that was searched")
    lines = refuse(reasons, limits)
    lines.append(
        f"{compute:.3g} FLOP: {named(rows, sizes[best])}, {images[best]:,.0f} {counts}, loss {loss_words(found.losses[best])}"
    )
    if found.interval is not None:
        low, high = found.interval
        lines.append(
            f"95 % interval: {named(rows, sizes[low])} to {named(rows, sizes[high])}, {images[high]:,.0f} to {images[low]:,.0f} {counts}"
        )
    if rule_of(rows) is not None:
        near = [i for i in (best - 1, best + 1) if 0 <= i < len(sizes)]
        lines += [
            f"  {named(rows, sizes[i])}: {images[i]:,.0f} {counts}, loss {loss_words(found.losses[i])}" for i in near
        ]
    return lines


def compare(analysis: Analysis, run: str) -> list[str]:
    """How far a run is from the fit of all others (L(N, D) if available, otherwise L(N)), in percent and in standard
    deviations of a run."""
    rows = [
        *analysis.runs.rows,
        *[row for row, _ in analysis.outliers if all(row is not one for one in analysis.runs.rows)],
    ]
    chosen = [row for row in rows if run in (row["name"], row.get("run_id"))]
    if not chosen:
        raise ValueError(f"run={run!r} is none of {', '.join(str(row['name']) for row in rows[:20])}")
    surface, settings, lines = analysis.surface, analysis.settings, []
    bootstraps = min(settings.bootstraps, 500)
    for row in chosen:
        if surface is None:
            near = [one for one in analysis.fixed if run_of(one) != run_of(row)]
            if not near or not 1 / SIMILAR < row["images_seen"] / near[0]["images_seen"] < SIMILAR:
                raise ValueError(
                    f"run={run!r} saw {row['images_seen']:,} images, but there is no L(N, D) and no L(N) at this number"
                )
            law = fit([one[SIZE] for one in near], [one["val_loss"] for one in near], settings.floor, bootstraps)
            name, expected, interval, noise = "L(N)", float(law(row[SIZE])), law.interval(row[SIZE]), law.noise
        else:
            kept = [i for i, point in enumerate(surface.points) if run_of(point) != run_of(row)]
            points, images = [surface.points[i] for i in kept], surface.images[kept]
            sizes, loss = [one[SIZE] for one in points], [one["val_loss"] for one in points]
            rest = fit_parametric(sizes, images, loss, surface.law.form, [run_of(one) for one in points], bootstraps)
            seen = surface.effective(row["images_seen"], row.get("unique_images"))
            name, expected, noise = "L(N, D)", float(rest(row[SIZE], seen)), rest.noise
            interval = rest.interval(row[SIZE], seen)
        away = float(np.log(row["val_loss"] / expected))
        verdict = ""
        if interval is not None:
            inside = interval[0] <= row["val_loss"] <= interval[1]
            verdict = f"; {interval_words(interval)}: {'as expected' if inside else 'not as expected'}"
        spread = f", {away / noise:+.1f} standard deviations of a run" if noise > 0 else ""
        lines.append(
            f"{row['name']}: loss {loss_words(row['val_loss'])}, {name} of the others predicts {loss_words(expected)}"
            f" ({100 * away:+.2f} %{spread}){verdict}"
        )
    return lines


def next_runs(
    analysis: Analysis,
    size: float | int | None = None,
    images: float | int | None = None,
    budget: float | int | None = None,
) -> list[Candidate]:
    """What to run for a budget of FLOP (default: twice the most expensive run so far) so that the prediction interval of
    the target (default: twice the largest depth, or eight times the largest N, and twice the most images) becomes
    narrowest; the best first.

    Each candidate spends the budget on one size and length, with as many seeds as it pays for, `MAX_SEEDS` at most. The
    interval has the noise of a further run in it, which no run narrows. Linearized around the fit.
    """
    surface, rows = surface_of(analysis), analysis.runs.rows
    law, rule = surface.law, rule_of(rows)
    most, largest = max(row["images_seen"] for row in rows), max(row[SIZE] for row in rows)
    if rule is not None:
        deepest = max(row["depth"] for row in rows)
        sizes = [float(size_of(rows, depth)) for depth in range(1, 2 * deepest + 1)]
    else:
        sizes = sorted({float(row[SIZE]) for row in rows} | {2.0 * largest, 8.0 * largest})
    target = law.slopes(size or sizes[-1], images or 2 * most)[0]
    budget = budget or 2 * max(row[COMPUTE] for row in rows)
    design = law.slopes([row[SIZE] for row in surface.points], surface.images)
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    covariance = np.linalg.pinv((design / scale).T @ (design / scale), rcond=1e-12)
    target = target / scale
    before = float(target @ covariance @ target)
    found = []
    for new_size in sizes:
        for new_images in (most / 4, most / 2, most, 2 * most):
            flops = flops_of(rows, new_size) * new_images
            seeds = min(int(budget / flops), MAX_SEEDS)
            if seeds < 1:
                continue
            row = law.slopes(new_size, surface.effective(new_images, unique_of(rows)))[0] / scale
            moved = covariance @ row
            after = before - seeds * float(target @ moved) ** 2 / (1 + seeds * float(row @ moved))
            narrowing = float(np.sqrt((1 + max(after, 0.0)) / (1 + before)))
            found.append(Candidate(new_size, new_images, seeds, seeds * flops, narrowing))
    return sorted(found, key=lambda candidate: (round(candidate.narrowing, 3), candidate.flops))


def answer(analysis: Analysis, ask: str, given: dict[str, Any], limits: Limits | None = None) -> list[str]:
    """The lines that answer `predict`, `optimal`, `compare` or `next`. `given`: size by `depth` or `n`, D by `images` or
    `d`, `compute`, `run`. Raises ValueError for an unknown question, a missing setting, and where the fits do not reach."""
    limits, rows = limits or Limits(), analysis.runs.rows
    needed = {"predict": ("depth", "n"), "optimal": ("compute",), "compare": ("run",), "next": ()}
    if ask not in needed:
        raise ValueError(f"{ask!r}: choose predict, optimal, compare or next")
    if needed[ask] and all(given.get(name) is None for name in needed[ask]):
        raise ValueError(f"{ask} needs {'=... or '.join(needed[ask])}=...")
    for first, second in (("depth", "n"), ("images", "d")):
        if given.get(first) is not None and given.get(second) is not None:
            raise ValueError(f"{first}={given[first]} and {second}={given[second]}: give one of them")
    for name in ("depth", "n", "images", "d", "compute"):
        value = given.get(name)
        if value is not None and (not is_positive(value) or (name == "depth" and value not in DEPTHS)):
            kind = f"a whole number from 1 to {DEPTHS[-1]}" if name == "depth" else "a number above 0"
            raise ValueError(f"{name}={value}: must be {kind}")
    depth, images = given.get("depth"), given.get("images") if given.get("images") is not None else given.get("d")
    size = float(given["n"]) if given.get("n") is not None else size_of(rows, int(depth)) if depth is not None else None
    if ask == "predict" and size is not None:
        return predict(analysis, size, images, limits)
    if ask == "optimal":
        return optimal(analysis, float(given["compute"]), limits)
    if ask == "compare":
        doubts = [] if analysis.surface is None else analysis.surface.lack_of_fit
        return [f"warning: {doubt}" for doubt in doubts] + compare(analysis, str(given["run"]))
    lines = refuse(surface_of(analysis).lack_of_fit, limits)
    best = next_runs(analysis, size, images, given.get("compute"))[:5]
    if not best:
        raise ValueError("no run fits the budget: give a larger compute=...")
    return lines + [
        f"{one.seeds} x {named(rows, one.size)}, {one.images:,.0f} {analysis.runs.counts} ({one.flops:.3g} FLOP"
        f"{' together' if one.seeds > 1 else ''}): prediction interval {one.narrowing:.0%} as wide as now"
        for one in best
    ]

"""Loss by size and data: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, third approach).

Fitted as the authors intended: minimizes the sum, not the mean, of Huber losses of ln L (Besiroglu et al. 2024), with
ln N and ln D centered for better conditioning, from many starting points, of which the best are refined. D is counted
in images.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from varlab.scaling.power_law import Values, t_correction

Row = dict[str, Any]
DELTA = 1e-3  # of the Huber loss, in ln L
REPEAT_DECAY = 15.0  # R* of Muennighoff et al. 2023: number of repetitions after which further passes add little
POLISHED = 4
NO_FLOOR = 1e-3  # nat: a fitted floor below this counts as 0
LOSSES = ("huber", "squares")


class Form(NamedTuple):
    """Form of the fit: `tied` exponents (alpha = beta), the floor E (None: fitted), the loss (`huber` or `squares`)."""

    tied: bool = False
    floor: float | None = None
    loss: str = "huber"

    @property
    def words(self) -> str:
        """The form in a few words."""
        floor = "E fitted" if self.floor is None else "no E" if self.floor == 0 else f"E = {self.floor:g}"
        return f"{'tied' if self.tied else 'free'} exponents, {floor}, {'Huber' if self.loss == 'huber' else 'least squares'}"


def parse_form(setting: str, floor: float | None) -> Form | None:
    """The form of L(N, D) that a setting such as `tied_huber` names, with this floor; None for `auto`."""
    if setting == "auto":
        return None
    parts = setting.split("_")
    if len(parts) != 2 or parts[0] not in ("tied", "free") or parts[1] not in LOSSES:
        raise ValueError(f"form={setting!r}: choose auto, tied_huber, tied_squares, free_huber or free_squares")
    return Form(parts[0] == "tied", floor, parts[1])


CHINCHILLA = Form()  # free exponents, floor fitted, Huber


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = floor + exp(log_a) / N^alpha + exp(log_b) / D^beta. `noise`: standard deviation of a run's ln L around
    it. `resamples`: the parameters (alpha, log_a, beta, log_b, floor) of each bootstrap."""

    form: Form
    alpha: float
    log_a: float
    beta: float
    log_b: float
    floor: float
    noise: float
    objective: float
    resamples: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> np.ndarray:
        """alpha, log_a, beta, log_b, floor."""
        return np.array([self.alpha, self.log_a, self.beta, self.log_b, self.floor])

    def __call__(self, size: Any, images: Any) -> np.ndarray:
        """Predicted loss."""
        return evaluate(self.parameters, size, images)

    def interval(self, size: float | int, images: float | int, seed: int = 0) -> tuple[float, float] | None:
        """95 % prediction interval for the loss of one further run, from the uncertainty of the parameters and the
        noise of a run."""
        if self.resamples is None:
            return None
        values = evaluate(self.resamples, size, images)
        values = values * np.exp(np.random.default_rng(seed).normal(0, self.noise, len(values)))
        low, high = np.percentile(values, (2.5, 97.5))
        return float(low), float(high)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of each parameter."""
        if self.resamples is None:
            return {}
        low, high = np.percentile(self.resamples, (2.5, 97.5), axis=0)
        names = ("alpha", "log_a", "beta", "log_b", "floor")
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def evaluate(parameters: np.ndarray, size: Any, images: Any) -> np.ndarray:
    """The loss for one row of parameters, or for many."""
    alpha, log_a, beta, log_b, floor = np.moveaxis(parameters, -1, 0)
    return np.asarray(floor + np.exp(log_a - alpha * np.log(size)) + np.exp(log_b - beta * np.log(images)))


def effective_data(images: Any, unique: Any, repeat_decay: float = REPEAT_DECAY) -> np.ndarray:
    """Effective number of new images if images were seen several times (Muennighoff et al. 2023):
    U + U R* (1 - exp(-R / R*)), where R is the number of passes after the first."""
    images, unique = np.asarray(images, dtype=float), np.asarray(unique, dtype=float)
    repeats = np.maximum(images / unique - 1, 0)
    return np.asarray(np.minimum(images, unique) + unique * repeat_decay * (1 - np.exp(-repeats / repeat_decay)))


@dataclass(frozen=True)
class Problem:
    """Centered points and the objective of a form. Variables: a, b (logs of both terms at the center), alpha, beta
    unless tied, ln E if it is fitted."""

    x: np.ndarray
    z: np.ndarray
    log_loss: np.ndarray
    form: Form

    def objective(self, v: np.ndarray, weights: np.ndarray | float = 1.0) -> tuple[float, np.ndarray]:
        """(sum over points divided by delta, its gradient)."""
        form = self.form
        alpha, beta = v[2], v[2] if form.tied else v[3]
        by_size, by_images = np.exp(v[0] - alpha * self.x), np.exp(v[1] - beta * self.z)
        floor = np.exp(v[-1]) if form.floor is None else form.floor
        total = floor + by_size + by_images
        residual = np.log(total) - self.log_loss
        if form.loss == "huber":
            size = np.abs(residual)
            value = np.where(size <= DELTA, residual**2 / (2 * DELTA), size - DELTA / 2)
            slope = np.clip(residual / DELTA, -1, 1)
        else:
            value, slope = residual**2 / (2 * DELTA), residual / DELTA
        pull = weights * slope / total
        by_size, by_images = pull * by_size, pull * by_images
        gradient = [by_size.sum(), by_images.sum(), -(by_size @ self.x)]
        if form.tied:
            gradient[2] -= by_images @ self.z
        else:
            gradient.append(-(by_images @ self.z))
        if form.floor is None:
            gradient.append(pull.sum() * floor)
        return float((weights * value).sum()), np.array(gradient)

    def starts(self) -> list[np.ndarray]:
        """Grid of starting points (72 with a fitted floor): floors, ratios of the two terms, exponents."""
        lowest, mean = np.exp(self.log_loss.min()), np.exp(self.log_loss.mean())
        found = []
        floors = (0.3, 0.6, 0.85, 0.97) if self.form.floor is None else (self.form.floor / lowest,)
        for share, part, alpha, beta in itertools.product(floors, (0.3, 0.7), (0.1, 0.3, 0.6), (0.1, 0.3, 0.6)):
            rest = max(mean - share * lowest, 1e-3)
            guess = [np.log(rest * part), np.log(rest * (1 - part)), alpha]
            guess += [] if self.form.tied else [beta]
            guess += [np.log(share * lowest)] if self.form.floor is None else []
            found.append(np.array(guess))
        return found

    def solve(self, start: np.ndarray, weights: np.ndarray | float = 1.0) -> tuple[float, np.ndarray]:
        """(objective, variables) of a refined minimum."""
        tight = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}
        near = minimize(self.objective, start, (weights,), "L-BFGS-B", jac=True, options=tight)
        best = minimize(self.objective, near.x, (weights,), "BFGS", jac=True, options={"maxiter": 200})
        chosen = best if best.fun <= near.fun else near
        return float(chosen.fun), chosen.x

    def parameters(self, v: np.ndarray, center: tuple[float, float]) -> np.ndarray:
        """alpha, log_a, beta, log_b, floor of uncentered data."""
        alpha, beta = v[2], v[2] if self.form.tied else v[3]
        floor = np.exp(v[-1]) if self.form.floor is None else self.form.floor
        return np.array([alpha, v[0] + alpha * center[0], beta, v[1] + beta * center[1], floor])


def fit_parametric(
    size: Values,
    images: Values,
    loss: Values,
    form: Form = CHINCHILLA,
    groups: Sequence[Any] | np.ndarray | None = None,
    bootstraps: int = 0,
    seed: int = 0,
) -> ParametricLaw:
    """The law fitted to points (N, D, L). `groups`: the run that each point belongs to (a trunk and its branches are
    one run); the bootstrap resamples runs, not points. Raises ValueError for fewer than three sizes or three numbers of
    images, or unusable losses."""
    n, d, y = (np.asarray(values, dtype=float) for values in (size, images, loss))
    for what, values in (("sizes", n), ("numbers of images", d)):
        if len(np.unique(values)) < 3:
            raise ValueError(f"L(N, D) needs at least 3 different {what}, there are {len(np.unique(values))}")
    if not np.isfinite(y).all() or (form.floor is not None and not (y > form.floor).all()):
        raise ValueError(f"losses must be finite and above the floor ({form.floor}); the smallest is {y.min():.4g}")
    center = float(np.log(n).mean()), float(np.log(d).mean())
    problem = Problem(np.log(n) - center[0], np.log(d) - center[1], np.log(y), form)
    rough = [
        minimize(problem.objective, start, (1.0,), "L-BFGS-B", jac=True, options={"maxiter": 25})
        for start in problem.starts()
    ]
    rough = sorted((run for run in rough if np.isfinite(run.fun)), key=lambda run: run.fun)
    objective, v = min((problem.solve(run.x) for run in rough[:POLISHED]), key=lambda found: found[0])
    parameters = problem.parameters(v, center)
    residuals = np.log(y) - np.log(evaluate(parameters, n, d))
    degrees = max(len(y) - len(v), 1)
    noise = (
        robust_spread(residuals, degrees) if form.loss == "huber" else float(np.sqrt((residuals**2).sum() / degrees))
    )
    resamples = bootstrap(problem, v, center, groups, bootstraps, seed) if bootstraps else None
    alpha, log_a, beta, log_b, floor = (float(parameter) for parameter in parameters)
    floor = floor if floor > NO_FLOOR else 0.0
    return ParametricLaw(form, alpha, log_a, beta, log_b, floor, noise, objective, resamples)


def robust_spread(residuals: np.ndarray, degrees: int) -> float:
    """Standard deviation estimated from the median absolute deviation, which is robust to outliers."""
    return float(1.4826 * np.median(np.abs(residuals)) * np.sqrt(len(residuals) / degrees))


def bootstrap(
    problem: Problem,
    v: np.ndarray,
    center: tuple[float, float],
    groups: Sequence[Any] | np.ndarray | None,
    bootstraps: int,
    seed: int,
) -> np.ndarray:
    """Parameters of refits, started from the full fit, in which each run is weighted by how often it was resampled.
    Resamples of few runs vary too little, so they are widened by t(runs - 1) / 1.96 and sqrt(runs / (runs - 1)) around
    the full fit."""
    names = list(range(len(problem.x))) if groups is None else list(groups)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    member = np.array([numbers[name] for name in names])
    rng, resamples = np.random.default_rng(seed), []
    options = {"maxiter": 300, "ftol": 1e-11, "gtol": 1e-7}
    for _ in range(bootstraps):
        weights = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)))[member].astype(float)
        found = minimize(problem.objective, v, (weights,), "L-BFGS-B", jac=True, options=options)
        resamples.append(problem.parameters(found.x, center))
    full, num_runs = problem.parameters(v, center), len(numbers)
    widened = full + (np.array(resamples) - full) * t_correction(num_runs - 1) * np.sqrt(
        num_runs / max(num_runs - 1, 1)
    )
    widened[:, -1] = np.maximum(widened[:, -1], 0.0)
    return widened


@dataclass(frozen=True)
class HeldOut:
    """Held-out error of a form: mean |error| of L in percent, for the largest size and for the most images."""

    form: Form
    largest_size: float
    largest_images: float

    @property
    def score(self) -> float:
        """The selection criterion: the mean of both errors."""
        return (self.largest_size + self.largest_images) / 2


def compare_forms(
    size: np.ndarray, images: np.ndarray, loss: np.ndarray, floors: Sequence[float | int | None] = (None, 0.0)
) -> list[HeldOut]:
    """All forms, the one that extrapolates best first. Forms that cannot be fitted without the held-out points are not
    listed."""
    found = []
    for tied, floor, kind in itertools.product((True, False), floors, LOSSES):
        form, errors = Form(tied, floor, kind), []
        for values in (size, images):
            kept = values < values.max() * 0.999
            try:
                law = fit_parametric(size[kept], images[kept], loss[kept], form)
            except ValueError:
                break
            errors.append(100 * float(np.abs(law(size[~kept], images[~kept]) / loss[~kept] - 1).mean()))
        if len(errors) == 2:
            found.append(HeldOut(form, errors[0], errors[1]))
    return sorted(found, key=lambda held: held.score)

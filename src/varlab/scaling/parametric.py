"""Loss by size and data: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, third approach).

Fitted as the authors intended: minimizes the sum, not the mean, of Huber losses of ln L (Besiroglu et al. 2024), with
ln N and ln D centered for better conditioning, from many starting points, of which the best are refined. D is counted
in images.
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import stdtrit

from varlab.scaling.power_law import Values
from varlab.scaling.solver import penalty, solve_many

Row = dict[str, Any]
DELTA = 1e-3  # of the Huber loss, in ln L
REPEAT_DECAY = 15.0  # R* of Muennighoff et al. 2023: number of repetitions after which further passes add little
POLISHED = 4
TELLS_APART = 0.1  # of ln N or ln D that must be its own
CLEARLY = 0.7  # a form must extrapolate this much better than the default to replace it
LOSSES = ("huber", "squares")
EXPONENTS = ("tied", "free", "interaction")
NAMES = ("alpha", "log_a", "beta", "log_b", "floor", "kappa", "mu")


class Form(NamedTuple):
    """Form of the fit. `exponents`: `tied` (alpha = beta), `free`, or `interaction` (free, and the term of the images
    depends on N as well, to first order as in Farseer, arXiv 2506.10972). `floor`: E, None fits it. `loss`: `huber` or
    `squares`."""

    exponents: str = "free"
    floor: float | None = None
    loss: str = "huber"

    @property
    def words(self) -> str:
        """The form in a few words."""
        floor = "E fitted" if self.floor is None else "no E" if self.floor == 0 else f"E = {self.floor:g}"
        exponents = "interaction of N and D" if self.exponents == "interaction" else f"{self.exponents} exponents"
        return f"{exponents}, {floor}, {'Huber' if self.loss == 'huber' else 'least squares'}"

    @property
    def num_parameters(self) -> int:
        """Number of fitted parameters."""
        return {"tied": 3, "free": 4, "interaction": 6}[self.exponents] + (self.floor is None)


def parse_form(setting: str, floor: float | None) -> Form | None:
    """The form of L(N, D) that a setting such as `tied_huber` names, with this floor; None for `auto`."""
    if setting == "auto":
        return None
    exponents, _, loss = setting.partition("_")
    if exponents not in EXPONENTS or loss not in LOSSES:
        names = [f"{one}_{other}" for one in EXPONENTS for other in LOSSES]
        raise ValueError(f"form={setting!r}: choose auto or one of {', '.join(names)}")
    return Form(exponents, floor, loss)


CHINCHILLA = Form()  # free exponents, floor fitted, Huber


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = floor + exp(log_a) / N^alpha + exp(log_b) N^kappa / D^(beta + mu ln N), where kappa = mu = 0 without
    interaction. `noise`: standard deviation of a run's ln L around it. `draws`: the parameters and the noise of each draw
    of the bootstrap, in the order of `NAMES`. `others`: laws of other forms that extrapolate about as well."""

    form: Form
    alpha: float
    log_a: float
    beta: float
    log_b: float
    floor: float
    noise: float
    objective: float
    kappa: float = 0.0
    mu: float = 0.0
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    others: "tuple[ParametricLaw, ...]" = field(default=(), repr=False, compare=False)

    @property
    def parameters(self) -> np.ndarray:
        """The parameters, in the order of `NAMES`."""
        return np.array([getattr(self, name) for name in NAMES])

    def __call__(self, size: Any, images: Any) -> np.ndarray:
        """Predicted loss."""
        return evaluate(self.parameters, size, images)

    def interval(self, size: float | int, images: float | int, seed: int = 0) -> tuple[float, float] | None:
        """95 % prediction interval for the loss of one further run, from the uncertainty of the parameters, the noise of
        a run, and the predictions of `others`, the forms that extrapolate about as well."""
        if self.draws is None:
            return None
        noise = np.random.default_rng(seed).normal(0, 1, len(self.draws)) * self.draws[:, -1]
        low, high = np.percentile(evaluate(self.draws[:, :-1], size, images) * np.exp(noise), (2.5, 97.5))
        away = [float(other(size, images) - self(size, images)) for other in self.others]
        return float(low) + min([0.0, *away]), float(high) + max([0.0, *away])

    def slopes(self, size: Any, images: Any) -> np.ndarray:
        """Derivatives of ln L with respect to the fitted parameters (log_a, log_b, alpha, beta unless tied, kappa and mu of
        an interaction, E if it is fitted), one row per point."""
        variables = [self.log_a, self.log_b, self.alpha] + ([] if self.form.exponents == "tied" else [self.beta])
        variables += [self.kappa, self.mu] if self.form.exponents == "interaction" else []
        variables += [self.floor] if self.form.floor is None else []
        x, z = np.log(np.atleast_1d(size)), np.log(np.atleast_1d(images))
        return Problem(x, z, x, self.form).model(np.array([variables]))[1][0]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of each fitted parameter."""
        if self.draws is None:
            return {}
        low, high = np.percentile(self.draws[:, :-1], (2.5, 97.5), axis=0)
        fitted = NAMES if self.form.exponents == "interaction" else NAMES[:5]
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(fitted)}


def evaluate(parameters: np.ndarray, size: Any, images: Any) -> np.ndarray:
    """The loss for one row of parameters, or for many."""
    alpha, log_a, beta, log_b, floor, kappa, mu = np.moveaxis(parameters, -1, 0)
    log_n, log_d = np.log(size), np.log(images)
    by_images = log_b + kappa * log_n - (beta + mu * log_n) * log_d
    with np.errstate(over="ignore"):
        return np.asarray(floor + np.exp(log_a - alpha * log_n) + np.exp(by_images))


def effective_data(images: Any, unique: Any, repeat_decay: float = REPEAT_DECAY) -> np.ndarray:
    """Effective number of new images if images were seen several times (Muennighoff et al. 2023):
    U + U R* (1 - exp(-R / R*)), where R is the number of passes after the first."""
    images, unique = np.asarray(images, dtype=float), np.asarray(unique, dtype=float)
    repeats = np.maximum(images / unique - 1, 0)
    return np.asarray(np.minimum(images, unique) + unique * repeat_decay * (1 - np.exp(-repeats / repeat_decay)))


@dataclass(frozen=True)
class Problem:
    """Centered points and the objective of a form. Variables: a, b (logs of both terms at the center), alpha, beta unless
    tied, kappa and mu of an interaction, E if it is fitted."""

    x: np.ndarray
    z: np.ndarray
    log_loss: np.ndarray
    form: Form

    @property
    def delta(self) -> float | None:
        """Of the Huber loss; None for least squares."""
        return DELTA if self.form.loss == "huber" else None

    @property
    def lower(self) -> np.ndarray:
        """Smallest value of each variable: E is not negative."""
        bounds = np.full(self.form.num_parameters, -np.inf)
        if self.form.floor is None:
            bounds[-1] = 0.0
        return bounds

    def model(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln L (B, N) and its derivatives (B, N, P) for variables (B, P)."""
        x, z, columns, form = self.x, self.z, v.T[..., None], self.form
        alpha, beta = columns[2], columns[2 if form.exponents == "tied" else 3]
        log_b = columns[1] - beta * z
        if form.exponents == "interaction":
            log_b = log_b + columns[4] * x - columns[5] * x * z
        by_size, by_images = np.exp(columns[0] - alpha * x), np.exp(log_b)
        floor = columns[-1] if form.floor is None else form.floor
        total = floor + by_size + by_images
        parts = [by_size, by_images, -by_size * x, -by_images * z]
        if form.exponents == "tied":
            parts[2:] = [parts[2] + parts[3]]
        elif form.exponents == "interaction":
            parts += [by_images * x, -by_images * x * z]
        if form.floor is None:
            parts.append(np.ones_like(total))
        return np.log(total), np.stack(parts, axis=-1) / total[..., None]

    def objective(self, v: np.ndarray) -> tuple[float, np.ndarray]:
        """(sum over points divided by delta, its gradient)."""
        values, slopes = self.model(v[None])
        residual = values[0] - self.log_loss
        pull = residual if self.delta is None else np.clip(residual, -self.delta, self.delta)
        return float(penalty(residual, self.delta).sum() / DELTA), pull @ slopes[0] / DELTA

    def starts(self) -> np.ndarray:
        """Grid of starting points (72 with free exponents and a fitted floor): floors, ratios of the two terms,
        exponents."""
        lowest, mean = np.exp(self.log_loss.min()), np.exp(self.log_loss.mean())
        found, form = [], self.form
        floors = (0.3, 0.6, 0.85, 0.97) if form.floor is None else (form.floor / lowest,)
        betas = (0.0,) if form.exponents == "tied" else (0.1, 0.3, 0.6)
        for share, part, alpha, beta in itertools.product(floors, (0.3, 0.7), (0.1, 0.3, 0.6), betas):
            rest = max(mean - share * lowest, 1e-3)
            guess = [np.log(rest * part), np.log(rest * (1 - part)), alpha]
            guess += [] if form.exponents == "tied" else [beta]
            guess += [0.0, 0.0] if form.exponents == "interaction" else []
            guess += [share * lowest] if form.floor is None else []
            found.append(guess)
        return np.array(found)

    def solve(self) -> tuple[float, np.ndarray]:
        """(objective, variables) of the minimum: all starts roughly, the best of them closely, the best one refined."""
        rough, sums = solve_many(self.model, self.starts(), self.log_loss, 1.0, self.delta, self.lower, iterations=30)
        best = rough[np.argsort(sums)[:POLISHED]]
        near, sums = solve_many(self.model, best, self.log_loss, 1.0, self.delta, self.lower, iterations=100)
        start = near[int(sums.argmin())]
        bounds = [(low, None) for low in self.lower]
        tight = {"maxiter": 200, "ftol": 1e-15, "gtol": 1e-9}
        end = minimize(self.objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=tight)
        return (float(end.fun), end.x) if end.fun <= sums.min() / DELTA else (float(sums.min() / DELTA), start)

    def parameters(self, v: np.ndarray, center: tuple[float, float]) -> np.ndarray:
        """Parameters (B, 7) of uncentered data, in the order of `NAMES`, for variables (B, P)."""
        columns, zero, (x, z) = v.T, np.zeros(len(v)), center
        alpha, beta = columns[2], columns[2 if self.form.exponents == "tied" else 3]
        kappa, mu = columns[4:6] if self.form.exponents == "interaction" else (zero, zero)
        floor = columns[-1] if self.form.floor is None else np.full(len(v), self.form.floor)
        log_b = columns[1] + beta * z - kappa * x - mu * x * z
        return np.column_stack([alpha, columns[0] + alpha * x, beta - mu * x, log_b, floor, kappa + mu * z, mu])


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
    one run), whose points share a part of their noise. Raises ValueError for too few points, fewer than three sizes or
    three numbers of images, or unusable losses."""
    n, d, y = (np.asarray(values, dtype=float) for values in (size, images, loss))
    for what, values in (("sizes", n), ("numbers of images", d)):
        if len(np.unique(values)) < 3:
            raise ValueError(f"L(N, D) needs at least 3 different {what}, there are {len(np.unique(values))}")
    if apart(n, d) < TELLS_APART:
        raise ValueError(
            "L(N, D) cannot be fitted: D follows from N in these runs, so their effects cannot be told apart"
        )
    if len(y) <= form.num_parameters:
        raise ValueError(f"L(N, D) with {form.words} needs more than {form.num_parameters} runs, there are {len(y)}")
    if not np.isfinite(y).all() or not (y > (form.floor or 0.0)).all():
        raise ValueError(
            f"losses must be finite and above the floor ({form.floor or 0}); the smallest is {y.min():.4g}"
        )
    center = float(np.log(n).mean()), float(np.log(d).mean())
    problem = Problem(np.log(n) - center[0], np.log(d) - center[1], np.log(y), form)
    objective, v = problem.solve()
    parameters = problem.parameters(v[None], center)[0]
    residuals = np.log(y) - np.log(evaluate(parameters, n, d))
    degrees = len(y) - len(v)
    noise = (
        robust_spread(residuals, degrees) if form.loss == "huber" else float(np.sqrt((residuals**2).sum() / degrees))
    )
    draws = bootstrap(problem, v, center, noise, groups, bootstraps, seed) if bootstraps else None
    found = dict(zip(NAMES, map(float, parameters), strict=True))
    return ParametricLaw(form, noise=noise, objective=objective, draws=draws, **found)


def apart(size: np.ndarray, images: np.ndarray) -> float:
    """How much of ln N and ln D is their own: the smaller standard deviation of the two around a line through the other."""
    x, z = (np.log(values) - np.log(values).mean() for values in (size, images))
    shared = np.square(x @ z / max(float(np.sqrt((x @ x) * (z @ z))), 1e-300))
    return float(np.sqrt(max(1 - shared, 0.0) * min(x @ x, z @ z) / len(x)))


def robust_spread(residuals: np.ndarray, degrees: int) -> float:
    """Standard deviation estimated from the median absolute deviation, which is robust to outliers."""
    return float(1.4826 * np.median(np.abs(residuals)) * np.sqrt(len(residuals) / degrees))


def bootstrap(
    problem: Problem,
    v: np.ndarray,
    center: tuple[float, float],
    noise: float,
    groups: Sequence[Any] | np.ndarray | None,
    bootstraps: int,
    seed: int,
) -> np.ndarray:
    """Parameters and noise of refits, started from the full fit, in which each run is weighted by how often it was drawn.
    Draws of few runs vary too little, so they are widened by t(runs - 1) / 1.96 and sqrt(runs / (runs - 1)) around the
    full fit."""
    names = list(range(len(problem.x))) if groups is None else list(groups)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    member, num_runs = np.array([numbers[name] for name in names]), len(numbers)
    rng, degrees = np.random.default_rng(seed), len(problem.x) - len(v)
    weights = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=bootstraps)[:, member]
    starts = np.repeat(v[None], bootstraps, axis=0)
    refits, _ = solve_many(problem.model, starts, problem.log_loss, weights, problem.delta, problem.lower)
    full = problem.parameters(v[None], center)
    factor = float(stdtrit(max(num_runs - 1, 1), 0.975)) / 1.96 * np.sqrt(num_runs / max(num_runs - 1, 1))
    widened = full + (problem.parameters(refits, center) - full) * factor
    widened[:, 4] = np.maximum(widened[:, 4], 0.0)
    return np.column_stack([widened, noise * np.sqrt(degrees / rng.chisquare(degrees, bootstraps))])


@dataclass(frozen=True)
class HeldOut:
    """Error of a form's predictions for runs that it was not fitted to: mean |error| of L in percent, by what was held
    out: the quarter of the runs with the most parameters, images or compute."""

    form: Form
    errors: dict[str, float]

    @property
    def score(self) -> float:
        """The selection criterion: the mean over the folds."""
        return float(np.mean(list(self.errors.values())))


def folds(size: np.ndarray, images: np.ndarray, compute: np.ndarray) -> dict[str, np.ndarray]:
    """Which runs are held out: about a quarter, those with the largest N, D or C; runs that are equal stay together."""
    found = {}
    for name, values in (("size", size), ("images", images), ("compute", compute)):
        ends = np.unique(values)[::-1]
        quarter = next(end for end in ends if (values >= end * 0.98).sum() >= len(values) / 4)
        held = values >= quarter * 0.98
        if (~held).sum() < len(values) / 2:  # the largest alone, if runs come in few values
            held = values >= ends[0] * 0.98
        found[name] = held
    return found


def compare_forms(
    size: np.ndarray,
    images: np.ndarray,
    loss: np.ndarray,
    compute: np.ndarray | None = None,
    floor: float | None = None,
    exponents: Sequence[str] = ("tied", "free"),
) -> list[HeldOut]:
    """All forms with this floor (None: fitted), the one that extrapolates best first. Forms that cannot be fitted
    without the held-out points are not listed."""
    held = folds(size, images, size * images if compute is None else compute)
    found = []
    for exponent, kind in itertools.product(exponents, LOSSES):
        form, errors = Form(exponent, floor, kind), {}
        for name, out in held.items():
            with contextlib.suppress(ValueError):
                law = fit_parametric(size[~out], images[~out], loss[~out], form)
                errors[name] = 100 * float(np.abs(law(size[out], images[out]) / loss[out] - 1).mean())
        if errors:
            found.append(HeldOut(form, errors))
    most = max((len(one.errors) for one in found), default=0)
    return sorted((one for one in found if len(one.errors) == most), key=lambda one: one.score)


def choose(held: Sequence[HeldOut], floor: float | None = None) -> tuple[Form, list[Form]]:
    """(the form to use, the forms that extrapolate about as well). The default, tied exponents with the Huber loss, is
    left only for a form whose error is below `CLEARLY` of its own; forms within that factor of the chosen one are
    near-ties."""
    default = Form("tied", floor)
    scores = {one.form: one.score for one in held}
    best = held[0].form if held else default
    chosen = best if default not in scores or scores[best] < CLEARLY * scores[default] else default
    near = [form for form, score in scores.items() if form != chosen and score * CLEARLY <= scores[chosen]]
    return chosen, near

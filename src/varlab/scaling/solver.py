"""Levenberg-Marquardt for many small problems at once: the refits of a bootstrap differ only in weights or values."""

from collections.abc import Callable

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def penalty(residual: np.ndarray, delta: float | None) -> np.ndarray:
    """Half the square, or the Huber loss: quadratic up to `delta`, linear beyond it."""
    size = np.abs(residual)
    if delta is None:
        return size**2 / 2
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def solve_many(
    model: Model,
    start: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray | float = 1.0,
    delta: float | None = None,
    lower: np.ndarray | None = None,
    iterations: int = 60,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes the weighted sum of `penalty(model - target)` for each row of `start`.

    Args:
        model: maps variables (B, P) to values (B, N) and their derivatives (B, N, P).
        start: (B, P).
        target: (N,) or (B, N).
        weights: of the points, (N,) or (B, N).
        delta: of the Huber loss; None for least squares.
        lower: smallest allowed value of each variable, (P,).
        iterations: at most; rows that no longer improve stop changing.

    Returns:
        (variables (B, P), the minimized sums (B,))
    """
    v = np.array(start, dtype=float)
    target, weights = np.broadcast_to(target, (len(v), np.shape(target)[-1])), np.asarray(weights, dtype=float)
    damping, idle = np.full(len(v), 1e-3), np.zeros(len(v), dtype=int)

    def evaluated(rows: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            values, slopes = model(at)
            residual = values - target[rows]
            total = (weights_of(rows) * penalty(residual, delta)).sum(axis=1)
        return residual, slopes, np.where(np.isfinite(total), total, np.inf)

    def weights_of(rows: np.ndarray) -> np.ndarray:
        return weights[rows] if weights.ndim == 2 else weights

    every = np.arange(len(v))
    residual, slopes, total = evaluated(every, v)
    idle[np.isinf(total)] = 4  # nothing can be computed there
    diagonal = np.arange(v.shape[1])
    for _ in range(iterations):
        rows = every[idle < 4]
        if not len(rows):
            break
        size = np.maximum(np.abs(residual[rows]), 1e-300)
        pull = weights_of(rows) * (1.0 if delta is None else np.minimum(1.0, delta / size))
        j = np.nan_to_num(slopes[rows])
        weighted = j * pull[..., None]
        normal = weighted.transpose(0, 2, 1) @ j
        gradient = (weighted.transpose(0, 2, 1) @ np.nan_to_num(residual[rows])[..., None])[..., 0]
        if lower is not None:  # a variable at its bound that would move beyond it is held while the others move
            free = ~((v[rows] <= lower) & (gradient > 0))
            gradient, normal = gradient * free, normal * (free[:, :, None] & free[:, None, :])
        scale = np.maximum(normal[:, diagonal, diagonal], 1e-12)
        normal[:, diagonal, diagonal] += damping[rows, None] * scale + 1e-300
        step = np.linalg.solve(normal, gradient[..., None])[..., 0]
        tried = v[rows] - step if lower is None else np.maximum(v[rows] - step, lower)
        new_residual, new_slopes, new_total = evaluated(rows, tried)
        better = new_total < total[rows]
        gain = np.where(better, (total[rows] - new_total) / np.maximum(total[rows], 1e-300), 0.0)
        idle[rows] = np.where(gain > 1e-7, 0, idle[rows] + 1)
        damping[rows] = np.clip(np.where(better, damping[rows] / 5, damping[rows] * 4), 1e-12, 1e12)
        won = rows[better]
        v[won], total[won] = tried[better], new_total[better]
        residual[won], slopes[won] = new_residual[better], new_slopes[better]
    return v, total

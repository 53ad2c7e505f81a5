"""How long a parametric fit and its bootstrap take, on synthetic runs of ten sizes.

python experiments/performance/fits.py        (two CPU cores: about half a minute)
"""

import time

import numpy as np

from varlab.scaling.parametric import CHINCHILLA, Form, fit_parametric

SIZES, BUDGETS, BOOTSTRAPS = (
    73_728 * np.array([2.0, 3, 4, 5, 6, 7, 8, 10, 12, 16]) ** 3,
    np.geomspace(1e4, 1e7, 25),
    4000,
)


def main() -> None:
    rng = np.random.default_rng(0)
    size, images = np.repeat(SIZES, len(BUDGETS)), np.tile(BUDGETS, len(SIZES))
    loss = 3 + (1e6 / size) ** 0.35 + (1e5 / images) ** 0.3
    loss = loss * np.exp(rng.normal(0, 0.003, len(loss))) * np.where(rng.random(len(loss)) < 0.04, 1.03, 1)
    for form in (CHINCHILLA, Form(loss="squares"), Form("tied")):
        start = time.perf_counter()
        law = fit_parametric(size, images, loss, form)
        print(
            f"{len(loss)} points, {form.words}: {time.perf_counter() - start:.2f} s, alpha {law.alpha:.3f}, beta {law.beta:.3f}"
        )
    start = time.perf_counter()
    law = fit_parametric(size, images, loss, groups=np.repeat(np.arange(len(loss) // 5), 5), bootstraps=BOOTSTRAPS)
    print(f"{BOOTSTRAPS} bootstraps: {time.perf_counter() - start:.1f} s, {law.intervals()}")


if __name__ == "__main__":
    main()

"""How far a learning curve goes on: extrapolation with an interval, and refusal where there is no ground for one.

Two families of saturating curves are fitted to resampled means, and the interval is that of both together, since nobody
knows which one a method follows: a power law ``a - b n^-c`` (Hestness et al., arXiv:1712.00409; Mahmood et al., CVPR 2022,
arXiv:2207.01725) and a shifted hyperbola ``a - b / (n + c)``. ``a`` never exceeds the best score there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from labeleff.errors import LabeleffError
from labeleff.evaluation.statistics import FEWEST_FOR_INTERVAL, Array, Interval, Resamples, crossed, spread

FEWEST_BUDGETS = 3
FARTHEST = 10.0
"""Forecasts end at this multiple of the largest budget that was run."""

Curve = Callable[[Array, NDArray[np.float64]], Array]


class NoGround(LabeleffError):
    """There is no ground for a forecast; the message says why, and what would give one."""


def _power(n: Array, p: NDArray[np.float64]) -> Array:
    return np.asarray(p[0] - p[1] * n ** -p[2])


def _hyperbola(n: Array, p: NDArray[np.float64]) -> Array:
    return np.asarray(p[0] - p[1] / (n + p[2]))


FAMILIES: tuple[tuple[Curve, tuple[float, float], float], ...] = (
    (_power, (0.1, 2.0), 0.6),
    (_hyperbola, (0.0, 50.0), 1.0),
)
"""Curve, bounds of its third parameter, and where its search starts."""


@dataclass(frozen=True)
class Needed:
    """How many labels a target takes.

    Args:
        labels: Median of the resampled answers; ``inf``: not within reach.
        low: Lower bound.
        high: Upper bound; ``inf``: perhaps never within reach.
        reached: Share of the resampled curves that get there within ``limit``.
        limit: The largest number that is forecast.
    """

    labels: float
    low: float
    high: float
    reached: float
    limit: float


class Forecast:
    """Curves fitted to resampled scores.

    Args:
        budgets: Labels, rising.
        scores: [draw, seed, patient] at each of them, same shapes.
        best: The best score there is.
        count: Number of resamples per family.
        seed: Seed of the resampling.

    Raises:
        NoGround: Fewer than three budgets, fewer than three draws, or a curve that does not rise beyond its uncertainty.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        scores: Sequence[ArrayLike],
        *,
        best: float = 1.0,
        count: int = 200,
        seed: int = 0,
    ) -> None:
        cells = [crossed(item) for item in scores]
        self.budgets = np.asarray(budgets, dtype=np.float64)
        if len(cells) < FEWEST_BUDGETS:
            raise NoGround(
                f"a curve needs at least {FEWEST_BUDGETS} label budgets; there are {len(cells)}: run more budgets"
            )
        if cells[0].shape[0] < FEWEST_FOR_INTERVAL:
            raise NoGround(
                f"with fewer than {FEWEST_FOR_INTERVAL} draws of labelled patients nobody knows how far scores scatter: "
                "run more draws"
            )
        again = Resamples(*cells[0].shape, count=count, seed=seed)
        means = np.stack([again.means(item) for item in cells], axis=1)
        rise = means[:, -1] - means[:, 0]
        if np.quantile(rise, 0.05) <= 0:
            raise NoGround(
                f"from {budgets[0]:g} to {budgets[-1]:g} labels the score rises by {rise.mean():.3f}, which is within its "
                "uncertainty: there is no trend to go on with; run more draws or a larger budget"
            )
        weights = 1 / np.sqrt([max(spread(item).variance, 1e-8) for item in cells])
        self.curves = [
            (curve, _fit(curve, bounds, start, self.budgets, row, weights, best))
            for curve, bounds, start in FAMILIES
            for row in means
        ]

    def at(self, labels: float, *, level: float = 0.95) -> Interval:
        """Return the score to expect with so many labels.

        Raises:
            NoGround: That is too far beyond what was run.
        """
        limit = FARTHEST * self.budgets[-1]
        if labels > limit:
            raise NoGround(
                f"{labels:g} labels are more than {FARTHEST:g} times the {self.budgets[-1]:g} that were run; "
                f"a forecast ends at {limit:g}"
            )
        found = self._scores(np.array([labels]))[:, 0]
        low, middle, high = np.quantile(found, [(1 - level) / 2, 0.5, (1 + level) / 2])
        return Interval(float(middle), float(low), float(high), level)

    def needed(self, target: float, *, level: float = 0.95) -> Needed:
        """Return how many labels reach a score."""
        limit = FARTHEST * float(self.budgets[-1])
        grid = np.geomspace(self.budgets[0], limit, 400)
        above = self._scores(grid) >= target
        first = np.where(above.any(1), grid[above.argmax(1)], math.inf)
        low, middle, high = np.quantile(first, [(1 - level) / 2, 0.5, (1 + level) / 2], method="closest_observation")
        return Needed(float(middle), float(low), float(high), float(np.isfinite(first).mean()), limit)

    def _scores(self, labels: Array) -> Array:
        return np.stack([curve(labels, parameters) for curve, parameters in self.curves])


def _fit(
    curve: Curve,
    bounds: tuple[float, float],
    start: float,
    budgets: Array,
    means: Array,
    weights: NDArray[np.float64],
    best: float,
) -> NDArray[np.float64]:
    """Return parameters by weighted least squares, the gap b kept positive and the end a at most ``best``."""
    top = min(float(means.max()), best - 1e-3)
    lower, upper = [0.0, 0.0, bounds[0]], [best, 10.0 * (1 + bounds[1]), bounds[1]]
    guess = [min(top + 0.02, best - 5e-4), max(top - float(means[0]), 0.01), start]

    def residuals(p: NDArray[np.float64]) -> Array:
        return (curve(budgets, p) - means) * weights

    found = optimize.least_squares(residuals, guess, bounds=(lower, upper), max_nfev=200)
    return np.asarray(found.x, dtype=np.float64)

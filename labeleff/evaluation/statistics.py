"""What a handful of training runs and a few dozen test patients allow one to say.

Scores are arrays ``[draw, seed, patient]``: label draws and training seeds are crossed with the patients, since every run
is tested on the same patients. All three are samples: the claim is about other draws, seeds and patients than these.

* A mean and its interval: random-effects analysis of variance, three ways crossed (Searle, Casella, McCulloch, *Variance
  Components*, 1992, ch. 4), degrees of freedom after Satterthwaite (1946). The shape of the interval comes from a bootstrap
  that resamples draws, seeds and patients each by itself (Owen, "The pigeonhole bootstrap", 2007, arXiv:0712.1111), scaled
  to the unbiased variance and to Student's t, because a plain bootstrap of three draws is far too narrow.
* Derived quantities (areas, label savings) are computed on the same resamples, so what their parts share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from labeleff.errors import ShapeError

FEWEST_DRAWS = 6
"""Below this number of draws no test is made: a sign-flip test of five could not reach 0.05 at all."""

FEWEST_FOR_INTERVAL = 3
"""Below this number of draws no interval is given: in simulations that of two draws covered 0.89 to 0.92 instead of 0.95."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How uncertain a mean of crossed cells is.

    Args:
        variance: Of the mean, over other draws, seeds and patients.
        freedom: Satterthwaite's degrees of freedom of that variance.
        components: Variance of each effect (``draw``, ``draw:patient``, …), never negative.
    """

    variance: float
    freedom: float
    components: dict[str, float]


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval; the bounds are None where the design allows none."""

    value: float
    low: float | None
    high: float | None
    level: float = 0.95

    def excludes(self, value: float) -> bool:
        """Return whether there are bounds and a value lies outside them."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """A method against its baseline, paired by draw, seed and patient.

    Args:
        interval: Mean difference and its interval.
        p: Two-sided, for other draws, seeds and patients; None below six draws.
        p_these_runs: Wilcoxon's signed-rank test over patients: about these training runs only.
        effect_size: Mean over standard deviation of the patients' mean differences (Cohen's d_z).
        draws: Number of draws.
    """

    interval: Interval
    p: float | None
    p_these_runs: float | None
    effect_size: float | None
    draws: int


def crossed(scores: ArrayLike) -> Array:
    """Return scores as [draw, seed, patient]; [draw, patient] gets one seed.

    Raises:
        ShapeError: Another number of axes, nothing in it, or a score is missing (leave incomplete runs out and say so).
    """
    cells = np.asarray(scores, dtype=np.float64)
    if cells.ndim == 2:
        cells = cells[:, None]
    if cells.ndim != 3 or cells.size == 0:
        raise ShapeError(f"scores must be [draw, seed, patient] or [draw, patient], not of shape {cells.shape}")
    if not np.isfinite(cells).all():
        raise ShapeError("a score is missing or infinite: leave incomplete runs and patients out first")
    return cells


def spread(scores: ArrayLike) -> Spread:
    """Return the variance of the mean of crossed cells.

    Components are estimated from mean squares, the highest order first, and cut at 0. An axis with a single level adds
    nothing: with one draw the variance is about that draw only.
    """
    cells = crossed(scores)
    names = ("draw", "seed", "patient")
    axes = [axis for axis in range(3) if cells.shape[axis] > 1]
    number = {axis: cells.shape[axis] for axis in axes}
    components: dict[str, float] = {}
    found: dict[frozenset[int], float] = {}
    variance, weight = 0.0, 0.0
    for order in range(len(axes), 0, -1):
        for chosen in combinations(axes, order):
            mean_square, freedom = _mean_square(cells, chosen)
            above = sum(
                value * math.prod(number[a] for a in axes if a not in kept)
                for kept, value in found.items()
                if set(chosen) < kept
            )
            value = max(0.0, (mean_square - above) / math.prod(number[a] for a in axes if a not in chosen))
            found[frozenset(chosen)] = value
            components[":".join(names[a] for a in chosen)] = value
            variance += value / math.prod(number[a] for a in chosen)
            weight += (mean_square / cells.size) ** 2 / freedom
    return Spread(variance, max(1.0, variance**2 / weight) if weight else math.inf, components)


def _mean_square(cells: Array, chosen: Sequence[int]) -> tuple[float, int]:
    """Return the mean square of an effect or interaction, and its degrees of freedom."""
    rest = tuple(axis for axis in range(3) if axis not in chosen)
    effect = cells.mean(axis=rest, keepdims=True)
    for axis in chosen:
        effect = effect - effect.mean(axis=axis, keepdims=True)
    freedom = math.prod(cells.shape[axis] - 1 for axis in chosen)
    return float((effect**2).sum() * math.prod(cells.shape[axis] for axis in rest) / freedom), freedom


class Resamples:
    """Draws, seeds and patients drawn again with replacement, each by itself; the same for everything compared.

    Args:
        draws: Number of draws.
        seeds: Number of training seeds.
        patients: Number of patients.
        count: Number of resamples.
        seed: Seed of the resampling.
    """

    def __init__(self, draws: int, seeds: int, patients: int, *, count: int = 2000, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.shape = (draws, seeds, patients)
        self.weights = [generator.multinomial(n, [1 / n] * n, size=count) / n for n in self.shape]

    def plain(self, cells: Array) -> Array:
        """Return the mean of every resample as it is."""
        draws, seeds, patients = self.weights
        means: Array = np.einsum("bs,bp,bsp->b", seeds, patients, np.tensordot(draws, cells, 1))
        return means

    def means(self, scores: ArrayLike, *, level: float = 0.95) -> Array:
        """Return the mean of every resample, widened to the unbiased variance and to Student's t.

        Quantiles of the result at (1 ± level) / 2 are the bounds of the mean's interval.
        """
        cells = crossed(scores)
        if cells.shape != self.shape:
            raise ShapeError(f"scores of shape {cells.shape} do not fit resamples of {self.shape}")
        raw = self.plain(cells)
        width = float(raw.std())
        if width == 0:
            return raw
        found = spread(cells)
        tail = (1 + level) / 2
        factor = math.sqrt(found.variance) / width * float(stats.t.ppf(tail, found.freedom) / stats.norm.ppf(tail))
        return np.asarray(cells.mean() + factor * (raw - raw.mean()), dtype=np.float64)


@lru_cache(maxsize=16)
def _resamples(draws: int, seeds: int, patients: int, *, count: int = 2000, seed: int = 0) -> Resamples:
    return Resamples(draws, seeds, patients, count=count, seed=seed)


def interval(scores: ArrayLike, *, level: float = 0.95, count: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of crossed cells and its interval; none with fewer than three draws or two patients."""
    cells = crossed(scores)
    value = float(cells.mean())
    if cells.shape[0] < FEWEST_FOR_INTERVAL or cells.shape[2] < 2:
        return Interval(value, None, None, level)
    means = _resamples(*cells.shape, count=count, seed=seed).means(cells, level=level)
    return _bounds(value, means, level)


def _bounds(value: float, resampled: Array, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def compare(method: ArrayLike, baseline: ArrayLike, *, level: float = 0.95) -> Difference:
    """Return what a method gains over its baseline, run by run and patient by patient.

    ``p`` is that of Student's t for the mean over other draws, seeds and patients, from the variance of :func:`spread`.

    Raises:
        ShapeError: The two do not have the same draws, seeds and patients.
    """
    ours, theirs = crossed(method), crossed(baseline)
    if ours.shape != theirs.shape:
        raise ShapeError(f"scores of shapes {ours.shape} and {theirs.shape} cannot be paired")
    cells = ours - theirs
    patients = cells.mean(axis=(0, 1))
    deviation = float(patients.std(ddof=1)) if len(patients) > 1 else 0.0
    found = spread(cells)
    p = None
    if cells.shape[0] >= FEWEST_DRAWS and found.variance > 0:
        p = float(2 * stats.t.sf(abs(cells.mean()) / math.sqrt(found.variance), found.freedom))
    return Difference(
        interval(cells, level=level),
        p,
        float(stats.wilcoxon(patients).pvalue) if len(patients) > 1 and patients.any() else None,
        float(patients.mean()) / deviation if deviation else None,
        cells.shape[0],
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for their number after Holm (1979); None stays and is not counted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = highest
    return adjusted


def detectable_difference(found: Spread, draws: int, patients: int, *, seeds: int = 1, power: float = 0.8) -> float:
    """Return the smallest true difference that a design would find at p < 0.05 with a given power.

    Args:
        found: Spread of paired differences in a pilot.
        draws: Draws of the planned design.
        patients: Its test patients.
        seeds: Its training seeds per draw.
        power: Chance of finding the difference.
    """
    numbers = {"draw": draws, "seed": seeds, "patient": patients}
    variance = sum(v / math.prod(numbers[part] for part in name.split(":")) for name, v in found.components.items())
    freedom = max(1, draws - 1)
    edge = float(stats.t.ppf(0.975, freedom))

    def missing(shift: float) -> float:
        return float(stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift)) - power

    most = 4.0
    while missing(most) < 0:
        most *= 2
    return float(optimize.brentq(missing, 1e-3, most)) * math.sqrt(variance)


def area(budgets: Sequence[float], scores: ArrayLike, *, scale: Literal["linear", "log"] = "linear") -> Array:
    """Return the area under scores [..., budget] by trapezoids, over the span of the budgets: a mean score.

    Raises:
        ShapeError: Fewer than two budgets, they do not rise, or the first is negative (on the logarithmic scale: or 0).
    """
    x = np.asarray(budgets, dtype=np.float64)
    if len(x) < 2 or (np.diff(x) <= 0).any() or x[0] < 0 or (scale == "log" and x[0] == 0):
        raise ShapeError(f"budgets are {list(budgets)}: give two or more, positive (0 where linear) and rising")
    x = np.log2(x) if scale == "log" else x
    return np.asarray(np.trapezoid(np.asarray(scores, dtype=np.float64), x, axis=-1) / (x[-1] - x[0]))


def labels_needed(budgets: Sequence[float], scores: ArrayLike, target: ArrayLike) -> Array:
    """Return how many labels reach a score, on a rising curve fitted to the scores, linear in log labels between budgets.

    ``inf``: not reached at the largest budget. ``0``: already exceeded at the smallest, so that nobody knows how few do.

    Args:
        budgets: Rising.
        scores: [..., budget].
        target: [...], one per curve.
    """
    labels, x = np.asarray(budgets, dtype=np.float64), np.log2(np.asarray(budgets, dtype=np.float64))
    curve, wanted = _rising(np.asarray(scores, dtype=np.float64)), np.asarray(target, dtype=np.float64)[..., None]
    short = (curve < wanted - 1e-9).sum(-1, keepdims=True)  # a level of the fit counts as reached
    after = short.clip(1, len(x) - 1)
    low, high = (np.take_along_axis(curve, index, -1) for index in (after - 1, after))
    share = np.clip((wanted - low) / np.where(high > low, high - low, 1.0), 0, 1)  # beyond is replaced below
    between = 2 ** (x[after - 1] + share * (x[after] - x[after - 1]))
    found = np.where(short == 0, labels[0], between)
    found = np.where(wanted > curve[..., -1:], np.inf, np.where(wanted < curve[..., :1], 0.0, found))
    return np.asarray(found[..., 0])


def _rising(scores: Array) -> Array:
    """Return the isotonic regression of scores [..., budget].

    At each place: the largest, over stretches that begin no later, of the smallest mean over their ends from there on
    (Barlow et al., *Statistical Inference under Order Restrictions*, 1972).
    """
    places = range(scores.shape[-1])
    fitted = np.empty_like(scores)
    lowest = np.full_like(scores, np.inf)  # by begin of a stretch, over the ends from the place on
    means = {(a, b): scores[..., a : b + 1].mean(-1) for a in places for b in places if a <= b}
    for place in reversed(places):
        for begin in range(place + 1):
            lowest[..., begin] = np.minimum(lowest[..., begin], means[begin, place])
        fitted[..., place] = lowest[..., : place + 1].max(-1)
    return fitted


@dataclass(frozen=True)
class Savings:
    """The label-savings factor: labels the baseline needs for the method's score, over the labels the method had.

    Args:
        factor: ``inf``: the baseline does not get there; ``0``: it is better already with the fewest labels.
        low: Lower bound; None without an interval.
        high: Upper bound, ``inf`` where resamples say 'not reached'.
        censored: ``above``: at least ``largest budget / labels``; ``below``: at most ``smallest budget / labels``.
        limit: That bound of a censored factor.
    """

    factor: float
    low: float | None
    high: float | None
    censored: Literal["above", "below"] | None
    limit: float | None


def savings(
    budgets: Sequence[float], baseline: Sequence[ArrayLike], method: ArrayLike, labels: float, *, level: float = 0.95
) -> Savings:
    """Return how many labels a method saves at one budget.

    Args:
        budgets: Labels of the baseline's curve.
        baseline: Its scores [draw, seed, patient] at each of them.
        method: Scores of the method, same draws, seeds and patients.
        labels: What the method had.
        level: Of the interval.
    """
    curve = [crossed(scores) for scores in baseline]
    ours = crossed(method)
    factor = float(labels_needed(budgets, [cells.mean() for cells in curve], ours.mean())) / labels
    censored: Literal["above", "below"] | None = "above" if math.isinf(factor) else "below" if factor == 0 else None
    limit = {"above": budgets[-1] / labels, "below": budgets[0] / labels}.get(censored or "")
    if ours.shape[0] < FEWEST_FOR_INTERVAL or ours.shape[2] < 2:
        return Savings(factor, None, None, censored, limit)
    again = _resamples(*ours.shape)
    means = np.stack([again.means(cells, level=level) for cells in curve], axis=1)
    reached = again.means(ours, level=level)
    factors = labels_needed(budgets, means, reached) / labels
    low, high = np.quantile(factors, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return Savings(factor, float(low), float(high), censored, limit)


def gap_closed(method: float, baseline: float, full: float) -> float | None:
    """Return the share of the distance to full labels that a method closes; None where full labels are no better."""
    return (method - baseline) / (full - baseline) if full > baseline else None


def rank_shares(scores: Iterable[ArrayLike], *, count: int = 1000, seed: int = 0) -> Array:
    """Return [method, rank] shares of resamples in which a method's mean takes a rank (0: best; equals share a rank).

    Args:
        scores: [draw, seed, patient] of each method, same shapes.
        count: Number of resamples.
        seed: Seed of the resampling.
    """
    cells = [crossed(item) for item in scores]
    again = Resamples(*cells[0].shape, count=count, seed=seed)
    means = np.stack([again.plain(item) for item in cells], axis=1)
    ranks = stats.rankdata(-means, method="min", axis=1).astype(int) - 1
    return np.stack([(ranks == rank).mean(axis=0) for rank in range(len(cells))], axis=1)


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of scores of the same methods."""
    return float(stats.kendalltau(first, second).statistic)

"""What annotators that ask share: budgets, rounds, boxes that never overlap. A method says how voxels are scored."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Progress, derive_seed
from labeleff.edits import Question, Reviewed
from labeleff.functional.ripu import select_regions

Unit = Literal["share", "voxels", "regions", "slices", "seconds"]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Origin and size, voxels."""


class Pick(NamedTuple):
    """One region that a case offers, and the stratum whose score it was chosen by."""

    case: str
    box: Box
    score: float
    stratum: int


class Query(Annotator):
    """Regions of unlabelled cases, by a score of their voxels, within a budget that is never exceeded.

    A round may bring what was spent so far to its even share of the whole, so what one round cannot spend the next one can.
    Boxes of a run never overlap, and are cut at the border of the case. With the budget gone, or nothing left to ask,
    nothing is asked, and that is said.

    Args:
        radius: Half width of a region, voxels: one number, or one for each axis of the case; the box has 2·radius + 1.
        budget: How much is asked in all rounds together, in ``unit``.
        unit: ``share`` (of the voxels), ``voxels``, ``regions``, ``slices`` (that regions touch) or ``seconds``.
        per: ``image``: every case has that budget; ``all``: the cases share it, the best regions first.
        rounds: Rounds that share the budget; later revisions of the stage ask nothing.
        most: Regions that one case offers in a round, with ``per: all`` and for the unit ``slices``.
        seconds: Time that one region takes a person, for the unit ``seconds``.
        axis: Axis of slices, for the unit ``slices``.
        rounding: ``down``; ``up``: every round rounds up to whole regions and pays nothing back for those that the border
            cuts, which is what RIPU's authors do, and overspends.
    """

    def __init__(
        self,
        *,
        radius: tuple[int, ...] = (1,),
        budget: float = 0.022,
        unit: Unit = "share",
        per: Literal["image", "all"] = "image",
        rounds: int = 5,
        most: int = 20,
        seconds: float = 60.0,
        axis: int = 0,
        rounding: Literal["down", "up"] = "down",
    ) -> None:
        super().__init__()
        if not radius or min(radius) < 0 or budget < 0 or rounds < 1 or most < 1 or seconds <= 0 or axis < 0:
            raise ValueError("radius, budget and axis are at least 0, rounds and most at least 1, seconds above 0")
        if unit == "share" and budget > 1:
            raise ValueError("budget is a share of the voxels, at most 1; or choose another unit")
        self.radius, self.budget, self.unit, self.per = tuple(radius), budget, unit, per
        self.rounds, self.most, self.seconds, self.axis, self.rounding = rounds, most, seconds, axis, rounding
        self._told: dict[str, float | list[float | None]] = {}

    # -- what a method says -----------------------------------------------------------------------------------------------

    @abstractmethod
    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:
        """Return, for each stratum of a round, its share of the budget and the score [*S] of every voxel as a centre.

        Most methods have one stratum, of share 1. Voxels of score -inf are never asked about.
        """

    def suppressed(self, radius: tuple[int, ...]) -> tuple[int, ...]:
        """Return how far around a pick no other centre of the round may be. Default: until boxes do not overlap."""
        return tuple(2 * r for r in radius)

    # -- asking -----------------------------------------------------------------------------------------------------------

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Question]:
        """Yield the regions of a round, the best first."""
        picks: list[Pick] = []
        asked: dict[str, Sequence[Box]] = {}
        shapes: list[tuple[int, ...]] = []
        shares, voxels, spent, allowed = [1.0], 0, 0.0, 0.0
        for case in cases:
            asked[case.case] = case.asked
            shapes.append(case.label.shape)
            own = self._spent({case.case: case.asked})
            spent, voxels = spent + own, voxels + case.label.size
            left = self._left(case.label.size, case.label.ndim, own, progress)
            allowed += left if self.per == "image" else 0.0
            if progress.round >= self.rounds or (self.per == "image" and left <= 0):
                continue
            scored = self.scores(case, progress)
            shares = [share for share, _ in scored]
            offers = self._offers(case, scored, left)
            lent = partial(_lent, progress, case.case)
            picks += offers if self.per == "all" else self._bought(offers, asked, shares, left, lent)
        if self.per == "all":
            allowed = self._left(voxels, len(next(iter(shapes), ())), spent, progress)
            picks = self._bought(picks, asked, shares, allowed, partial(_lent, progress, ""))
        self._tell(picks, asked, spent, allowed, over=progress.round >= self.rounds)
        for pick in sorted(picks, key=lambda pick: -pick.score):
            yield Question(pick.case, *pick.box, score=pick.score)

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:  # noqa: ARG002
        """Return what the last round asked, and what was spent before it, in the unit of the budget."""
        return self._told

    def _offers(self, case: Reviewed, scored: list[tuple[float, Tensor]], left: float) -> list[Pick]:
        """Return the best regions of a case, stratum by stratum; those of one stratum do not overlap."""
        shape = case.label.shape
        radius = self._radii(len(shape))
        whole = [2 * r + 1 if self.rounding == "up" else min(2 * r + 1, n) for r, n in zip(radius, shape, strict=True)]
        nominal = self._price(whole)
        count = self.most if self.per == "all" or self.unit == "slices" else int(left / nominal + 1e-9)
        blocked = _blocked(case, radius)
        picks = []
        for stratum, (_, score) in enumerate(scored):
            centres = select_regions(score, radius, count, blocked=blocked, suppress=self.suppressed(radius))
            for centre in centres.tolist():
                box = _box(centre, radius, shape)
                picks.append(Pick(case.case, box, float(score[tuple(centre)]), stratum))
        return picks

    def _bought(
        self,
        offers: list[Pick],
        asked: Mapping[str, Sequence[Box]],
        shares: list[float],
        left: float,
        lent: Callable[[], float],
    ) -> list[Pick]:
        """Return the offers that are within the budget: stratum by stratum, the best first.

        Where a stratum's share is not a whole number of regions it is rounded down or up at random, right on average
        (systematic sampling): the first stratum may spend up to one region that the last one then lacks. Of 0.66 of one
        region, rounding down would never leave any.
        """
        taken: dict[str, list[Box]] = {case: list(boxes) for case, boxes in asked.items()}
        region = max([self._price(pick.box[1]) for pick in offers], default=1.0)
        whole = math.floor(left / region + 1e-9) * region if len(shares) > 1 else left
        bought, spent = [], 0.0
        purse = lent() * region if len(shares) > 1 else 0.0
        for stratum, share in enumerate(shares):
            purse += share * whole
            if stratum == len(shares) - 1:
                purse = left - spent
            own = [pick for pick in offers if pick.stratum == stratum]
            for pick in sorted(own, key=lambda pick: -pick.score):  # stable: cases and picks in order
                price = self._extra(pick, taken[pick.case])
                # boxes of one stratum are apart already, and so are all from those of earlier rounds
                met = len(shares) > 1 and any(_overlap(pick.box, box) for box in taken[pick.case])
                if price <= min(purse, left - spent) + 1e-9 and not met:
                    bought.append(pick)
                    taken[pick.case].append(pick.box)
                    purse, spent = purse - price, spent + price
        return bought

    # -- money ------------------------------------------------------------------------------------------------------------

    def _left(self, voxels: int, axes: int, spent: float, progress: Progress) -> float:
        """Return what may be spent in this round, on so many voxels of cases."""
        whole = self.budget * (voxels if self.unit == "share" else 1.0)
        if self.rounding == "down":
            return whole * min(1.0, (progress.round + 1) / self.rounds) - spent
        region = self._price([2 * r + 1 for r in self._radii(axes)])
        return math.ceil(whole / self.rounds / region - 1e-9) * region

    def _price(self, size: Sequence[int]) -> float:
        """Return what a box costs on its own."""
        fixed = {"regions": 1.0, "seconds": self.seconds}
        if self.unit == "slices":
            return float(size[self._axis(len(size))])
        return fixed[self.unit] if self.unit in fixed else float(math.prod(size))

    def _extra(self, pick: Pick, taken: Sequence[Box]) -> float:
        """Return what a region adds to the cost of those of its case: slices that were touched before are free."""
        if self.rounding == "up":
            return self._price([2 * r + 1 for r in self._radii(len(pick.box[1]))])
        if self.unit != "slices":
            return self._price(pick.box[1])
        return float(len(self._slices([pick.box]) - self._slices(taken)))

    def _spent(self, asked: Mapping[str, Sequence[Box]]) -> float:
        if self.unit == "slices":
            return float(sum(len(self._slices(boxes)) for boxes in asked.values()))
        return sum(self._price(size) for boxes in asked.values() for _, size in boxes)

    def _slices(self, boxes: Sequence[Box]) -> set[int]:
        return {
            position
            for origin, size in boxes
            for axis in (self._axis(len(size)),)
            for position in range(origin[axis], origin[axis] + size[axis])
        }

    def _axis(self, axes: int) -> int:
        if self.axis >= axes:
            raise ValueError(f"axis is {self.axis}, but the cases have {axes} axes")
        return self.axis

    def _radii(self, axes: int) -> tuple[int, ...]:
        if len(self.radius) not in (1, axes):
            raise ValueError(
                f"radius is {list(self.radius)}, but the cases have {axes} axes; give one length, or {axes}"
            )
        return self.radius * axes if len(self.radius) == 1 else self.radius

    def _tell(
        self, picks: list[Pick], asked: Mapping[str, Sequence[Box]], spent: float, allowed: float, *, over: bool
    ) -> None:
        cost = self._spent({c: [*boxes, *(p.box for p in picks if p.case == c)] for c, boxes in asked.items()})
        self._told = {"asked_regions": float(len(picks)), "asked": cost - self._spent(asked), "spent_before": spent}
        self.said = ""
        if not picks:
            reason = (
                "the budget is spent" if allowed < 1 else "no region is left that fits into the budget of this round"
            )
            if not spent and allowed >= 1:
                reason += "; take a smaller radius, fewer rounds, a larger budget or per: all"
            reason = f"all {self.rounds} rounds are over" if over else reason
            self.said = (
                f"nothing was asked: {reason} ({spent:.0f} {'voxels' if self.unit == 'share' else self.unit} so far)"
            )


def draws(progress: Progress, case: str, purpose: str) -> torch.Generator:
    """Return a generator that is a function of (seed, stage, step, case, purpose) alone."""
    key = derive_seed(progress.seed, "query", progress.stage, progress.step, case, purpose)
    return torch.Generator().manual_seed(key)


def _lent(progress: Progress, case: str) -> float:
    """Return the share of a region that a case's first stratum is lent, in [0, 1)."""
    return float(torch.rand((), generator=draws(progress, case, "strata")))


def _box(centre: Sequence[int], radius: Sequence[int], shape: Sequence[int]) -> Box:
    """Return the box around a centre, cut at the border."""
    start = tuple(max(0, c - r) for c, r in zip(centre, radius, strict=True))
    stop = tuple(min(n, c + r + 1) for c, r, n in zip(centre, radius, shape, strict=True))
    return start, tuple(b - a for a, b in zip(start, stop, strict=True))


def _blocked(case: Reviewed, radius: Sequence[int]) -> Tensor:
    """Return where no centre may be [*S]: on a known voxel, or where its box would meet one that was asked about."""
    blocked = torch.from_numpy(case.label != IGNORE)
    for origin, size in case.asked:
        around = tuple(slice(max(0, o - r), o + s + r) for o, s, r in zip(origin, size, radius, strict=True))
        blocked[around] = True
    return blocked


def _overlap(one: Box, two: Box) -> bool:
    return all(a < b + t and b < a + s for a, s, b, t in zip(one[0], one[1], two[0], two[1], strict=True))

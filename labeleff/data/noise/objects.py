"""Whole objects missed, invented or given the wrong name, and annotators who each err in a way of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labeleff.batch import IGNORE
from labeleff.data.noise.base import Change, Corrupted, Effect, NoiseModel, Organ, generator
from labeleff.data.noise.boundary import Contour, Distance
from labeleff.errors import RecipeError
from labeleff.registry import register

FEW = 4
GOOD_SIGMA = 0.5
"""Unsteadiness of a good annotator, mm."""
Unit = Literal["auto", "component", "slice"]


def units(organ: Organ, unit: Unit, halfway: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the parts of a structure that are missed or renamed as a whole, and the order in which they are.

    Args:
        organ: The structure.
        unit: ``component``, ``slice`` (the structure on one slice), or ``auto``: slices where a volume has fewer than 4
            components.
        halfway: Size in mm (or voxels) to the number of axes at which a part is half as likely to go as a tiny one.

    Returns:
        [*S] number of each voxel's part, 0 outside; [parts] the rank of each part, small ones early on average.
    """
    parts: NDArray[Any]
    parts, count = ndimage.label(organ.mask, ndimage.generate_binary_structure(organ.mask.ndim, organ.mask.ndim))
    if organ.mask.ndim == 3 and (unit == "slice" or (unit == "auto" and count < FEW)):
        shape = [1, 1, 1]
        shape[organ.slice_axis] = -1
        numbers = np.arange(1, organ.mask.shape[organ.slice_axis] + 1)
        parts = np.where(organ.mask, numbers.reshape(shape), 0)
    sizes = np.bincount(parts.ravel(), minlength=2)[1:] * float(np.prod(organ.voxel))
    weight = halfway / (halfway + sizes)
    keys = np.where(sizes > 0, organ.rng("parts").random(len(sizes)) ** (1 / weight), -1.0)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-keys, kind="stable")] = np.arange(len(sizes))
    return np.asarray(parts, np.int64), rank


def without(organ: Organ, parts: NDArray[np.int64], rank: NDArray[np.int64], count: float, fill: int) -> Change:
    """Return a structure without its first parts, which become something else."""
    gone = np.concatenate([[False], rank < int(count)])
    return Change(organ.mask & ~gone[parts], fill)


@dataclass(frozen=True, kw_only=True)
class _Parts(NoiseModel):
    """What missing and renamed objects share; options of their own are documented there."""

    probability: float = 0.3
    unit: Unit = "auto"
    halfway: float = 1000.0
    directed: ClassVar[bool] = False
    vanishes: ClassVar[bool] = True
    finest: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.probability <= 1 or self.halfway <= 0:
            raise ValueError("probability is in [0, 1], halfway above 0")

    def strength(self, organ: Organ) -> float:
        """Return the number of parts that go, a binomial draw."""
        parts, _ = units(organ, self.unit, self.halfway)
        return float(organ.rng("count").binomial(len(np.unique(parts)) - 1, self.probability))

    def fill(self, organ: Organ) -> int:  # noqa: ARG002
        """Return the class that the parts become."""
        return 0

    def effect(self, organ: Organ) -> Effect:
        """Return the structure without so many of its parts."""
        parts, rank = units(organ, self.unit, self.halfway)
        return lambda s: without(organ, parts, rank, s, self.fill(organ))


@register("noise", "missing")
@dataclass(frozen=True, kw_only=True)
class Missing(_Parts):
    """Objects that were overlooked, small ones more often: components, or what a structure shows on single slices.

    With a target, a Dice between two whole numbers of objects is met on average over cases.

    Args:
        probability: Share of the objects that are missed.
        unit: ``component``, ``slice``, or ``auto``: slices of volumes where a class has fewer than 4 components.
        halfway: Size, in mm to the number of axes, at which an object is half as likely to be missed as a tiny one.
    """


@register("noise", "swap")
@dataclass(frozen=True, kw_only=True)
class Swap(_Parts):
    """Objects given the name of another class: left for right, the neighbouring organ.

    With a target the classes are solved in turn, since what one loses another gains; a small class beside a large one
    may not be able to reach it. With one foreground class the objects become background.

    Args:
        probability: Share of the objects that get another name.
        unit: ``component``, ``slice``, or ``auto``: slices of volumes where a class has fewer than 4 components.
        halfway: Size, in mm to the number of axes, at which an object is half as likely to be renamed as a tiny one.
        to: Per class name, the name it is given; classes that are left out become the next one, the last the first.
    """

    to: Mapping[str, str] = field(default_factory=dict)
    coupled: ClassVar[bool] = True

    def fill(self, organ: Organ) -> int:
        """Return the class that an object becomes."""
        name = organ.names[organ.index]
        if name in self.to:
            if self.to[name] not in organ.names:
                raise RecipeError(
                    f"noise: to.{name}: there is no class {self.to[name]!r}; classes are {', '.join(organ.names)}"
                )
            return organ.names.index(self.to[name])
        following = organ.index % (len(organ.names) - 1) + 1
        return following if following != organ.index else 0


@register("noise", "spurious")
@dataclass(frozen=True, kw_only=True)
class Spurious(NoiseModel):
    """Objects that are not there: ellipsoids in the background, away from anything true.

    Without a target cases also get objects of classes that they do not have; such a class has no Dice to search for.

    Args:
        rate: Mean number of objects per case and class (Poisson).
        radius: Semi-axes are drawn evenly between these, mm.
        gap: Distance kept from true objects, mm.
    """

    rate: float = 1.0
    radius: tuple[float, float] = (3.0, 8.0)
    gap: float = 2.0
    directed: ClassVar[bool] = False
    invents: ClassVar[bool] = True

    def strength(self, organ: Organ) -> float:
        """Return the number of objects."""
        return float(organ.rng("count").poisson(self.rate))

    def effect(self, organ: Organ) -> Effect:
        """Return the structure and the first so many objects; of a fraction, one that is not yet full-grown."""
        free = organ.label == 0
        away = np.asarray(ndimage.distance_transform_edt(free, sampling=organ.voxel))
        if free.all():  # from nothing there is no distance
            away.fill(np.inf)
        places = np.argwhere(away > self.gap)
        rng, grid = organ.rng("objects"), np.indices(organ.mask.shape, dtype=np.float64)
        when = np.full(organ.mask.shape, np.inf)
        reached = 0

        def grown(s: float) -> Change:
            nonlocal reached
            while reached < min(s, 500) and len(places):
                centre, radii = places[rng.integers(len(places))], rng.uniform(*self.radius, organ.mask.ndim)
                scale = np.asarray(organ.voxel) / radii
                offset = [(axis - c) * k for axis, c, k in zip(grid, centre, scale, strict=True)]
                inner = np.sqrt(sum(o**2 for o in offset)) ** organ.mask.ndim
                inner[(inner >= 1) | (away <= self.gap)] = np.inf
                np.minimum(when, reached + inner, out=when)
                reached += 1
            return Change(organ.mask | (when < s), free=True)

        return grown


Persona = Literal["good", "over", "under", "wrong", "unsteady", "blank"]


@register("noise", "personas")
@dataclass(frozen=True, kw_only=True)
class Personas(NoiseModel):
    """Annotators who each err in a way of their own, one of them per case: systematic within an annotator.

    After the annotators of Zhang et al., "Disentangling Human Error from the Ground Truth in Segmentation of Medical
    Images", NeurIPS 2020: good, over- and under-segmenting, wrong (objects renamed, or missed where there is one class),
    blank. ``unsteady`` jitters contours. With a target, over, under, wrong and unsteady are solved for it; good lies
    a quarter as far from 1, blank is empty, so either moves the mean. ``over`` and ``per_class`` are refused: who errs how is said
    by ``people``.

    Args:
        people: The annotators; cases are dealt out to them at random.
        level: Bias of the over- and under-segmenting ones without a target: drawn once for each annotator, mm.
    """

    people: tuple[Persona, ...] = ("over", "under", "wrong", "unsteady")
    level: tuple[float, float] = (2.0, 4.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.people:
            raise ValueError("people names at least one annotator")
        if self.over != NoiseModel.over:
            raise ValueError("over: annotators err in directions of their own; list over and under in people")
        if self.per_class:
            raise ValueError("per_class: annotators err in different ways and have no options in common; leave it out")

    def strength(self, organ: Organ) -> float:
        """Not asked for: the annotators' models are."""
        raise NotImplementedError

    def effect(self, organ: Organ) -> Effect:
        """Not asked for: the annotators' models are."""
        raise NotImplementedError

    def annotator(self, case: str) -> int:
        """Return the number of the annotator of a case."""
        return int(generator("persona", self.seed, case).integers(len(self.people)))

    def _wrong(
        self,
        label: NDArray[np.uint8],
        case: str,
        names: Sequence[str],
        spacing: Sequence[float] | None,
        slice_axis: int,
    ) -> Corrupted:
        """Return the label map that the case's annotator draws."""
        number = self.annotator(case)
        if self.people[number] == "blank":
            return Corrupted(np.where(label == IGNORE, IGNORE, 0).astype(np.uint8), {}, {})
        model = self._model(number, len(names))
        return model.corrupt(label, case=case, names=names, spacing=spacing, slice_axis=slice_axis)

    def _model(self, number: int, classes: int) -> NoiseModel:
        person = self.people[number]
        shared: dict[str, Any] = {
            key: getattr(self, key) for key in ("target_dice", "spread", "protect", "order", "in_plane", "seed")
        }
        level = float(generator("persona", self.seed, number).uniform(*self.level))
        if person in ("over", "under"):
            return Distance(over=float(person == "over"), level=(level, level), **shared)
        if person == "wrong":
            return Swap(**shared) if classes > 2 else Missing(**shared)
        if person == "unsteady":
            return Contour(**shared)
        aim = None if self.target_dice is None else 1 - (1 - self.target_dice) / 4
        return Contour(**{**shared, "target_dice": aim}, sigma=GOOD_SIGMA)

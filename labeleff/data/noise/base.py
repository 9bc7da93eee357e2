"""The contract of a label-noise model, and what models share: classes one after the other, and the search for a target.

A noisy label map is a pure function of (options, seed, case id, clean map, spacing): it does not depend on which other
cases there are, so budgets stay nested. Lengths are millimetres where the spacing is known, else voxels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE, derive_seed
from labeleff.errors import RecipeError

Mask = NDArray[np.bool_]
TOLERANCE = 0.004
"""A class is done where its Dice is this near to the target."""
NEAR = 0.02
"""Further away than this, the other direction is tried: an organ without background beside it cannot grow."""
HALVINGS, DOUBLINGS, SWEEPS, ATTEMPTS = 24, 12, 8, 12
NEVER = 1e6
"""Distance between slices that nothing crosses, mm."""


class Change(NamedTuple):
    """What becomes of one class.

    ``mask`` is where it is now. What it leaves becomes ``fill``; what it takes must be background, if so asked, and
    nearer to it than to any other class, unless it is ``free``: else a chamber would grow beyond its wall. ``erase`` is
    set to background whatever was there.
    """

    mask: Mask
    fill: int = 0
    erase: Mask | None = None
    free: bool = False


class Corrupted(NamedTuple):
    """A noisy label map, and per class index the strength it took and the Dice with the clean map that it has."""

    label: NDArray[np.uint8]
    strength: Mapping[int, float]
    dice: Mapping[int, float]


@dataclass(frozen=True)
class Organ:
    """One class of one case as a model sees it.

    Args:
        mask: [*S] where the class is.
        label: [*S] the clean map.
        index: The class.
        names: All classes.
        lengths: Distance between voxels per axis, mm (voxels where unknown).
        slice_axis: Axis of the slices of a volume.
        over: Whether the error is one of too much rather than too little.
        key: What the draws depend on.
    """

    mask: Mask
    label: NDArray[np.uint8]
    index: int
    names: tuple[str, ...]
    lengths: tuple[float, ...]
    slice_axis: int
    over: bool
    key: tuple[str | int, ...]

    def rng(self, purpose: str, *, of_case: bool = False) -> np.random.Generator:
        """Return a generator for one purpose, of this class or shared by all classes of the case."""
        return generator(*self.key, *(() if of_case else (self.index,)), purpose)

    @property
    def voxel(self) -> tuple[float, ...]:
        """Distance between voxels per axis, that between slices too where nothing crosses them (it is then 1)."""
        return tuple(1.0 if n == NEVER else n for n in self.lengths)

    @property
    def plane(self) -> tuple[int, ...]:
        """The axes within a slice."""
        return tuple(a for a in range(self.mask.ndim) if self.mask.ndim == 2 or a != self.slice_axis)

    def slices(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view [slices, *plane] of an array of the case."""
        return array[None] if array.ndim == 2 else np.moveaxis(array, self.slice_axis, 0)


Effect = Callable[[float], Change]


def generator(*key: str | int) -> np.random.Generator:
    """Return a generator that is a function of its key alone."""
    return np.random.Generator(np.random.Philox(derive_seed("label-noise", *key)))


def dice(one: Mask, two: Mask) -> float:
    """Return the Dice coefficient of two masks; 1 where both are empty."""
    total = int(one.sum()) + int(two.sum())
    return 2 * int((one & two).sum()) / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class NoiseModel(ABC):
    """A way of getting labels wrong. Subclasses are frozen dataclasses; their fields are a recipe's options.

    Args:
        target_dice: Dice with the clean map that each class of each case is to have; null: the model's own parameters.
        spread: Targets of cases are spread evenly by so much to either side.
        over: Share of cases in which structures are drawn too large rather than too small, all classes alike: 0.5 is
            unbiased, 0 or 1 is biased, the systematic error that networks learn.
        share: Share of cases that are touched at all.
        protect: Grow into background only. Otherwise later classes overwrite earlier ones, and targets are met before
            they do.
        order: Indices of classes in the order in which they are changed; empty: as they are numbered.
        in_plane: Err in every slice of a volume for itself, as an annotator does who draws slice by slice.
        per_class: Per class name, options that differ for it.
        seed: Seed of everything drawn.
    """

    target_dice: float | None = None
    spread: float = 0.0
    over: float = 0.5
    share: float = 1.0
    protect: bool = True
    order: tuple[int, ...] = ()
    in_plane: bool = False
    per_class: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    directed: ClassVar[bool] = True
    """Whether the model knows too much and too little."""
    vanishes: ClassVar[bool] = False
    """Whether a structure may disappear; otherwise one voxel of it is kept."""
    coupled: ClassVar[bool] = False
    """Whether a change of one class changes the Dice of others, so that targets are met by going round."""
    invents: ClassVar[bool] = False
    """Whether a case gets classes that it does not have; without a target, since nothing is the Dice of such a class."""
    finest: ClassVar[float] = 0.0
    """Strengths closer than this to one another do the same."""
    first_try: ClassVar[float] = 1.0
    """Strength at which the search for a target begins."""

    def __post_init__(self) -> None:
        if self.target_dice is not None and not 0 < self.target_dice <= 1:
            raise ValueError(f"target_dice is a Dice coefficient in (0, 1], not {self.target_dice}")
        if not 0 <= self.over <= 1 or not 0 <= self.share <= 1 or self.spread < 0:
            raise ValueError("over and share are shares in [0, 1], spread is 0 or more")
        known = {f.name for f in fields(self)} - {"per_class", "seed", "order", "share"}
        for name, options in self.per_class.items():
            for key in options:
                if key not in known:
                    raise ValueError(f"per_class.{name}: no option {key!r}; known: {', '.join(sorted(known))}")
            replace(self, per_class={}, **options)

    @abstractmethod
    def effect(self, organ: Organ) -> Effect:
        """Return how a class changes with the strength of the noise; 0 changes nothing."""

    @abstractmethod
    def strength(self, organ: Organ) -> float:
        """Return the strength by the model's own parameters."""

    def corrupt(
        self,
        label: NDArray[np.uint8],
        *,
        case: str,
        names: Sequence[str],
        spacing: Sequence[float] | None = None,
        slice_axis: int = 0,
    ) -> Corrupted:
        """Return a noisy version of a label map.

        Args:
            label: [*S] clean map, 2-D or 3-D; voxels of IGNORE stay and count for nothing.
            case: Id of the case.
            names: Names of the classes, background first.
            spacing: Voxel size per axis, mm; None or NaN: unknown, lengths are voxels.
            slice_axis: Axis of the slices of a volume.

        Raises:
            RecipeError: ``per_class`` names no class, or ``order`` an index that is none.
        """
        self._check_names(names)
        if not self.touches(case):
            return Corrupted(label.copy(), {}, {})
        return self._wrong(label, case, names, spacing, slice_axis)

    def _wrong(
        self,
        label: NDArray[np.uint8],
        case: str,
        names: Sequence[str],
        spacing: Sequence[float] | None,
        slice_axis: int,
    ) -> Corrupted:
        """Return what becomes of a case that is touched; see :meth:`corrupt`."""
        key = (type(self).__name__, self.seed, case)
        _, direction, place = self._draws(case)
        lengths = self._lengths(label.ndim, spacing, slice_axis)
        tried: list[tuple[float, _Composer, dict[int, float], dict[int, Organ]]] = []
        for attempt in range(ATTEMPTS if self.coupled and self.target_dice is not None else 1):
            organs: dict[int, Organ] = {}
            for c in dict.fromkeys((*self.order, *range(1, len(names)))):
                model = self.of(names[c])
                if (mask := label == c).any() or (model.invents and model.target_dice is None):
                    over = bool(direction < model.over)
                    own = (*key, attempt) if attempt else key
                    organs[c] = Organ(mask, label, c, tuple(names), lengths, slice_axis, over, own)
            found = _Composer(label, self.protect, lengths)
            strengths, off = self._solve(found, organs, float(place))
            tried.append((off, found, strengths, organs))
            if off <= NEAR or len(organs) < 2:  # of one class, rounding at random keeps the mean where it belongs
                break
        _, found, strengths, organs = min(tried, key=lambda entry: entry[0])
        noisy = found.label()
        if not self.vanishes:
            _keep_one_voxel(noisy, organs)
        return Corrupted(noisy, strengths, {c: dice((noisy == c), organ.mask) for c, organ in organs.items()})

    def _solve(self, found: _Composer, organs: Mapping[int, Organ], place: float) -> tuple[dict[int, float], float]:
        """Change the classes one after the other, each to the strength it takes.

        Returns:
            The strengths, and how far the Dice of the worst class is from its aim.
        """
        models = {c: self.of(organ.names[c]) for c, organ in organs.items()}
        aims = {c: model._aim(place) for c, model in models.items()}
        effects = {c: models[c].effect(organ) for c, organ in organs.items()}
        strengths: dict[int, float] = {}
        for _ in range(SWEEPS if self.coupled else 1):
            for c, organ in organs.items():
                aim = aims[c]
                if aim is None:
                    strengths[c] = models[c].strength(organ)
                else:
                    strengths[c], reached = self._reach(found, organ, effects[c], aim)
                    if self.directed and abs(reached - aim) > NEAR:
                        other = models[c].effect(replace(organ, over=not organ.over))
                        strength, instead = self._reach(found, organ, other, aim)
                        if abs(instead - aim) < abs(reached - aim):
                            effects[c], strengths[c] = other, strength
                found.changes[c] = effects[c](strengths[c])
            if all(aim is None or abs(found.dice(c) - aim) <= TOLERANCE for c, aim in aims.items()):
                break
        return strengths, max((abs(found.dice(c) - a) for c, a in aims.items() if a is not None), default=0.0)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in self.per_class:
            if name not in names[1:]:
                raise RecipeError(f"noise: per_class: there is no class {name!r}; classes are {', '.join(names[1:])}")
        if any(not 0 < c < len(names) for c in self.order):
            raise RecipeError(f"noise: order: {list(self.order)} has an index that is no class 1 … {len(names) - 1}")

    def touches(self, case: str) -> bool:
        """Return whether the labels of a case are made wrong at all."""
        return bool(self._draws(case)[0] < self.share)

    def _draws(self, case: str) -> NDArray[np.float64]:
        return generator(type(self).__name__, self.seed, case, "case").random(3)

    def of(self, name: str) -> NoiseModel:
        """Return the model with the options of one class."""
        return replace(self, per_class={}, **self.per_class[name]) if name in self.per_class else self

    def _aim(self, place: float) -> float | None:
        """Return the Dice a class is to have in a case, whose place among all cases is a number in [0, 1]."""
        if self.target_dice is None:
            return None
        return min(1.0, max(0.01, self.target_dice + self.spread * (2 * place - 1)))

    def _lengths(self, axes: int, spacing: Sequence[float] | None, slice_axis: int) -> tuple[float, ...]:
        known = spacing is not None and not np.isnan(spacing).any()
        lengths = [float(s) for s in spacing] if known and spacing is not None else [1.0] * axes
        if self.in_plane and axes == 3:
            lengths[slice_axis] = NEVER
        return tuple(lengths)

    def _reach(self, found: _Composer, organ: Organ, effect: Effect, aim: float) -> tuple[float, float]:
        """Return the strength at which the class has the Dice that is aimed at, and that Dice.

        Doubles the strength until the Dice falls below the aim, then halves the interval. Where the Dice jumps over the
        aim (whole objects) a draw decides between the two sides, so that the aim is met on average over cases.
        """

        def at(strength: float) -> float:
            found.changes[organ.index] = effect(strength)
            return found.dice(organ.index)

        low, high = (0.0, at(0.0)), (self.first_try, at(self.first_try))
        best = min(low, high, key=lambda point: abs(point[1] - aim))
        for _ in range(DOUBLINGS):
            if high[1] <= aim:
                break
            low, high = high, (2 * high[0], at(2 * high[0]))
            best = min(best, high, key=lambda point: abs(point[1] - aim))
        if not low[1] >= aim >= high[1]:
            return best
        for _ in range(HALVINGS):
            if abs(best[1] - aim) <= TOLERANCE:
                return best
            if high[0] - low[0] <= self.finest:
                break
            middle = (low[0] + high[0]) / 2
            point = middle, at(middle)
            best = min(best, point, key=lambda point: abs(point[1] - aim))
            low, high = (point, high) if point[1] > aim else (low, point)
        share = (low[1] - aim) / max(low[1] - high[1], 1e-12)
        return high if organ.rng("rounding").random() < share else low


class _Composer:
    """A label map with some classes changed, one after the other."""

    def __init__(self, label: NDArray[np.uint8], protect: bool, lengths: tuple[float, ...]) -> None:
        self.clean, self.protect, self.changes = label, protect, dict[int, Change]()
        self.owner = nearest_class(label, lengths) if protect else label

    def label(self) -> NDArray[np.uint8]:
        """Return the map with the changes so far."""
        noisy, known = self.clean.copy(), self.clean != IGNORE
        for c, change in self.changes.items():
            ours = self.clean == c
            noisy[ours & ~change.mask & (noisy == c)] = change.fill
            taken = change.mask & ~ours & known
            if self.protect:
                taken &= noisy == 0
                taken &= change.free | (self.owner == c)
            noisy[taken] = c
            if change.erase is not None:
                noisy[change.erase & known] = 0
        return noisy

    def dice(self, c: int) -> float:
        """Return the Dice of a class with its clean self."""
        return dice(self.label() == c, self.clean == c)


def nearest_class(label: NDArray[np.uint8], lengths: tuple[float, ...]) -> NDArray[np.uint8]:
    """Return the nearest foreground class of every voxel [*S]; 0 everywhere where there is none."""
    from scipy import ndimage

    foreground = (label > 0) & (label != IGNORE)
    if not foreground.any():
        return np.zeros_like(label)
    nearest = ndimage.distance_transform_edt(~foreground, lengths, return_distances=False, return_indices=True)
    owner: NDArray[np.uint8] = label[tuple(nearest)]
    return owner


def _keep_one_voxel(noisy: NDArray[np.uint8], organs: Mapping[int, Organ]) -> None:
    """Give a class that has vanished the innermost of its voxels back."""
    from scipy import ndimage

    for c, organ in organs.items():
        if organ.mask.any() and not (noisy == c).any():
            depth = ndimage.distance_transform_edt(organ.mask, sampling=organ.lengths)
            noisy[np.unravel_index(int(np.argmax(depth)), depth.shape)] = c

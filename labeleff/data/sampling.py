"""Which patch comes when: a pure function of (seed, stage, step, stream, sample), never of history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed

Places = Callable[[str], Sequence[NDArray[np.int64]]]
"""Coordinates [n, A] of voxels of a case that samples may be centred on; one array per group, of equal odds."""


@dataclass(frozen=True)
class StreamPlan:
    """A stream bound to cases.

    Args:
        cases: Whose samples.
        batch: Samples per optimiser step, over all processes and micro-batches.
        foreground: Share of samples centred on a labelled foreground voxel.
        known: Share of samples drawn from cases of which something is known, and centred on a labelled voxel.
        patch: Size of a sample, voxels; None: the patch of the run.
        slices: Where volumes are seen slice by slice, the slices of every case that are labelled; None: all.
        partitions: One sample from each of so many parts of every volume that is drawn, volume after volume; 0: samples are
            drawn one by one.
        along: The axis of these parts.
        volumes: The fewest volumes that a process must see at a time.
        least: The fewest samples that a process must see at a time.
    """

    cases: tuple[str, ...]
    batch: int
    foreground: float = 0.0
    known: float = 0.0
    patch: tuple[int, ...] | None = None
    slices: tuple[tuple[int, ...], ...] | None = None
    partitions: int = 0
    along: int = 0
    volumes: int = 1
    least: int = 1


@dataclass(frozen=True)
class Spot:
    """Where a sample lies in its case. The origin is negative where the case is smaller than the patch."""

    case: str
    origin: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """What a draw depends on."""

    seed: int
    stage: int
    step: int
    stream: str
    sample: int

    def number(self, purpose: str) -> int:
        """Return a seed for one purpose."""
        return derive_seed(self.seed, "sample", self.stage, self.step, self.stream, self.sample, purpose)

    def generator(self, purpose: str) -> np.random.Generator:
        """Return a generator for one purpose."""
        return np.random.Generator(np.random.Philox(self.number(purpose)))


@lru_cache(maxsize=16)
def _permutation(seed: int, stage: int, stream: str, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(derive_seed(seed, "epoch", stage, stream, epoch))).permutation(length)


@lru_cache(maxsize=16)
def _drawn(seed: int, stage: int, stream: str, step: int, length: int, count: int) -> NDArray[np.int64]:
    """Return which cases a step draws, all of them different."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "volumes", stage, stream, step)))
    return generator.choice(length, count, replace=False)


def part_of(places: int, parts: int, part: int) -> tuple[int, int]:
    """Return the first place of a part, and the first after it: those z with ``floor(parts (z + 1/2) / places) == part``.

    No place is left out, and where there are as many places as parts or more no part is empty.
    """
    start, stop = (-((parts - 2 * places * p) // (2 * parts)) for p in (part, part + 1))
    return start, stop


class Sampler:
    """Spots of a stream: every item once per epoch, in an order that is drawn anew for each epoch.

    An item is a case, or a slice of a case where the network sees volumes slice by slice. With partitions each step draws
    its volumes, and of every part one place: the parts are equal shares of the places where a sample can lie in the volume.

    Args:
        plan: The stream.
        shapes: Shapes of the cases of the plan, in its order.
        patch: Patch of the network, voxels.
        slice_axis: Axis that is cut into slices, or None.
        told: The cases of the plan of which something is known.
    """

    def __init__(
        self,
        plan: StreamPlan,
        shapes: Sequence[tuple[int, ...]],
        patch: tuple[int, ...],
        slice_axis: int | None,
        told: Sequence[str] = (),
    ) -> None:
        self.plan, self.shapes, self.slice_axis = plan, shapes, slice_axis
        # looked up by name only where a stream draws from what is known: of many cases a table is much to keep
        self._numbers = {case: number for number, case in enumerate(plan.cases)} if plan.known else {}
        self.told = [case for case in told if case in self._numbers]
        self.size = patch if slice_axis is None else (*patch[:slice_axis], 1, *patch[slice_axis:])
        counts = [1 if slice_axis is None else shape[slice_axis] for shape in shapes]
        if plan.slices is not None:
            counts = [len(own) for own in plan.slices]
        self._ends = np.cumsum(counts)

    def spot(self, key: Key, foreground: Places, labelled: Places = lambda case: ()) -> Spot:  # noqa: ARG005
        """Return where a sample lies.

        Args:
            key: What the draw depends on.
            foreground: Labelled foreground voxels of a case, by class.
            labelled: Labelled voxels of a case.
        """
        if self.plan.partitions:
            return self._in_part(key)
        items = int(self._ends[-1])
        position = key.step * self.plan.batch + key.sample
        order = _permutation(key.seed, key.stage, key.stream, position // items, items)
        item = int(order[position % items])
        number = int(np.searchsorted(self._ends, item, side="right"))
        case, shape = self.plan.cases[number], self.shapes[number]
        generator = key.generator("origin")
        origin = [_uniform(generator, n, size) for n, size in zip(shape, self.size, strict=True)]
        if self.slice_axis is not None:
            index = item - (int(self._ends[number - 1]) if number else 0)
            origin[self.slice_axis] = index if self.plan.slices is None else self.plan.slices[number][index]
        if self.plan.foreground and generator.random() < self.plan.foreground:
            return self._centred(case, shape, origin, foreground(case), generator)
        if self.told and self.plan.known and generator.random() < self.plan.known:
            case = self.told[int(generator.integers(len(self.told)))]
            shape = self.shapes[self._numbers[case]]
            return self._centred(case, shape, origin, labelled(case), generator)
        return Spot(case, tuple(origin), self.size)

    def _in_part(self, key: Key) -> Spot:
        """Return a spot in one part of one of the step's volumes."""
        parts, axis = self.plan.partitions, self.plan.along
        count = self.plan.batch // parts
        drawn = _drawn(key.seed, key.stage, key.stream, key.step, len(self.plan.cases), count)
        number = int(drawn[key.sample // parts])
        shape, generator = self.shapes[number], key.generator("origin")
        origin = [_uniform(generator, n, size) for n, size in zip(shape, self.size, strict=True)]
        start, stop = part_of(shape[axis] - self.size[axis] + 1, parts, key.sample % parts)
        origin[axis] = start + int(generator.integers(stop - start))
        return Spot(self.plan.cases[number], tuple(origin), self.size)

    def _centred(
        self,
        case: str,
        shape: tuple[int, ...],
        origin: Sequence[int],
        groups: Sequence[NDArray[np.int64]],
        generator: np.random.Generator,
    ) -> Spot:
        """Return a spot around one of some voxels, or at the origin where there are none."""
        if groups:
            voxels = groups[int(generator.integers(len(groups)))]
            centre = voxels[int(generator.integers(len(voxels)))]
            origin = [_around(int(c), n, size) for c, n, size in zip(centre, shape, self.size, strict=True)]
        return Spot(case, tuple(origin), self.size)


def _uniform(generator: np.random.Generator, length: int, size: int) -> int:
    """Return any legal origin, both ends included; a case smaller than the patch is centred in it."""
    return int(generator.integers(length - size + 1)) if length >= size else -((size - length) // 2)


def _around(centre: int, length: int, size: int) -> int:
    """Return the legal origin that puts a voxel nearest to the middle of the patch."""
    return min(max(centre - size // 2, 0), length - size) if length >= size else -((size - length) // 2)

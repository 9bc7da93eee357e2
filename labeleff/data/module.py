"""From plans to batches. An item of :class:`StepData` is everything one process needs for one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from labeleff.batch import IGNORE, Batch, Geometry
from labeleff.data import augment as augmentation
from labeleff.data.annotations import AnnotationStore
from labeleff.data.parcel import Parcel
from labeleff.data.sampling import Key, Sampler, Spot, StreamPlan
from labeleff.data.store import ImageStore
from labeleff.errors import RecipeError
from labeleff.functional.raters import soft_labels


def check_shares(plans: Mapping[str, StreamPlan], *, accumulate: int, world: int, where: str) -> None:
    """Raise where the batch of a stream cannot be shared out over processes and micro-batches.

    Args:
        plans: Streams by name.
        accumulate: Micro-batches per optimiser step.
        world: Number of processes.
        where: The stage, for messages.

    Raises:
        RecipeError: It cannot.
    """
    shares = accumulate * world
    for name, plan in plans.items():
        if plan.batch % shares:
            raise RecipeError(
                f"{where}: the batch of {plan.batch} in stream {name!r} cannot be shared out evenly over "
                f"{world} processes × {accumulate} micro-batches; make it a multiple of {shares}"
            )
        own = plan.batch // shares
        if plan.partitions and (own % plan.partitions or own < plan.partitions * plan.volumes):
            raise RecipeError(
                f"{where}: a process sees {own} samples of stream {name!r} at a time, but needs {plan.partitions} "
                f"of each of at least {plan.volumes} volumes; make the batch a multiple of "
                f"{shares * plan.partitions}, at least {shares * plan.partitions * plan.volumes}"
            )
        if own < plan.least:
            raise RecipeError(
                f"{where}: a process sees {own} sample{'s' * (own > 1)} of stream {name!r} at a time, but needs {plan.least} that "
                f"are told from one another; make the batch at least {shares * plan.least}"
            )


class StepData(Dataset[dict[str, Batch]]):
    """The micro-batches of the optimiser steps ``first_step`` … ``last_step`` - 1 of a stage, for one process.

    Sample i of a step is the same sample whatever the number of processes, micro-batches and workers: they only share
    it out. The labels read are those of one revision.

    Args:
        store: Images.
        annotations: Labels.
        plans: Streams by name.
        first_step: Steps already done.
        last_step: Where to stop.
        accumulate: Micro-batches per optimiser step.
        revision: Revision of the labels.
        patch: Patch of the network, voxels.
        slice_axis: Axis that is cut into slices, or None.
        augment: What is drawn per sample.
        seed: Seed of the run.
        stage: Number of the stage.
        num_classes: K; where it is given, streams with cases of several raters get ``Batch.soft``.
        priors: Expected shares [1, K] of the classes in a case, or [n, K] in its slices: where a stream has such cases, its
            batches have ``extras["prior"]`` [B, K], NaN for the others.
        rank: This process.
        world: Number of processes.

    Raises:
        RecipeError: A batch cannot be shared out evenly.
    """

    def __init__(
        self,
        store: ImageStore,
        annotations: AnnotationStore,
        plans: Mapping[str, StreamPlan],
        *,
        first_step: int,
        last_step: int,
        accumulate: int = 1,
        revision: int = 0,
        patch: tuple[int, ...],
        slice_axis: int | None = None,
        augment: augmentation.Augment,
        seed: int,
        stage: int,
        num_classes: int | None = None,
        priors: Mapping[str, NDArray[np.float32]] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_shares(plans, accumulate=accumulate, world=world, where=f"stages.{stage}")
        self.store, self.annotations, self.plans = store, annotations, dict(plans)
        self.first_step, self.last_step, self.accumulate = first_step, last_step, accumulate
        self.revision, self.patch, self.slice_axis, self.augment = revision, tuple(patch), slice_axis, augment
        self.seed, self.stage, self.rank, self.world = seed, stage, rank, world
        self.priors = {
            name: own
            for name, plan in self.plans.items()
            if (own := {case: priors[case] for case in plan.cases if priors is not None and case in priors})
        }
        self.samplers = {name: self._sampler(plan) for name, plan in self.plans.items()}
        # a stream has soft labels in every step or in none, whoever happens to be drawn
        self.soft = {
            name: num_classes
            for name, plan in self.plans.items()
            if num_classes is not None and any(annotations.has_votes(case) for case in plan.cases)
        }

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __getitem__(self, index: int) -> dict[str, Batch]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, micro = self.first_step + index // self.accumulate, index % self.accumulate
        return {name: self._batch(name, step, micro) for name in self.plans}

    def _batch(self, name: str, step: int, micro: int) -> Batch:
        share = self.plans[name].batch // (self.accumulate * self.world)
        start = (micro * self.world + self.rank) * share
        keys = [Key(self.seed, self.stage, step, name, i) for i in range(start, start + share)]
        spots = [self.samplers[name].spot(key, self._foreground, self._labelled) for key in keys]
        samples = [self._read(spot) for spot in spots]
        size = samples[0][0].shape[1:]
        draws = [augmentation.draw(self.augment, key.generator("augment"), size) for key in keys]
        label = torch.from_numpy(np.stack([s[1] for s in samples])).long()
        given = label
        if any(self.annotations.edited(spot.case, self.revision) for spot in spots):
            given = torch.from_numpy(np.stack([s[2] for s in samples])).long()
        soft = None
        if name in self.soft:
            shares = [self._soft(spot, s[1], self.soft[name]) for spot, s in zip(spots, samples, strict=True)]
            soft = torch.from_numpy(np.stack(shares))
        return Batch(
            image=torch.from_numpy(np.stack([s[0] for s in samples])),
            label=label,
            given=given,
            valid=torch.from_numpy(np.stack([s[3] for s in samples]))[:, None],
            geometry=Geometry(
                case=torch.tensor([self.store.index(spot.case) for spot in spots]),
                origin=torch.tensor([spot.origin for spot in spots]),
                size=torch.tensor([spot.size for spot in spots]),
                shape=torch.tensor([self.store.shape(spot.case) for spot in spots]),
                spacing=torch.tensor([self.store.spacing(spot.case) for spot in spots]),
                affine=torch.from_numpy(np.stack([d[0] for d in draws])),
                intensity=torch.from_numpy(np.stack([d[1] for d in draws])),
                sample=torch.tensor([key.number("noise") for key in keys]),
            ),
            soft=soft,
            extras=self._extras(name, spots),
        )

    def _sampler(self, plan: StreamPlan) -> Sampler:
        told = [case for case in plan.cases if plan.known and self.annotations.known(case, self.revision)]
        shapes = [self.store.shape(case) for case in plan.cases]
        return Sampler(plan, shapes, plan.patch or self.patch, self.slice_axis, told)

    def _foreground(self, case: str) -> tuple[NDArray[np.int64], ...]:
        return self.annotations.foreground(case, self.revision)

    def _labelled(self, case: str) -> tuple[NDArray[np.int64], ...]:
        return self.annotations.labelled_voxels(case, self.revision)

    def _extras(self, name: str, spots: list[Spot]) -> dict[str, torch.Tensor]:
        """Return what is known beforehand of the images that spots lie in."""
        if name not in self.priors:
            return {}
        priors = self.priors[name]
        unknown = np.full_like(next(iter(priors.values()))[0], np.nan)
        rows = []
        for spot in spots:
            own = priors.get(spot.case)
            row = (
                spot.origin[self.slice_axis] if own is not None and len(own) > 1 and self.slice_axis is not None else 0
            )
            rows.append(unknown if own is None else own[row])
        return {"prior": torch.from_numpy(np.stack(rows))}

    def _read(self, spot: Spot) -> tuple[NDArray[Any], ...]:
        """Return image [C, *S], label [*S], given label [*S] and validity [*S] of a spot, padded to the patch."""
        window, inside = self._window(spot)
        image = self.store.read(spot.case, window)
        label = self.annotations.read(spot.case, window, revision=self.revision)
        edited = self.annotations.edited(spot.case, self.revision)
        given = self.annotations.read_given(spot.case, window) if edited else label
        if image.shape[1:] == spot.size:
            valid = np.ones(spot.size, bool)
        else:
            valid = np.zeros(spot.size, bool)
            valid[inside] = True
            image = _padded(image, spot.size, inside, 0.0)
            label = _padded(label, spot.size, inside, IGNORE)
            given = _padded(given, spot.size, inside, IGNORE) if edited else label
        if self.slice_axis is None:
            return image, label, given, valid
        axis = self.slice_axis
        return tuple(np.take(array, 0, axis=axis - 3) for array in (image, label, given, valid))

    def _soft(self, spot: Spot, label: NDArray[np.uint8], num_classes: int) -> NDArray[np.float32]:
        """Return the shares of the raters [K, *S] of a spot, or its one label [*S] as such where there are none."""
        window, inside = self._window(spot)
        votes = self.annotations.read_votes(spot.case, window, revision=self.revision)
        if votes is None:
            return soft_labels(label[None], num_classes)
        votes = _padded(votes, spot.size, inside, IGNORE)
        if self.slice_axis is not None:
            votes = np.take(votes, 0, axis=self.slice_axis - 3)
        return soft_labels(votes, num_classes)

    def _window(self, spot: Spot) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of the case that a spot covers, and where that lies in the patch."""
        box, place = [], []
        for origin, size, length in zip(spot.origin, spot.size, self.store.shape(spot.case), strict=True):
            start, stop = max(origin, 0), min(origin + size, length)
            box.append(slice(start, stop))
            place.append(slice(start - origin, stop - origin))
        return tuple(box), tuple(place)


def _padded(array: NDArray[Any], size: tuple[int, ...], inside: tuple[slice, ...], value: float) -> NDArray[Any]:
    lead = array.shape[: array.ndim - len(size)]
    result = np.full((*lead, *size), value, array.dtype)
    window: Any = (..., *inside)
    result[window] = array
    return result


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(data: StepData, *, workers: int = 0, pin: bool = False) -> DataLoader[dict[str, Batch]]:
    """Return a loader over whole micro-batches; what it yields does not depend on the number of workers.

    Args:
        data: Micro-batches.
        workers: Processes that read them; 0: this one.
        pin: They go to a GPU.
    """
    return DataLoader(
        data,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        collate_fn=Parcel if workers else _as_is,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )

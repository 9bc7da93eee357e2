"""The labels that a run learns from: those of its budget alone, on the grid of the prepared images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from labeleff import registry
from labeleff.batch import IGNORE
from labeleff.data import raters
from labeleff.data.annotations import AnnotationStore
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Manifest
from labeleff.data.noise.base import NoiseModel
from labeleff.data.noise.measure import Achieved
from labeleff.data.split import Split, evenly
from labeleff.data.store import ImageStore, leave_it_out
from labeleff.errors import DataError, SplitError
from labeleff.files import write_json
from labeleff.recipe import Component, Data

HIDDEN = "hidden"
"""Folder of a run that keeps the clean labels where label noise was asked for: for diagnostics and pictures, never for training."""


@overload
def make_noise(noise: Component) -> NoiseModel: ...
@overload
def make_noise(noise: Component | None) -> NoiseModel | None: ...
def make_noise(noise: Component | None) -> NoiseModel | None:
    """Return the label-noise model that a recipe names."""
    if noise is None:
        return None
    model: NoiseModel = registry.made("noise", noise)
    return model


def without_noisy(split: Split, noise: NoiseModel) -> Split:
    """Return a split in which the cases that the noise touches are unlabelled.

    Raises:
        SplitError: None is left.
    """
    kept = tuple(i for i in split.labelled if not noise.touches(i))
    gone = tuple(i for i in split.labelled if noise.touches(i))
    if not kept:
        raise SplitError("data.drop_noisy: the noise touches every labelled case; lower data.noise.share")
    note = f"{len(gone)} of {len(split.labelled)} labelled cases have wrong labels and are used without them"
    return replace(split, labelled=kept, unlabelled=split.unlabelled + gone, notes=(*split.notes, note))


def budget_labels(
    folder: Path,
    dataset: DataSet,
    manifest: Manifest,
    split: Split,
    store: ImageStore,
    spec: Data,
    *,
    write: bool,
) -> AnnotationStore:
    """Open the run's labels, or make them from those of the labelled cases: no other label file is touched."""
    if (folder / "current").exists() or not write:
        return AnnotationStore.open(folder)
    shapes = {i: store.shape(i) for i in split.labelled + split.unlabelled}
    known = partial(_known, manifest, store, spec)
    if spec.noise is None:
        votes = partial(votes_of, dataset, manifest, store, spec)
        labels = ((i, raters.fuse(votes(i), spec.raters, case=i, draw=spec.draw)) for i in split.labelled)
        kept = [i for i in split.labelled if spec.raters == "soft" and manifest.case(i).raters]
        return AnnotationStore.create(folder, shapes, labels, ((i, votes(i)) for i in kept))
    clean = ((i, known(i, dataset.read_label(manifest.case(i)))) for i in split.labelled)
    AnnotationStore.create(folder.parent / HIDDEN, shapes, clean)
    achieved = Achieved(manifest.classes)
    noisy = _corrupted(make_noise(spec.noise), dataset, manifest, split, achieved)
    annotations = AnnotationStore.create(folder, shapes, ((i, known(i, label)) for i, label in noisy))
    model = {"name": spec.noise.name, **spec.noise.options}
    found = {"model": model, "labels_sha256": annotations.digest(), **achieved.summary()}
    write_json(folder.parent / "noise.json", found)
    return annotations


def _corrupted(
    noise: NoiseModel, dataset: DataSet, manifest: Manifest, split: Split, achieved: Achieved
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the labelled cases with labels made wrong, and count what that did."""
    for case in map(manifest.case, split.labelled):
        with leave_it_out(case):
            clean = dataset.read_label(case)
        found = noise.corrupt(
            clean, case=case.id, names=manifest.classes, spacing=case.spacing, slice_axis=manifest.slice_axis
        )
        achieved.add(case.id, clean, found.label, spacing=case.spacing, strength=found.strength)
        yield case.id, found.label


def _known(manifest: Manifest, store: ImageStore, spec: Data, case: str, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a label on the stored grid; slices outside the budget are IGNORE."""
    found = on_grid(label, store, case)
    if spec.slices is None or manifest.axes != 3:
        return found
    return only_slices(found, manifest.slice_axis if spec.slice_axis is None else spec.slice_axis, spec.slices)


def votes_of(dataset: DataSet, manifest: Manifest, store: ImageStore, spec: Data, case: str) -> NDArray[np.uint8]:
    """Return what the raters of a case say [R, *S], on the stored grid; slices outside the budget are IGNORE."""
    with leave_it_out(manifest.case(case)):
        votes = dataset.read_votes(manifest.case(case))
    return np.stack([_known(manifest, store, spec, case, label) for label in votes])


def agreement(
    path: Path, dataset: DataSet, manifest: Manifest, split: Split, store: ImageStore, spec: Data
) -> dict[str, Any] | None:
    """Return how far the raters of the labelled cases agree, written to ``raters.json`` once; None without any."""
    several = [i for i in split.labelled if len(manifest.case(i).raters) > 1]
    if not several:
        return None
    if not path.exists():
        votes = ((i, votes_of(dataset, manifest, store, spec, i)) for i in several)
        write_json(path, raters.record(votes, manifest.classes, spec.raters))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def only_slices(label: NDArray[np.uint8], axis: int, count: int) -> NDArray[np.uint8]:
    """Return a label of which only some slices, evenly spread along an axis, are known."""
    kept = np.full_like(label, IGNORE)
    window: list[Any] = [slice(None)] * label.ndim
    window[axis] = evenly(label.shape[axis], count)
    kept[tuple(window)] = label[tuple(window)]
    return kept


def on_grid(label: NDArray[np.uint8], store: ImageStore, case: str) -> NDArray[np.uint8]:
    """Return a label [*S] on the grid of the prepared image, by nearest neighbour.

    Raises:
        DataError: The label does not fit the image it came with.
    """
    if label.shape != tuple(store.original_shape(case)):
        raise DataError(
            f"case {case!r}: the label has shape {label.shape}, the image {tuple(store.original_shape(case))}"
        )
    return nearest(label, tuple(store.shape(case)))


def nearest(label: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a label [*S] on another grid of the same extent, by nearest neighbour."""
    if label.shape == shape:
        return label
    index = [
        np.minimum((np.arange(n) + 0.5) * old / n, old - 1).astype(int)
        for n, old in zip(shape, label.shape, strict=True)
    ]
    return label[np.ix_(*index)]

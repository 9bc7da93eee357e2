"""Whether another way of computing a run's predictor gives what the run gives, on windows of its own images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from labeleff import registry
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import without
from labeleff.errors import LabeleffError, RunError, one_line
from labeleff.evaluation.inference import centred, evaluating
from labeleff.predictor import Predictor, Processing
from labeleff.prepare import prepared_images

TOLERANCE = 1e-4
"""Largest difference of a logit that is accepted, as a share of the largest logit, or of 1 where all are below."""
PLACES = (0.25, 0.5, 0.75)
"""Where windows lie along the axes of a case: 0 is its beginning, 1 its end. Corners of scans often hold nothing."""

Read = Callable[[tuple[slice, ...]], NDArray[np.float32]]


@dataclass(frozen=True)
class Windows:
    """What networks are compared on.

    Args:
        image: [B, C, *patch] on the CPU, prepared as the run prepares images.
        of: Where they are from, in words.
        why: Why they are noise; it may name files of this machine.
    """

    image: Tensor
    of: str
    why: str = ""


def windows_of(predictor: Predictor, run: Path, cache: Path | None = None) -> Windows:
    """Return windows of a training image of the run, or noise where the data are not at hand.

    Only one image is read, and no label. A file may come from somebody else: what its recipe names is not opened.

    Args:
        predictor: What is compared.
        run: Its directory, or the file it left.
        cache: Where prepared images are kept.
    """
    processing = predictor.processing
    if not run.is_dir():
        reason = "a file alone has no images; give the directory of the run"
    else:
        try:
            image = _of_the_run(predictor, cache)
        except (LabeleffError, OSError) as error:
            reason = one_line(error)
        else:
            if image is not None:
                return Windows(image, "windows of an image of the run")
            reason = "its data set is no longer what it was"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(PLACES), processing.channels, *processing.patch, generator=generator)
    return Windows(noise, "noise", reason)


def _of_the_run(predictor: Predictor, cache: Path | None) -> Tensor | None:
    """Return windows of the first case of the training list, or None where the data set has other images by now."""
    processing, spec = predictor.processing, predictor.recipe.data
    dataset: DataSet = registry.made("dataset", spec.dataset)
    manifest, _ = without(dataset.manifest(), spec.leave_out)
    case = next((case for case in manifest.cases if case.role == "train"), None)
    if case is None or (manifest.axes, manifest.channels) != (processing.axes, processing.channels):
        return None
    store = prepared_images(spec, dataset, [case], axes=manifest.axes, cache=cache, processes=1)
    return cut(lambda box: store.read(case.id, box), store.shape(case.id), processing)


def cut(read: Read, shape: tuple[int, ...], processing: Processing) -> Tensor:
    """Return windows [B, C, *patch] of a case, padded with 0 where it is smaller, as prediction does.

    Args:
        read: Returns [C, *box].
        shape: Of the case, voxels.
        processing: Of the run.
    """
    across = processing.slice_axis if processing.dimensions < processing.axes else None
    lengths = list(processing.patch)
    if across is not None:
        lengths.insert(across, 1)
    found = []
    for place in PLACES:
        starts = [round(place * max(0, n - length)) for n, length in zip(shape, lengths, strict=True)]
        window = torch.from_numpy(read(tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))))
        if across is not None:
            window = window.squeeze(across + 1)
        found.append(centred(window, processing.patch)[0])
    return torch.stack(found)


def compared(predictor: Predictor, other: nn.Module, windows: Windows) -> dict[str, Any]:
    """Return how far another network is from a predictor, on all windows at a time and on the first alone.

    Raises:
        RunError: The other network cannot take them.
    """
    processing = predictor.processing
    largest, furthest, equal = 0.0, 0.0, 1.0
    with evaluating(predictor.network), evaluating(other):
        for image in (windows.image, windows.image[:1]):
            one = predictor.network(image).float()
            try:
                two = other(image).float()
            except (RuntimeError, ValueError) as error:
                reason = one_line(error)
                raise RunError(
                    f"what was exported cannot take the run's patch {list(processing.patch)} ({reason}); of unetr, "
                    "backbone.image must be the patch"
                ) from error
            largest = max(largest, float(one.abs().max()))
            # as a maximum that keeps NaN: a network that has diverged equals nothing
            furthest = float(torch.maximum(torch.tensor(furthest), (one - two).abs().max()))
            first, second = (x.argmax(1) if processing.exclusive else x >= 0 for x in (one, two))
            equal = min(equal, float((first == second).double().mean()))  # where classes tie to a hair, either may win
    return {
        "windows": list(windows.image.shape),
        "of": windows.of,
        "largest_logit": largest,
        "largest_difference": furthest,
        "tolerance": TOLERANCE * max(1.0, largest),
        "labels_equal": equal,
    }

"""Metrics per case and class, with one declared rule for what is missed or absent.

* absent: neither reference nor prediction has the class. Nothing can be measured: NaN, left out of means, counted.
* missed: the reference has it, the prediction has not. spurious: the other way round. Dice, IoU and NSD are 0, distances
  are the diagonal of the image: the worst there is, so that a miss never flatters a mean. Both are counted. The volume
  error of what is missed is -1; of what is spurious there is none, and it is left out of means.

Surface distances are those of MONAI: between surface voxels, in millimetres where the spacing is known and in voxels
(unit ``voxel``) where it is not. HD95 is the larger of the two directed 95th percentiles; ASSD is the mean over all
surface voxels of both sides. NSD, the normalised surface Dice, is the share of all of these that lie within a tolerance of
the other surface. The volume error is signed, a share of the reference's volume.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError

ROUNDING = 1e-6
TOLERANCE = 2.0
"""Of the NSD: mm where the spacing is known, voxels where it is not."""


def measure(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    *,
    classes: Sequence[str],
    spacing: Sequence[float],
    exclusive: bool = True,
    tolerance: float = TOLERANCE,
    distances: bool = True,
) -> list[dict[str, Any]]:
    """Return one row per foreground class.

    Args:
        prediction: [*S] label map.
        reference: [*S] label map; voxels of IGNORE count for nothing.
        classes: Names, background first.
        spacing: Voxel size per axis, mm; NaN where unknown.
        exclusive: Otherwise regions overlap, and bit r of a map is set where the region ``classes[r + 1]`` is.
        tolerance: Distance of surfaces that the NSD lets pass, mm or, where the spacing is unknown, voxels.
        distances: Measure HD95, ASSD and NSD, which take far longer than the rest; otherwise they are NaN.

    Raises:
        ShapeError: The maps differ in shape.
    """
    if prediction.shape != reference.shape or len(spacing) != reference.ndim:
        raise ShapeError(
            f"prediction {prediction.shape} and reference {reference.shape} must have one shape and spacing one length "
            f"per axis, not {tuple(spacing)}"
        )
    known = reference != IGNORE
    in_mm = not any(math.isnan(s) for s in spacing)
    lengths = tuple(float(s) for s in spacing) if in_mm else (1.0,) * reference.ndim
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(reference.shape, lengths, strict=True)))
    rows = []
    for index, name in enumerate(classes):
        if index:
            one, two = (mask_of(label, index, exclusive=exclusive) for label in (prediction, reference))
            row = _class_row(one & known, two & known, lengths, diagonal, tolerance, distances=distances)
            rows.append({"class": name, **row, "unit": "mm" if in_mm else "voxel"})
    return rows


def mask_of(label: NDArray[Any], index: int, *, exclusive: bool = True) -> NDArray[np.bool_]:
    """Return where a map has a class, or the region that its bit ``index - 1`` stands for; nothing of IGNORE."""
    where: NDArray[np.bool_] = label == index if exclusive else ((label >> (index - 1)) & 1) > 0
    known: NDArray[np.bool_] = where & (label != IGNORE)
    return known


def _class_row(
    predicted: NDArray[np.bool_],
    present: NDArray[np.bool_],
    spacing: tuple[float, ...],
    diagonal: float,
    tolerance: float,
    *,
    distances: bool,
) -> dict[str, Any]:
    """Return the metrics of one class of one case."""
    sizes = int(predicted.sum()), int(present.sum())
    row: dict[str, Any] = {
        "dice": math.nan,
        "iou": math.nan,
        "hd95": math.nan,
        "assd": math.nan,
        "missed": sizes[1] > 0 and sizes[0] == 0,
        "spurious": sizes[0] > 0 and sizes[1] == 0,
        "absent": not any(sizes),
        "reference_voxels": sizes[1],
        "predicted_voxels": sizes[0],
        "nsd": math.nan,
        "volume_error": (sizes[0] - sizes[1]) / sizes[1] if sizes[1] else math.nan,
    }
    if row["absent"]:
        return row
    overlap = int((predicted & present).sum())
    row["dice"] = 2 * overlap / sum(sizes)
    row["iou"] = overlap / (sum(sizes) - overlap)
    if distances:
        row["hd95"], row["assd"], row["nsd"] = (
            _distances(predicted, present, spacing, tolerance) if all(sizes) else (diagonal, diagonal, 0.0)
        )
    return row


def _distances(
    predicted: NDArray[np.bool_], present: NDArray[np.bool_], spacing: tuple[float, ...], tolerance: float
) -> tuple[float, float, float]:
    """Return HD95, ASSD and NSD of two masks that are not empty, computed inside the box that holds both."""
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    box = ndimage.find_objects((predicted | present).astype(np.uint8))[0]
    # a margin keeps surface voxels at the box's faces from being taken for the image's edge
    one, two = np.pad(predicted[box], 1), np.pad(present[box], 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai")
        surface_one, surface_two = get_mask_edges(one, two, crop=False)
        there = get_surface_distance(surface_one, surface_two, spacing=spacing)
        back = get_surface_distance(surface_two, surface_one, spacing=spacing)
    forth, back = np.asarray(there, float), np.asarray(back, float)
    hd95 = max(float(np.percentile(forth, 95)), float(np.percentile(back, 95)))
    every = np.concatenate([forth, back])
    return hd95, float(every.mean()), float((every <= tolerance + ROUNDING).mean())


def calibration(probs: NDArray[Any], reference: NDArray[Any], *, bins: int = 15) -> dict[str, float]:
    """Return how well probabilities of a case are calibrated, over its voxels with a known label.

    * ``ece``, the expected calibration error (Guo et al., ICML 2017, eq. 3): the mean over voxels of how far, in the voxel's
      bin of confidence, mean confidence is from the share that is right. Confidence is the largest probability; bins are
      equally wide, closed on the right.
    * ``overconfidence``: the same with its sign, mean confidence minus accuracy.
    * ``brier``: the mean over voxels of the squared distance of the probabilities to the label, in [0, 2].

    Most voxels of a case are background that nobody doubts, and pull all of these towards 0.

    Args:
        probs: [K, *S], which sum to one over classes.
        reference: [*S] label map; voxels of IGNORE count for nothing.
        bins: Number of bins.

    Raises:
        ShapeError: The shapes do not fit, or there are no bins.
    """
    if probs.shape[1:] != reference.shape or bins < 1:
        raise ShapeError(
            f"probabilities {probs.shape} need a reference of the shape {probs.shape[1:]}, not {reference.shape}, and at "
            f"least one bin, not {bins}"
        )
    known = reference != IGNORE
    if not known.any():
        return dict.fromkeys(("ece", "overconfidence", "brier"), math.nan)
    truth = reference[known].astype(int)
    scores = probs[:, known].astype(np.float64)
    confidence, right = scores.max(0), scores.argmax(0) == truth
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, confidence - right, bins)  # in each bin: voxels times (mean confidence - accuracy)
    squared = (scores**2).sum(0) - 2 * np.take_along_axis(scores, truth[None], 0)[0] + 1
    return {
        "ece": float(np.abs(gaps).sum() / len(truth)),
        "overconfidence": float(gaps.sum() / len(truth)),
        "brier": float(squared.mean()),
    }

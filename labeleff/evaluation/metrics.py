"""Metrics per case and class, with one declared rule for what is missed or absent.

* absent: neither reference nor prediction has the class. Nothing can be measured: NaN, left out of means, counted.
* missed: the reference has it, the prediction has not. spurious: the other way round. Dice and IoU are 0, distances are
  the diagonal of the image: the worst there is, so that a miss never flatters a mean. Both are counted.

Surface distances are those of MONAI: between surface voxels, in millimetres where the spacing is known and in voxels
(unit ``voxel``) where it is not. HD95 is the larger of the two directed 95th percentiles; ASSD is the mean over all
surface voxels of both sides.
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


def measure(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    *,
    classes: Sequence[str],
    spacing: Sequence[float],
    exclusive: bool = True,
) -> list[dict[str, Any]]:
    """Return one row per foreground class.

    Args:
        prediction: [*S] label map.
        reference: [*S] label map; voxels of IGNORE count for nothing.
        classes: Names, background first.
        spacing: Voxel size per axis, mm; NaN where unknown.
        exclusive: Otherwise regions overlap, and bit r of a map is set where the region ``classes[r + 1]`` is.

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
            row = _class_row(one & known, two & known, lengths, diagonal)
            rows.append({"class": name, **row, "unit": "mm" if in_mm else "voxel"})
    return rows


def mask_of(label: NDArray[Any], index: int, *, exclusive: bool = True) -> NDArray[np.bool_]:
    """Return where a map has a class, or the region that its bit ``index - 1`` stands for; nothing of IGNORE."""
    where: NDArray[np.bool_] = label == index if exclusive else ((label >> (index - 1)) & 1) > 0
    known: NDArray[np.bool_] = where & (label != IGNORE)
    return known


def _class_row(
    predicted: NDArray[np.bool_], present: NDArray[np.bool_], spacing: tuple[float, ...], diagonal: float
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
    }
    if row["absent"]:
        return row
    overlap = int((predicted & present).sum())
    row["dice"] = 2 * overlap / sum(sizes)
    row["iou"] = overlap / (sum(sizes) - overlap)
    row["hd95"], row["assd"] = _distances(predicted, present, spacing) if all(sizes) else (diagonal, diagonal)
    return row


def _distances(
    predicted: NDArray[np.bool_], present: NDArray[np.bool_], spacing: tuple[float, ...]
) -> tuple[float, float]:
    """Return HD95 and ASSD of two masks that are not empty, computed inside the box that holds both."""
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
    return hd95, float(np.concatenate([forth, back]).mean())

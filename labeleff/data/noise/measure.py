"""What label noise did: noisy against clean, per class and case, and pooled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labeleff.batch import IGNORE
from labeleff.evaluation.metrics import measure

BAND = 5.0
"""Width of the band around clean boundaries in which errors are counted apart, mm (voxels where unknown)."""


class Achieved:
    """Counts and rows of noisy label maps beside their clean ones. Voxels unknown in the clean map count for nothing.

    Args:
        classes: Names, background first.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.rows: list[dict[str, Any]] = []
        self.pairs = np.zeros((len(classes), len(classes)), np.int64)  # [clean, noisy] voxels
        self.band = np.zeros(2, np.int64)  # wrong, all
        self.objects = np.zeros((3, len(classes)), np.int64)  # true, missed, spurious
        self.touched = 0
        self.cases = 0

    def add(
        self,
        case: str,
        clean: NDArray[np.uint8],
        noisy: NDArray[np.uint8],
        *,
        spacing: Sequence[float] | None,
        strength: Mapping[int, float],
    ) -> None:
        """Count one case.

        Args:
            case: Its id.
            clean: [*S].
            noisy: [*S].
            spacing: Voxel size per axis, mm; None: unknown.
            strength: Per class, what the noise model took.
        """
        lengths = tuple(spacing) if spacing is not None else (math.nan,) * clean.ndim
        known = clean != IGNORE
        for index, row in enumerate(measure(noisy, clean, classes=self.classes, spacing=lengths), start=1):
            volume = row["predicted_voxels"] / row["reference_voxels"] - 1 if row["reference_voxels"] else math.nan
            shown = {"case": case, "strength": strength.get(index, math.nan), **row, "volume_error": volume}
            self.rows.append(shown)
        both = clean[known].astype(np.int64) * len(self.classes) + noisy[known]
        self.pairs += np.bincount(both, minlength=self.pairs.size).reshape(self.pairs.shape)
        near = _near_boundary(clean, lengths) & known
        self.band += [int((near & (clean != noisy)).sum()), int(near.sum())]
        self._count_objects(clean, noisy)
        self.touched += bool((clean != noisy).any())
        self.cases += 1

    def _count_objects(self, clean: NDArray[np.uint8], noisy: NDArray[np.uint8]) -> None:
        full = ndimage.generate_binary_structure(clean.ndim, clean.ndim)
        for c in range(1, len(self.classes)):
            for column, (here, there) in enumerate(((clean, noisy), (noisy, clean)), start=1):
                parts, count = ndimage.label(here == c, full)
                met = len(np.setdiff1d(np.unique(parts[(there == c)]), 0))
                self.objects[0, c] += count if column == 1 else 0
                self.objects[column, c] += count - met

    def summary(self) -> dict[str, Any]:
        """Return plain values for JSON, with a row for every case and class.

        ``noise_level`` is 1 - the IoU pooled over all foreground classes; the mean IoU with background, which papers
        quote, stands next to it and flatters by the background.
        """
        pairs = self.pairs.astype(float)
        common, clean, noisy = np.diag(pairs), pairs.sum(1), pairs.sum(0)
        iou = common / np.maximum(clean + noisy - common, 1)
        total = pairs.sum()
        known = max(total, 1)
        return {
            "cases": self.cases,
            "cases_touched": self.touched,
            "noise_level": 1 - float(common[1:].sum() / max((clean + noisy - common)[1:].sum(), 1)),
            "mean_iou_with_background": float(iou.mean()),
            "voxel_error": float((total - common.sum()) / known),
            "voxel_error_near_boundaries": float(self.band[0] / max(self.band[1], 1)),
            "band": BAND,
            "noisy_given_clean": _shares(pairs).tolist(),
            "clean_given_noisy": _shares(pairs.T).tolist(),
            "classes": {
                name: {
                    "dice": _mean(self._column(name, "dice")),
                    "dice_pooled": float(2 * common[c] / max(clean[c] + noisy[c], 1)),
                    "iou": _mean(self._column(name, "iou")),
                    "iou_pooled": float(iou[c]),
                    "assd": _mean(self._column(name, "assd")),
                    "hd95": _mean(self._column(name, "hd95")),
                    "unit": self._column(name, "unit")[0] if self.rows else "",
                    "volume_error": _mean(self._column(name, "volume_error")),
                    "objects": int(self.objects[0, c]),
                    "objects_missed": int(self.objects[1, c]),
                    "objects_spurious": int(self.objects[2, c]),
                }
                for c, name in enumerate(self.classes)
                if c
            },
            "rows": [_plain(row) for row in self.rows],
        }

    def _column(self, name: str, key: str) -> list[Any]:
        return [row[key] for row in self.rows if row["class"] == name and not row["absent"]] or [math.nan]


def _near_boundary(label: NDArray[np.uint8], spacing: Sequence[float]) -> NDArray[np.bool_]:
    """Return the voxels within the band on either side of any boundary."""
    edge = np.zeros(label.shape, bool)
    for axis in range(label.ndim):
        differs = np.diff(label.astype(np.int16), axis=axis) != 0
        for side in (slice(1, None), slice(None, -1)):
            edge[tuple(side if a == axis else slice(None) for a in range(label.ndim))] |= differs
    lengths = [1.0 if math.isnan(s) else s for s in spacing]
    near: NDArray[np.bool_] = np.asarray(ndimage.distance_transform_edt(~edge, sampling=lengths) <= BAND)
    return near if edge.any() else edge


def _shares(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.round(pairs / np.maximum(pairs.sum(1, keepdims=True), 1), 6)
    return shares


def _mean(values: Sequence[float]) -> float | None:
    found = [v for v in values if not math.isnan(v)]
    return float(np.mean(found)) if found else None


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for JSON, which has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}

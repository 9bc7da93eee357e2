"""Confident learning: which labels a network that never saw them surely contradicts.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021, arXiv:1911.00068;
voxel by voxel as cleanlab's ``segmentation.filter.find_label_issues`` does it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from labeleff.batch import IGNORE


class LabelIssues:
    """The voxels whose labels are probably wrong, pooled over cases that are added one at a time.

    With t_k the mean p_k over voxels labelled k, n counts the voxels whose most probable class j is not the label and has
    p_j >= t_j. Of all voxels, the n with the lowest probability of their label are taken, except those whose label is the
    most probable class. Where several voxels share the n-th lowest probability all of them are taken; cleanlab takes as
    many as make n, and leaves it to its sort which. Otherwise exact, although no probabilities are kept but those of
    labels below one half: above it, the label is the most probable class. Voxels of IGNORE count for nothing.

    Args:
        classes: K.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._sums, self._counts = np.zeros(classes), np.zeros(classes, np.int64)
        self._agreeing: list[NDArray[np.float32]] = []
        self._cases: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]] = []

    def add(self, probs: Tensor, label: NDArray[np.uint8]) -> None:
        """Look at a case.

        Args:
            probs: [K, *S] probabilities by a network that was not trained on it.
            label: [*S].
        """
        flat, given = probs.flatten(1), torch.from_numpy(label.ravel().astype(np.int64))
        known = torch.nonzero(given != IGNORE)[:, 0]
        flat, given = flat[:, known], given[known]
        own = flat.gather(0, given[None])[0]
        top, guess = flat.max(0)
        values = own.numpy().astype(np.float32)
        self._sums += np.bincount(given.numpy(), weights=values.astype(np.float64), minlength=self.classes)
        self._counts += np.bincount(given.numpy(), minlength=self.classes)
        differs = (guess != given).numpy()
        self._agreeing.append(values[~differs & (values < 0.5)])
        place = known.numpy()[differs]
        sure, other = top.numpy()[differs].astype(np.float32), guess.numpy()[differs].astype(np.uint8)
        self._cases.append((place, values[differs], sure, other))

    @property
    def thresholds(self) -> NDArray[np.float64]:
        """T [K]; NaN for a class that no label has."""
        with np.errstate(invalid="ignore"):
            found: NDArray[np.float64] = self._sums / self._counts
            return found

    def find(self, *, by_case: bool = False) -> list[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float32]]]:
        """Return per case the flat indices of the flagged voxels, their most probable classes, and the probabilities of these.

        Args:
            by_case: Choose the n voxels within each case rather than among all.
        """
        limits = self.thresholds.astype(np.float32)
        counts = [int((top >= limits[guess]).sum()) for _, _, top, guess in self._cases]
        if by_case:
            edges = [
                _edge([own], agreeing, count)
                for (_, own, _, _), agreeing, count in zip(self._cases, self._agreeing, counts, strict=True)
            ]
        else:
            edge = _edge(
                [own for _, own, _, _ in self._cases],
                np.concatenate(self._agreeing or [np.zeros(0, np.float32)]),
                sum(counts),
            )
            edges = [edge] * len(self._cases)
        found = []
        for (place, own, top, guess), edge in zip(self._cases, edges, strict=True):
            chosen = own <= edge
            found.append((place[chosen], guess[chosen], top[chosen]))
        return found


def _edge(differing: Iterable[NDArray[np.float32]], agreeing: NDArray[np.float32], count: int) -> float:
    """Return the count-th lowest value of all; ties with it are all taken. -1 where none is."""
    values = np.concatenate([*differing, agreeing])
    return float(np.partition(values, count - 1)[count - 1]) if 0 < count <= len(values) else -1.0


def label_quality(own: Tensor, *, temperature: float = 0.1) -> float:
    """Return the quality of an image's label in [0, 1]: a soft minimum over voxels of the probability of their labels.

    ``Σ s softmax((1 - s) / T)``, cleanlab's ``softmin``.

    Args:
        own: [n] probability of the label of each known voxel.
        temperature: T; towards 0 it becomes the minimum.
    """
    score = own.double()
    return float((score * torch.softmax((1 - score) / temperature, 0)).sum()) if len(own) else 1.0

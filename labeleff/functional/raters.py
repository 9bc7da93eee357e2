"""Several people's labels of one image: one label made of them, how far they agree, and where they do not.

Votes are [R, *S] of 0 … K-1: R raters, one label map each. IGNORE is an abstention: it counts for nothing, and where
everybody abstains nothing is known.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.errors import DataError, ShapeError


def majority(votes: NDArray[Any], *, undecided: Literal["ignore", "smallest"] = "ignore") -> NDArray[np.uint8]:
    """Return the label [*S] that most raters gave.

    Args:
        votes: [R, *S].
        undecided: Of a tie: ``ignore`` leaves the voxel unknown, ``smallest`` takes the smallest of the tied classes.

    Raises:
        ShapeError: The votes are no label maps.
    """
    votes = _checked(votes)
    label = np.full(votes.shape[1:], IGNORE, np.uint8)
    most = np.zeros(votes.shape[1:], np.uint16)
    tied = np.zeros(votes.shape[1:], bool)
    for value in np.unique(votes):
        if value != IGNORE:
            count = (votes == value).sum(0, dtype=np.uint16)
            tied = np.where(count > most, False, tied | ((count == most) & (count > 0)))
            label[count > most] = value
            most = np.maximum(most, count)
    if undecided == "ignore":
        label[tied] = IGNORE
    return label


def staple(votes: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the label [*S] that STAPLE estimates: raters are weighted by the confusion matrices that explain all votes best.

    Rohlfing et al., "Expectation Maximization Strategies for Multi-Atlas Multi-Label Segmentation", IPMI 2003, as SimpleITK's
    ``MultiLabelSTAPLE`` computes it, with the classes' shares of all votes as prior; for two classes it is Warfield et al.,
    "Simultaneous truth and performance level estimation (STAPLE)", IEEE TMI 2004. Voxels between which it cannot decide are
    IGNORE.

    Differs from the paper: a voxel on which somebody abstains does not enter the estimate, which knows no abstention; there
    the majority decides.

    Args:
        votes: [R, *S].

    Raises:
        ShapeError: The votes are no label maps.
        DataError: SimpleITK is not installed.
    """
    votes = _checked(votes)
    need_staple()
    label = majority(votes)
    complete = (votes != IGNORE).all(0)
    # one rater explains all votes perfectly; where only one class is known there is no confusion to estimate
    if len(votes) > 1 and len(np.unique(votes[:, complete])) > 1:
        import SimpleITK as sitk  # noqa: N813  its documentation's name for it

        rows = [sitk.GetImageFromArray(np.ascontiguousarray(own[complete][None])) for own in votes]  # voxels in a row:
        label[complete] = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(rows, IGNORE))[0]  # neighbours play no part
    return label


def need_staple() -> None:
    """Raise unless :func:`staple` can be computed.

    Raises:
        DataError: SimpleITK is not installed.
    """
    if importlib.util.find_spec("SimpleITK") is None:
        raise DataError("STAPLE needs SimpleITK, which is not installed: pip install 'labeleff[staple]'")


def soft_labels(votes: NDArray[Any], num_classes: int) -> NDArray[np.float32]:
    """Return the share of the raters [K, *S] that gave each class; zero for all classes where everybody abstains.

    Args:
        votes: [R, *S].
        num_classes: K.

    Raises:
        ShapeError: The votes are no label maps of K classes.
    """
    votes = _checked(votes, num_classes)
    counts = np.stack([(votes == value).sum(0) for value in range(num_classes)]).astype(np.float32)
    shares: NDArray[np.float32] = counts / np.maximum(counts.sum(0), 1)
    return shares


def disagreement(votes: NDArray[Any], num_classes: int) -> NDArray[np.float32]:
    """Return the entropy of the votes [*S], as a share of that of K classes with equally many: ``-Σ_k q_k log q_k / log K``.

    0 where all who spoke say the same, or nobody spoke. Two raters reach 1 with K = 2 only.

    Args:
        votes: [R, *S].
        num_classes: K.

    Raises:
        ShapeError: The votes are no label maps of K classes.
    """
    shares = soft_labels(votes, num_classes)
    entropy: NDArray[np.float32] = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(0) / np.log(num_classes)
    return np.abs(entropy).astype(np.float32)  # no -0


def agreement(votes: NDArray[Any], num_classes: int) -> NDArray[np.float64]:
    """Return the Dice overlap [R, R, K] of every two raters, class by class, over the voxels on which both spoke.

    NaN where neither has the class: nothing can be compared.

    Args:
        votes: [R, *S].
        num_classes: K.

    Raises:
        ShapeError: The votes are no label maps of K classes.
    """
    votes = _checked(votes, num_classes)
    result = np.full((len(votes), len(votes), num_classes), np.nan)
    for one, two in _pairs(len(votes)):
        both = (votes[one] != IGNORE) & (votes[two] != IGNORE)
        table = np.bincount(
            votes[one][both].astype(np.int64) * num_classes + votes[two][both], minlength=num_classes**2
        ).reshape(num_classes, num_classes)
        size = table.sum(0) + table.sum(1)
        overlap = np.divide(2 * table.diagonal(), size, out=np.full(num_classes, np.nan), where=size > 0)
        result[one, two] = result[two, one] = overlap
    return result


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    """Yield every two raters, each with itself among them, once."""
    return ((one, two) for one in range(count) for two in range(one, count))


def _checked(votes: NDArray[Any], num_classes: int = IGNORE) -> NDArray[np.uint8]:
    """Return votes as uint8.

    Raises:
        ShapeError: They are no label maps of so many classes.
    """
    votes = np.asarray(votes)
    if votes.ndim < 2 or not len(votes) or not np.issubdtype(votes.dtype, np.integer):
        raise ShapeError(
            f"votes have shape {votes.shape} ({votes.dtype}); whole numbers [R, *S] of one rater or more are needed"
        )
    wrong = votes[(votes != IGNORE) & ((votes < 0) | (votes >= num_classes))]
    if wrong.size:
        raise ShapeError(f"a vote for {wrong[0]}: classes are 0 … {num_classes - 1}, and {IGNORE} abstains")
    return votes.astype(np.uint8)

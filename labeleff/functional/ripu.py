"""RIPU: scores of regions by impurity and uncertainty, their selection, and losses on what is labelled of them.

Xie et al., "Towards Fewer Annotations: Active Learning via Region Impurity and Prediction Uncertainty for Domain Adaptive
Semantic Segmentation", CVPR 2022, arXiv:2111.12940. Windows are boxes of 2·radius + 1 voxels per axis, cut at the border.

Box sums go by running sums, so that their cost does not depend on the radius, and one class at a time, so that a score
takes the memory of a few maps, not of K.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError

EPS = 1e-6
"""Added to probabilities and shares before the logarithm, as the authors do."""
Radius = int | Sequence[int]
Normalise = Literal["classes", "log19"] | None


# -- scores -------------------------------------------------------------------------------------------------------------


def radii(radius: Radius, axes: int) -> tuple[int, ...]:
    """Return the half width of a window along each axis.

    Raises:
        ShapeError: There is not one for each axis, or one is negative.
    """
    found = (radius,) * axes if isinstance(radius, int) else tuple(radius)
    if len(found) != axes or min(found, default=0) < 0:
        raise ShapeError(f"radius is {radius}; give one half width of at least 0, or one for each of {axes} axes")
    return found


def box_sum(values: Tensor, radius: Radius) -> Tensor:
    """Return the sum over the window around every voxel; what lies outside counts 0.

    Args:
        values: [B, *S]; integers are summed exactly, floats in float64.
        radius: Half width of the window, voxels.

    Returns:
        [B, *S], int32 or float64.
    """
    result = values.double() if values.is_floating_point() else values.to(torch.int32)
    for axis, r in enumerate(radii(radius, values.ndim - 1), 1):
        n = values.shape[axis]
        if r == 0:
            continue
        if r >= n - 1:
            result = result.sum(axis, keepdim=True, dtype=result.dtype).expand(*result.shape)
            continue
        running = result.cumsum(axis, dtype=result.dtype)
        # window sum = running at the last voxel of the window - running before its first
        upper = torch.cat(
            [running.narrow(axis, r, n - r), running.narrow(axis, n - 1, 1).expand(*_with(running, axis, r))], axis
        )
        upper.narrow(axis, r + 1, n - r - 1).sub_(running.narrow(axis, 0, n - r - 1))
        result = upper
    return result


def _with(like: Tensor, axis: int, length: int) -> list[int]:
    return [length if a == axis else n for a, n in enumerate(like.shape)]


def box_counts(shape: Sequence[int], radius: Radius, device: torch.device | None = None) -> Tensor:
    """Return how many voxels of an image [*shape] lie in the window around each, float64."""
    counts = torch.ones((), dtype=torch.float64, device=device)
    for axis, (n, r) in enumerate(zip(shape, radii(radius, len(shape)), strict=True)):
        at = torch.arange(n, device=device)
        own = (at + r).clamp_max(n - 1) - (at - r).clamp_min(0) + 1
        counts = counts * own.double().view([-1 if a == axis else 1 for a in range(len(shape))])
    return counts.expand(tuple(shape))


def region_impurity(logits_or_label: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the entropy of the classes predicted in the window around every voxel: P of RIPU, equation 4.

    Args:
        logits_or_label: Logits [B, K, *S], or a label map [B, *S] of an integer type; its values IGNORE are left out.
        radius: Half width of the window, voxels.
        valid: [B, 1, *S] bool; voxels that count. Default: all in the image.

    Returns:
        [B, *S] float32, nats: -Σ q log(q + 1e-6). A pure window has -1e-6, as the authors' has.
    """
    given = logits_or_label
    label = _finite(given).argmax(1) if given.is_floating_point() else given
    counted = label != IGNORE
    if valid is not None:
        counted = counted & valid[:, 0]
    whole = bool(counted.all())
    total = (
        box_counts(label.shape[1:], radius, label.device) if whole else box_sum(counted, radius).double().clamp_min(1)
    )
    result = torch.zeros(label.shape, dtype=torch.float64, device=label.device)
    for value in torch.unique(label).tolist():
        if value != IGNORE:
            share = box_sum((label == value) & counted, radius) / total
            result -= share * (share + EPS).log_()
    return result.float()


def voxel_entropy(logits: Tensor) -> Tensor:
    """Return -Σ p log(p + 1e-6) of every voxel [B, *S], nats, float32, one class at a time."""
    log_probs = _finite(logits).float().log_softmax(1)
    result = torch.zeros_like(log_probs[:, 0])
    for k in range(log_probs.shape[1]):
        p = log_probs[:, k].exp()
        result -= p * (p + EPS).log_()
    return result


def region_uncertainty(logits: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean entropy in the window around every voxel: U of RIPU, equation 5.

    Args:
        logits: [B, K, *S].
        radius: Half width of the window, voxels.
        valid: [B, 1, *S] bool; voxels that count. Default: all in the image.

    Returns:
        [B, *S] float32, nats.
    """
    return box_mean(voxel_entropy(logits), radius, valid=valid)


def box_mean(score: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean of a score [B, *S] over the window around every voxel, counts inside the image, float32."""
    if valid is None:
        total = box_counts(score.shape[1:], radius, score.device)
    else:
        score = score.masked_fill(~valid[:, 0], 0)
        total = box_sum(valid[:, 0], radius).double().clamp_min(1)
    return (box_sum(score, radius) / total).float()


def region_score(
    logits: Tensor, radius: Radius, *, normalise: Normalise = "classes", valid: Tensor | None = None
) -> Tensor:
    """Return impurity times uncertainty of the window around every voxel: the region-based form (RA), equation 3.

    Args:
        logits: [B, K, *S].
        radius: Half width of the window, voxels.
        normalise: Both factors are divided by log K (``classes``), by log 19 whatever K is, which is what the authors' code
            does (``log19``), or left in nats (None). The ranking is the same.
        valid: [B, 1, *S] bool; voxels that count.

    Returns:
        [B, *S] float32.
    """
    score = region_impurity(logits, radius, valid=valid) * region_uncertainty(logits, radius, valid=valid)
    if normalise is None:
        return score
    unit = math.log(19 if normalise == "log19" else logits.shape[1])
    return score / unit**2


def pixel_score(logits: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the impurity of the window times the entropy of the voxel itself, nats²: the pixel-based form (PA)."""
    return region_impurity(logits, radius, valid=valid) * voxel_entropy(logits)


def _finite(logits: Tensor) -> Tensor:
    if bool(torch.isnan(logits).any()):
        raise ShapeError("the logits hold NaN; the network has diverged, and nothing can be ranked by them")
    return logits


# -- selection ----------------------------------------------------------------------------------------------------------


def select_regions(
    score: Tensor,
    radius: Radius,
    count: int,
    *,
    blocked: Tensor | None = None,
    suppress: Radius | None = None,
) -> Tensor:
    """Return the centres that a greedy search picks: the best voxel, then the best that is not near a pick, and so on.

    The result is that of the plain loop over all voxels, at the cost of a sort of few candidates: a pick can keep at most
    the voxels around it from being picked.

    Args:
        score: [*S]; -inf is never picked.
        radius: Half width of a region, voxels.
        count: How many are wanted.
        blocked: [*S] bool; voxels that may not be picked.
        suppress: How far around a pick, per axis, no other may be; default 2·radius: regions never overlap.

    Returns:
        [n, d] int64 in the order of picking, n at most ``count``: it stops when nothing is left. Among equal scores, the
        smallest last index comes first, then the smallest one before it, and so on.

    Raises:
        ShapeError: The score holds NaN, or shapes do not fit.
    """
    shape = tuple(score.shape)
    reach = radii(suppress, score.ndim) if suppress is not None else tuple(2 * r for r in radii(radius, score.ndim))
    if bool(torch.isnan(score).any()):
        raise ShapeError("the score holds NaN; nothing can be ranked by it")
    if blocked is not None and tuple(blocked.shape) != shape:
        raise ShapeError(f"blocked has shape {tuple(blocked.shape)}, the score {shape}")
    values = score if blocked is None else score.masked_fill(blocked, float("-inf"))
    # last axis slowest, so that the order of the flat index is that of ties
    flat = values.permute(*reversed(range(score.ndim))).reshape(-1)
    free = int((flat > float("-inf")).sum())
    kills = math.prod(min(2 * r + 1, n) for r, n in zip(reach, shape, strict=True))
    gone = torch.zeros(shape, dtype=torch.bool).numpy()
    picks: list[tuple[int, ...]] = []
    wanted = min(count, free)
    seen, most = 0, min(free, max(wanted, 1) * min(kills, 64))
    while len(picks) < count and seen < free:
        for index in _candidates(flat, most)[seen:].tolist():
            place: list[int] = []
            rest = index
            for n in shape:
                rest, here = divmod(rest, n)
                place.append(here)
            if not gone[tuple(place)]:
                picks.append(tuple(place))
                gone[tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(place, reach, strict=True))] = True
                if len(picks) == count:
                    break
        seen, most = most, min(free, most * 4)
    return torch.tensor(picks, dtype=torch.int64).reshape(-1, score.ndim)


def _candidates(flat: Tensor, count: int) -> Tensor:
    """Return the flat indices of the ``count`` best values and more of the same value, by value, then by index."""
    if count <= 0:
        return torch.zeros(0, dtype=torch.int64)
    lowest = torch.topk(flat, count, sorted=True).values[-1]
    above = torch.nonzero(flat > lowest)[:, 0]
    equal = torch.nonzero(flat == lowest)[: count - len(above), 0]
    order = torch.sort(flat[above], descending=True, stable=True).indices
    return torch.cat([above[order], equal]).cpu()


# -- losses -------------------------------------------------------------------------------------------------------------


def local_consistency(
    logits: Tensor, label: Tensor, *, on: Literal["boundary", "all"] = "boundary", valid: Tensor | None = None
) -> Tensor:
    """Return the mean distance (l1, summed over classes) of predictions from the mean of their neighbours.

    Neighbours are the 3^d voxels around, the voxel itself among them; beyond the border its voxels are repeated.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64; voxels of IGNORE are left out.
        on: ``boundary``: only where the Laplacian of the label's *values* over the 3^d neighbours, 0 beyond the border, is
            not 0: the authors' code, which takes the frame of the image for a boundary unless its label is 0, and misses a
            boundary where differences of values cancel. ``all``: every labelled voxel, as the paper says.
        valid: [B, 1, *S] bool; voxels that count.

    Returns:
        Scalar; 0, with a gradient, where no voxel counts.
    """
    d = logits.ndim - 2
    counted = label != IGNORE
    if valid is not None:
        counted = counted & valid[:, 0]
    if on == "boundary":
        values = label.to(torch.int32)
        counted = counted & (box_sum(values, 1) != values * 3**d)
    places = torch.nonzero(counted)  # boundaries are few: only they and their neighbours are looked up
    steps = torch.tensor([(0, *step) for step in itertools.product((-1, 0, 1), repeat=d)], device=label.device)
    limits = torch.tensor(label.shape, device=label.device) - 1
    near = (places + steps[:, None]).clamp(torch.zeros_like(limits), limits)  # [3^d, n, 1 + d]
    probs = logits.float().softmax(1).movedim(1, -1)
    around = probs[tuple(near.movedim(-1, 0))]  # [3^d, n, K]
    distance = (around[3**d // 2] - around.mean(0)).abs().sum()
    loss: Tensor = distance / max(len(places), 1)
    return loss


def negative_learning(logits: Tensor, threshold: float = 0.05, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean of -log(1 - p + 1e-6) over all pairs of a voxel and a class with p below a threshold: equation 9.

    Args:
        logits: [B, K, *S].
        threshold: Below it, a class is taken to be absent.
        valid: [B, 1, *S] bool; voxels that count.

    Returns:
        Scalar; 0, with a gradient, where no class is that improbable.
    """
    probs = logits.float().softmax(1)
    absent = probs.detach() < threshold
    if valid is not None:
        absent = absent & valid
    terms = -(1 - probs + EPS).log()
    return (terms * absent).sum() / absent.sum().clamp_min(1)

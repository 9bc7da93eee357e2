"""RIPU: ask about the regions that are impure and uncertain; learn from the few answers and from what is unlikely.

Xie, Yuan, Li, Liu and Cheng, "Towards Fewer Annotations: Active Learning via Region Impurity and Prediction Uncertainty for
Domain Adaptive Semantic Segmentation", CVPR 2022, arXiv:2111.12940. This follows the authors' code, carried over to one to
three axes and to windows of another half width per axis; options name where paper and code differ.

Scores stream over the classes and sum boxes by :func:`labeleff.functional.acquisition.box_sum`: four maps or so of memory,
and no cost that grows with the window. They carry no gradient; the losses do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional.acquisition import Radius, box_count, box_mean, box_sum, half_widths, valid_map
from labeleff.functional.losses import CPU_BLOCK, through_softmax, voxel_blocks
from labeleff.functional.regions import hard_labels

Normalisation = Literal["classes", "log19"]
EPS = 1e-6
FEWEST_CANDIDATES, SAMPLED = 1 << 12, 1 << 14
"""Candidates that a pass of :func:`select_regions` sorts at least, and scores from which their lowest is guessed."""

# -- scores -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def region_impurity(logits_or_label: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return ``P = -Σ_c q_c log(q_c + 1e-6)``, in nats, q_c the share of the window that is labelled c.

    Windows are cut off at the border, and shares are of what is left. A pure window has -1e-6, as in the authors' code.

    Args:
        logits_or_label: Floating: logits [B, K, *S], whose largest is the label. Integer: labels [B, *S]; IGNORE counts
            nowhere.
        radius: Half width of the window, in voxels.
        valid: [B, 1, *S] bool; what is outside counts nowhere. None: all is valid.

    Returns:
        [B, *S] float32; 0 where nothing of the window counts.

    Raises:
        ShapeError: The shapes do not belong together, or logits hold NaN or infinity.
    """
    if logits_or_label.is_floating_point():
        best, _ = _softmax_scale(logits_or_label)
        label, classes = hard_labels(logits_or_label), range(logits_or_label.shape[1])
        return _impurity(label, classes, radius, valid_map(valid, best))
    label = logits_or_label
    if not 2 <= label.ndim <= 4:
        raise ShapeError(f"labels must be [B, *S] of one to three spatial axes, not {tuple(label.shape)}")
    known, inside = label != IGNORE, valid_map(valid, label)
    known = known if inside is None else known & inside
    return _impurity(label, torch.unique(label[known]).tolist(), radius, None if known.all() else known)


def _impurity(label: Tensor, classes: Iterable[int], radius: Radius, known: Tensor | None) -> Tensor:
    count = box_count(label, radius, known).float()
    impurity = torch.zeros(label.shape, device=label.device)
    for index in classes:
        is_it = label == index
        if known is not None:
            is_it &= known
        if is_it.any():
            share = box_sum(is_it, radius) / count
            impurity -= (share + EPS).log_().mul_(share)
    return impurity


@torch.no_grad()
def region_uncertainty(logits: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean over the window of the entropy ``e = -Σ_c p_c log(p_c + 1e-6)``, in nats.

    Args:
        logits: [B, K, *S].
        radius: Half width of the window, in voxels.
        valid: [B, 1, *S] bool; what is outside counts nowhere. None: all is valid.

    Returns:
        [B, *S] float32; 0 where nothing of the window is valid.

    Raises:
        ShapeError: The shapes do not belong together, or logits hold NaN or infinity.
    """
    return box_mean(_entropy(logits), radius, valid=valid)


@torch.no_grad()
def region_score(
    logits: Tensor,
    radius: Radius,
    *,
    normalise: Normalisation | None = "classes",
    valid: Tensor | None = None,
) -> Tensor:
    """Return impurity times uncertainty of the window: the region-based score, for asking about whole windows.

    The order of the voxels does not depend on ``normalise``. Among pure windows, whose score is slightly below 0, the
    *surest* come first, as with the authors: they are reached when all that is impure has been asked.

    Args:
        logits: [B, K, *S], at the resolution of the labels.
        radius: Half width of the window, in voxels.
        normalise: Divide either factor by log K (``classes``), or by log 19 whatever K is (``log19``, the authors' code);
            None: by nothing.
        valid: [B, 1, *S] bool; what is outside counts nowhere, but has a score: see ``blocked`` of
            :func:`select_regions`. None: all is valid.

    Returns:
        [B, *S] float32.

    Raises:
        ShapeError: The shapes do not belong together, or logits hold NaN or infinity.
    """
    score = region_uncertainty(logits, radius, valid=valid)
    score *= _impurity(hard_labels(logits), range(logits.shape[1]), radius, valid_map(valid, score))
    if normalise is not None:
        score /= math.log(19 if normalise == "log19" else logits.shape[1]) ** 2
    return score


@torch.no_grad()
def pixel_score(logits: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return impurity of the window times entropy of its centre: the pixel-based score, for asking about single voxels.

    Neither is normalised, as in the authors' code. Arguments, result and errors are those of :func:`region_score`.
    """
    score = _entropy(logits)
    score *= _impurity(hard_labels(logits), range(logits.shape[1]), radius, valid_map(valid, score))
    return score


def _softmax_scale(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit and ``Σ_c exp(z_c - largest)``, [B, *S] each."""
    if not 3 <= logits.ndim <= 5 or logits.shape[1] < 2:
        raise ShapeError(
            f"logits must be [B, K, *S], K at least 2, one to three spatial axes, not {tuple(logits.shape)}"
        )
    best = logits[:, 0].float()
    for index in range(1, logits.shape[1]):
        best = torch.maximum(best, logits[:, index].float())
    total = torch.zeros_like(best)
    for index in range(logits.shape[1]):
        total += (logits[:, index].float() - best).exp_()
    if not torch.isfinite(total).all():
        raise ShapeError("logits hold NaN or infinity; the network that made them has diverged")
    return best, total


def _entropy(logits: Tensor) -> Tensor:
    """Return e [B, *S] of logits [B, K, *S], class by class."""
    best, total = _softmax_scale(logits)
    entropy = torch.zeros_like(best)
    for index in range(logits.shape[1]):
        p = (logits[:, index].float() - best).exp_().div_(total)
        entropy -= (p + EPS).log_().mul_(p)
    return entropy


# -- selection ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def select_regions(
    score: Tensor, radius: Radius, count: int, *, blocked: Tensor | None = None, suppress: Radius | None = None
) -> Tensor:
    """Return the centres that a greedy search picks: the best voxel, then the best that no pick has blocked, and so on.

    Every pick blocks the box of half width ``suppress`` around it. The result is that of one argmax over the image per
    pick. But voxels are sorted once, and only the best: each pick blocks at most the voxels of its box, so that it takes
    few passes, mostly one, over all of them.

    Args:
        score: [*S], one to three axes. -inf is never picked.
        radius: Half width of the regions, in voxels.
        count: How many to pick at most.
        blocked: [*S] bool, voxels that may not become centres. None: all may.
        suppress: Half width of what a pick blocks. None: 2 ``radius``, so that regions do not overlap.

    Returns:
        int64 [n, d] on the score's device, in the order of picking; of equal scores the smallest last index comes first,
        then the smallest of the one before, as with the authors (column, then row). n < ``count`` where nothing is left.
        (The authors go on picking voxel 0 then.)

    Raises:
        ShapeError: The shapes do not belong together, a score is NaN, or ``count`` is below 0.
    """
    axes = score.ndim
    if not 1 <= axes <= 3 or not score.is_floating_point():
        raise ShapeError(f"score must be floating [*S] of one to three axes, not {score.dtype} {tuple(score.shape)}")
    if count < 0:
        raise ShapeError(f"count is {count}; it must not be below 0")
    if blocked is not None and (blocked.shape != score.shape or blocked.dtype != torch.bool):
        raise ShapeError(
            f"blocked must be boolean of shape {tuple(score.shape)}, not {blocked.dtype} {tuple(blocked.shape)}"
        )
    widths = half_widths(radius, axes)
    reach = tuple(2 * w for w in widths) if suppress is None else half_widths(suppress, axes)
    if not count or not score.numel():
        return torch.empty(0, axes, dtype=torch.int64, device=score.device)
    if score.amax().isnan():
        raise ShapeError("score holds NaN; there is no best voxel")
    # last axis first: among equals, the place in this array is the order of picking
    last_first = tuple(reversed(range(axes)))
    half = score.dtype in (torch.float16, torch.bfloat16)
    left = torch.empty(tuple(score.shape)[::-1], dtype=torch.float32 if half else score.dtype, device=score.device)
    left.copy_(score.permute(last_first))
    if blocked is not None:
        left.masked_fill_(blocked.permute(last_first), -torch.inf)
    found = _greedy(left.cpu().numpy(), reach[::-1], count)
    places = np.unravel_index(np.array(found, np.int64), tuple(score.shape)[::-1])
    return torch.from_numpy(np.stack(places[::-1], axis=1)).to(score.device)


def _greedy(left: NDArray[np.floating], reach: tuple[int, ...], count: int) -> list[int]:
    """Return flat places in the order of picking, the first of equals first; what is blocked becomes -inf in ``left``."""
    flat = left.reshape(-1)
    seen = memoryview(flat)  # type: ignore[arg-type]  # a third of the time of looking up numbers in the array
    found: list[int] = []
    shape, box = left.shape, math.prod(2 * r + 1 for r in reach)
    nothing = -math.inf
    while len(found) < count:
        most = min((count - len(found)) * box, max(len(flat) // 16, FEWEST_CANDIDATES))
        places = _best(flat, max(most, FEWEST_CANDIDATES))
        if not len(places):
            break
        for place in places.tolist():
            if seen[place] == nothing:
                continue
            found.append(place)
            if len(found) == count:
                break
            rest, cut = place, []
            for length, r in zip(reversed(shape), reversed(reach), strict=True):
                rest, at = divmod(rest, length)
                cut.append(slice(max(at - r, 0), at + r + 1))
            left[tuple(reversed(cut))] = nothing
    return found


def _best(flat: NDArray[np.floating], wanted: int) -> NDArray[np.int64]:
    """Return about ``wanted`` places of the largest values, in order; -inf is left out.

    Their lowest value is guessed from a sample. However wrong it is, the places are a beginning of the order of all.
    """
    sample = flat[:: max(len(flat) // SAMPLED, 1)]
    rank = min(wanted * len(sample) // len(flat), len(sample) - 1)
    lowest = np.partition(sample, len(sample) - 1 - rank)[len(sample) - 1 - rank]
    places = np.flatnonzero(flat > lowest)
    if len(places) < wanted and lowest > -np.inf:
        ties = np.flatnonzero(flat == lowest)[: wanted - len(places)]
        places = np.concatenate([places, ties])  # ties are the lowest: they stay behind the others, and in order
    return places[np.argsort(-flat[places], kind="stable")]


# -- losses -------------------------------------------------------------------------------------------------------------


def local_consistency(
    logits: Tensor,
    label: Tensor,
    *,
    where: Literal["boundary", "labelled"] = "boundary",
    valid: Tensor | None = None,
) -> Tensor:
    """Return the mean of ``Σ_c |p_c - mean of p_c|``, the mean over the 3 x 3 (x 3) voxels around, centre included.

    At the border of the image the outermost voxels are repeated.

    ``boundary`` is the authors' code: the mean over semantic boundaries of the label, where the sum of the differences of
    its *numbers* to those of all neighbours (8 in 2-D, 26 in 3-D) is not 0. Outside the image the label counts as 0. So
    differences may cancel and miss a boundary; the outermost voxels are boundary unless 0; and so are those beside
    IGNORE. IGNORE itself is left out. ``labelled`` is the paper: the mean over all labelled voxels.

    Args:
        logits: [B, K, *S].
        label: [B, *S] integer, IGNORE where nobody has said.
        where: Over which voxels the mean is taken.
        valid: [B, 1, *S] bool; voxels outside are left out of the mean, but are neighbours. None: all are valid.

    Returns:
        Scalar; 0 with a gradient where there is no such voxel. (The authors' is NaN.)

    Raises:
        ShapeError: The shapes do not belong together.
    """
    if label.shape != (len(logits), *logits.shape[2:]) or label.is_floating_point():
        raise ShapeError(f"labels {tuple(label.shape)} ({label.dtype}) do not belong to logits {tuple(logits.shape)}")
    chosen, inside = label != IGNORE, valid_map(valid, label)
    if where == "boundary":
        numbers = around = label.int()
        for axis in range(1, label.ndim):
            around = _of_two_beside(around, axis)
        chosen = chosen & (around != 3 ** (label.ndim - 1) * numbers)
    if inside is not None:
        chosen = chosen & inside
    with torch.autocast(logits.device.type, enabled=False):  # sums over many voxels do not fit into 16 bits
        total = _NeighbourDistance.apply(logits.float(), chosen)  # type: ignore[no-untyped-call]
        loss: Tensor = total / chosen.sum().clamp_min(1)
    return loss


class _NeighbourDistance(torch.autograd.Function):
    """``Σ_i m_i Σ_c |p_ic - (B p)_ic|`` of logits [B, K, *S], B the mean over 3^d neighbours; gradient by hand.

    B goes axis by axis. No pooling: its gradient is not the same twice on a GPU. The gradient is made along with the sum,
    a few images at a time, while their maps are in the cache; backward only scales it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        grad = torch.empty_like(logits)
        total = logits.new_zeros(())
        axes, mean = range(2, logits.ndim), 3.0 ** (2 - logits.ndim)
        for images in _image_blocks(logits):
            p = torch.softmax(logits[images], 1)
            around = p
            for axis in axes:
                around = _of_three(around, axis)
            difference = around.mul_(-mean).add_(p).mul_(chosen[images].unsqueeze(1).to(p.dtype))
            total += difference.abs().sum()
            sign = difference.sign_()
            around = sign
            for axis in axes:  # the transpose is the sum itself: a border voxel stands in for what lies beyond
                around = _of_three(around, axis)
            of_p = sign.add_(around, alpha=-mean).mul_(p)
            through_softmax(of_p, p, out=grad[images])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * to_total, None


def _image_blocks(maps: Tensor) -> Iterator[slice]:
    """Cut [B, K, *S] along the batch into pieces that fit into a core's cache; off the CPU: all at once."""
    size = max(CPU_BLOCK // maps[0].numel(), 1) if maps.device.type == "cpu" and maps.numel() else max(len(maps), 1)
    for start in range(0, len(maps), size):
        yield slice(start, start + size)


def _of_three(maps: Tensor, axis: int) -> Tensor:
    """Return the sum of every voxel and its two neighbours along an axis, those at the border standing in for what is beyond."""
    length = maps.shape[axis]
    if length < 3:
        last = maps.narrow(axis, length - 1, 1)
        return 3 * maps if length == 1 else maps + maps.narrow(axis, 0, 1) + last
    result = torch.empty_like(maps)
    inner = result.narrow(axis, 1, length - 2)
    torch.add(maps.narrow(axis, 0, length - 2), maps.narrow(axis, 1, length - 2), out=inner)
    inner += maps.narrow(axis, 2, length - 2)
    for border, beside in ((0, 1), (length - 1, length - 2)):
        torch.add(
            maps.narrow(axis, beside, 1), maps.narrow(axis, border, 1), alpha=2, out=result.narrow(axis, border, 1)
        )
    return result


def _of_two_beside(maps: Tensor, axis: int) -> Tensor:
    """Return the sum of every voxel and its two neighbours along an axis; beyond the border there is 0."""
    result, rest = maps.clone(), maps.shape[axis] - 1
    result.narrow(axis, 1, rest).add_(maps.narrow(axis, 0, rest))
    result.narrow(axis, 0, rest).add_(maps.narrow(axis, 1, rest))
    return result


def negative_learning(logits: Tensor, threshold: float = 0.05, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean of ``-log(1 - p + 1e-6)`` over all pairs of voxel and class with p < ``threshold``.

    What is unlikely is made less likely. Which pairs they are carries no gradient.

    Args:
        logits: [B, K, *S].
        threshold: Probability below which a class is taken for wrong, in (0, 1].
        valid: [B, 1, *S] bool; voxels outside are left out. None: all are valid.

    Returns:
        Scalar; 0 with a gradient where there is no such pair. (The authors' is NaN.)

    Raises:
        ShapeError: The threshold is out of range, or the shapes do not belong together.
    """
    if not 0 < threshold <= 1:
        raise ShapeError(f"threshold is {threshold}; it must be in (0, 1]")
    inside = valid_map(valid, logits[:, 0])
    with torch.autocast(logits.device.type, enabled=False):  # sums over many voxels do not fit into 16 bits
        mask = None if inside is None else inside.flatten(1).unsqueeze(1)
        total, pairs = _UnlikelySums.apply(logits.float().flatten(2), mask, threshold)  # type: ignore[no-untyped-call]
        loss: Tensor = -total / pairs.clamp_min(1)
    return loss


class _UnlikelySums(torch.autograd.Function):
    """``Σ log(1 - p + ε)`` over unlikely pairs of voxel and class, and their number, of logits [b, k, n]; gradient by hand.

    The gradient is made along with the sum, block by block; backward only scales it. Masks are numbers, which a CPU
    multiplies four times as fast as it does booleans.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inside: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(logits)
        total, pairs = logits.new_zeros(()), logits.new_zeros(())
        below = float(np.nextafter(np.float32(threshold), np.float32(0)))  # x > below is x >= threshold
        for block in voxel_blocks(logits):
            p = torch.softmax(logits[block], 1)
            likely = F.threshold(p, below, 0.0)
            unlikely = p - likely  # p, or 0
            if inside is None:
                known: Tensor | float = float(p.numel())
            else:
                within = inside[block].to(p.dtype)
                unlikely *= within
                likely *= within
                known = within.sum() * p.shape[1]
            left_out = p.numel() - known + likely.count_nonzero()
            # those left out are log(1 + ε) each
            total += (EPS - unlikely).log1p_().sum() - left_out * math.log1p(EPS)
            pairs += p.numel() - left_out
            of_p = unlikely.div_(unlikely - (1 + EPS))  # p times the derivative with respect to p
            through_softmax(of_p, p, out=grad[block])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(pairs)
        return total, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * to_total, None, None

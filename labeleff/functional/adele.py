"""ADELE: labels are corrected class by class once the training-IoU curve of the class has stopped rising fast.

Liu, Liu, Zhu, Shen and Fernandez-Granda, "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations",
CVPR 2022, arXiv:2110.03740. This follows the authors' two code bases, for SegTHOR and for VOC; options name where they differ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional.losses import (
    DiceForm,
    add_region_sums,
    flat_labels,
    losses_of_sums,
    one_hot_block,
    spread,
    through_softmax,
    towards_probs,
    voxel_blocks,
)
from labeleff.functional.regions import hard_labels
from labeleff.functional.robust import voxel_cross_entropy

CorrectionRule = Literal["segthor", "voc"]
Start = Literal["reference", "relative"]
LARGEST_FIT = 100
"""Evaluations of one fit: a fit that has not settled by then (steps, flat curves) is not worth waiting for."""
RISE, SEEN = 0.1, 0.02
ROUNDING = 1e-9
"""An epoch of a fraction of a measurement must not end one late."""
SMALLEST = 1e-3
SHIFT = 1e-6
"""The derivative is taken at t + 1e-6, as in the authors' code."""

# -- the curve ----------------------------------------------------------------------------------------------------------


def fit_early_learning(iou: ArrayLike, *, unit: float = 1.0) -> tuple[float, float, float]:
    """Fit ``f(t) = a (1 - exp(-t^b / c))`` to a training-IoU curve, late points weighing most.

    Bounded least squares (0 <= a, b <= 1, c >= 0) from (1, 1, 1); the standard deviations of the points fall
    geometrically from 1 to 0.1, so that the last squared residual weighs 100 times the first. As in the authors' code
    the n points lie equally spaced from 0 to n units inclusive, which puts the first one where f is 0.

    Args:
        iou: [n] IoU per epoch, in [0, 1]. NaN: not measured, left out at its place.
        unit: Epochs from one measurement to the next.

    Returns:
        (a, b, c); about (1, 1, 1) where there is nothing to fit.
    """
    from scipy.optimize import least_squares  # a second of importing that only this method needs

    curve = np.asarray(iou, np.float64).ravel()
    known = np.isfinite(curve)
    if not known.any():
        return 1.0, 1.0, 1.0
    time = np.linspace(0, len(curve) * unit, len(curve))[known]
    precision = 1 / np.geomspace(1, 0.1, len(curve))[known]
    target = curve[known]

    def residual(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, c = parameters
        error: NDArray[np.float64] = precision * (a * (1 - np.exp(-(time**b) / c)) - target)
        return error

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # steps push c to 0 and b to either bound
        found = least_squares(residual, (1, 1, 1), bounds=((0, 0, 0), (1, 1, np.inf)), max_nfev=LARGEST_FIT)
    a, b, c = (float(value) for value in found.x)
    return a, b, c


def flat_start(iou: ArrayLike, *, rule: Start = "reference") -> int:
    """Return how many values at the start of a curve are left out because the class had not begun to be learned.

    ``reference`` (the authors'): all before the first rise of at least 0.1 between two measurements; without one all
    but the last, so that a class which is learned slowly, or was learned before the first measurement, is never
    corrected. ``relative``: all before the first value above 0.02 that rises, from the one before (or from 0), by at
    least a tenth of the largest value so far.

    Args:
        iou: [n] IoU per epoch. NaN (not measured) counts as the value before.
        rule: Which rise ends the flat start.
    """
    curve = _filled(iou)
    if rule == "reference":
        rises = np.flatnonzero(np.diff(curve) >= RISE)
        return int(rises[0]) if len(rises) else max(len(curve) - 1, 0)
    steps = np.diff(curve, prepend=0.0)
    rises = np.flatnonzero((curve > SEEN) & (steps >= RISE * np.maximum.accumulate(curve)))
    return max(int(rises[0]) - 1, 0) if len(rises) else max(len(curve) - 1, 0)


def _filled(iou: ArrayLike) -> NDArray[np.float64]:
    """Return the curve with every NaN replaced by the last value before it, or 0."""
    curve = np.asarray(iou, np.float64).ravel()
    source = np.maximum.accumulate(np.where(np.isfinite(curve), np.arange(len(curve)), -1))
    return np.where(source >= 0, curve[source], 0.0) if len(curve) else curve


def correction_epoch(
    iou: ArrayLike,
    *,
    total: int,
    r: float = 0.9,
    skip_flat_start: bool = True,
    start: Start = "reference",
    unit: float = 1.0,
) -> int:
    """Return the 0-based index of the epoch from which a class is corrected, as its curve so far has it.

    With f fitted to the curve it is the number of the first epoch t = 2, 3, … ``total - 1`` at which
    ``|f'(t) - f'(1)| / |f'(1)| > r``, that is, at which the slope has fallen below (1 - r) of that after the first
    epoch. The class is due as soon as the index of the newest epoch has reached it. To be asked again after every
    epoch.

    Args:
        iou: [n] IoU per measurement so far; NaN where none was made.
        total: Number of epochs N of the whole training.
        r: How much of its first slope the curve must have lost, in (0, 1).
        skip_flat_start: Leave out the flat start of the curve (see :func:`flat_start`) and count from its end. The
            authors do on SegTHOR, not on VOC.
        start: Rule for the end of the flat start.
        unit: Epochs from one measurement to the next: 1 on SegTHOR; on VOC 100 steps of 1058.

    Returns:
        min(total, ·), the skipped start included; ``total`` if never, and where at most one point is left, or all are
        0 or NaN.
    """
    curve = np.asarray(iou, np.float64).ravel()
    left_out = flat_start(curve, rule=start) if skip_flat_start else 0
    curve, shift = curve[left_out:], math.ceil(left_out * unit - ROUNDING)
    known = curve[np.isfinite(curve)]
    if len(known) <= 1 or not known.any():
        return total
    a, b, c = fit_early_learning(curve, unit=unit)
    with np.errstate(all="ignore"):
        time = np.arange(1, total) + SHIFT
        slope = a * b / c * time ** (b - 1) * np.exp(-(time**b) / c)
        lost = np.abs(np.abs(slope) - np.abs(slope[:1])) / np.abs(slope[:1])
    if not np.isfinite(lost).all():  # no slope to lose: the fit is flat, or a step
        return total if a * b == 0 else min(total, 2 + shift)
    return min(total, 1 + int(np.count_nonzero(lost <= r)) + shift)


# -- the labels ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def correct_labels(
    label: Tensor,
    probs: Tensor,
    classes: Collection[int],
    *,
    threshold: float,
    rule: CorrectionRule = "segthor",
    background_threshold: float | None = None,
    class_constraint: bool = True,
    logic255: bool = False,
    mode: Literal["single", "both"] = "single",
    veto: bool = True,
    agreement: float = 0.0,
) -> Tensor:
    """Return label maps in which confident predictions of some classes have replaced what they contradict.

    With y the label, p the probabilities, k the most probable class and S = {0} and the classes to correct:

    ``segthor``: images without a foreground class of S are left alone. Elsewhere k is written where p of some
    foreground class > ``threshold`` or p of background > ``background_threshold`` (not tied to k: with unequal
    thresholds k may be the class that did not pass), y and k are in S, and k is background or occurs in the image's y.
    IGNORE is never refilled.

    ``voc``: images without a foreground class of S are left alone, unless they have no foreground at all. k is written
    where the largest p > ``threshold``, k is in S and, in images with foreground, k (0 too) occurs in y. IGNORE is
    refilled, unless ``mode`` is ``both``. Nothing is done where ``classes`` names no foreground class.

    Args:
        label: [B, *S] integer, current labels; IGNORE where nobody has said.
        probs: [B, K, *S] probabilities.
        classes: Classes to correct; background always belongs to them.
        threshold: Probability that must be exceeded (the authors: 0.7 ``segthor``, 0.8 ``voc``).
        rule: Which of the authors' two code bases.
        background_threshold: ``segthor``: threshold of background; None: the same.
        class_constraint: Write a class only into images whose label has it.
        logic255: ``segthor``: afterwards every voxel labelled other than 0 whose k is 0 becomes IGNORE, however sure.
        mode: ``voc``: ``both`` asks that y is in S too, ``single`` does not.
        veto: ``voc``: leave an image as it was if its labels other than 0 (IGNORE counts) would shrink below half and
            more than 95 % of it would be background.
        agreement: Where fewer than this share of an image's voxels of a class are predicted as it, the network has not found
            what is labelled there, and that class is neither overwritten nor written in that image. 0, as in both of the
            authors' code bases: corrections may take an object away whole.

    Returns:
        [B, *S], of the label's type.

    Raises:
        ShapeError: The shapes do not belong together.
    """
    if label.shape != (len(probs), *probs.shape[2:]) or label.is_floating_point():
        raise ShapeError(f"labels {tuple(label.shape)} ({label.dtype}) do not belong to probs {tuple(probs.shape)}")
    count = probs.shape[1]
    wanted = sorted({int(c) for c in classes if 0 < int(c) < count})
    probs = probs.float().flatten(2)
    y, k = label.flatten(1).long(), hard_labels(probs)
    table = torch.zeros(max(count, IGNORE) + 1, dtype=torch.bool, device=label.device)
    table[[0, *wanted]] = True
    occurs = torch.stack([(y == c).any(1) for c in range(count)], dim=1)  # [B, K]
    due = occurs[:, wanted].any(1)
    if rule == "segthor":
        lowest = threshold if background_threshold is None else background_threshold
        write = ((probs[:, 1:].amax(1) > threshold) | (probs[:, 0] > lowest)) & table[y] & table[k]
        if class_constraint:
            write &= (k == 0) | occurs.gather(1, k)
        new = torch.where(write & _found(y, k, count, agreement), k, y)
        if logic255:
            new = torch.where((y != 0) & (k == 0), IGNORE, new)
    else:
        empty = ~occurs[:, 1:].any(1)
        due = (due | empty) if wanted else due
        write = (probs.amax(1) > threshold) & table[k]
        if mode == "both":
            write &= table[y]
        if class_constraint:
            write &= empty[:, None] | occurs.gather(1, k)
        new = torch.where(write & _found(y, k, count, agreement), k, y)
        if veto:
            due = due & ~_vetoed(y, new)
    return torch.where(due[:, None], new, y).to(label.dtype).view(label.shape)


def _found(y: Tensor, k: Tensor, count: int, agreement: float) -> Tensor:
    """Return [B, n] for labels and predictions [B, n]: both are classes of which the image's prediction found enough."""
    if not agreement:
        return torch.ones_like(y, dtype=torch.bool)
    found = torch.ones(len(y), max(count, IGNORE) + 1, dtype=torch.bool, device=y.device)
    for c in range(1, count):
        labelled = y == c
        found[:, c] = (labelled & (k == c)).sum(1) >= agreement * labelled.sum(1)
    return found.gather(1, y) & found.gather(1, k)


def _vetoed(old: Tensor, new: Tensor) -> Tensor:
    """Return [B] for labels [B, n]: less than half of what is not 0 is left, and more than 95 % is 0."""
    return ((new != 0).sum(1) < 0.5 * (old != 0).sum(1)) & ((new == 0).float().mean(1) > 0.95)


# -- the losses ---------------------------------------------------------------------------------------------------------


def multiscale_consistency(
    logits: Sequence[Tensor],
    label: Tensor,
    *,
    gate: float = 0.8,
    weights: Sequence[float] | Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the divergence of the scales from their mean prediction.

    ``q = clamp(Σ_s w_s p_s, 0.001, 0.999)`` and ``J = Σ_s Σ_c p_s log(p_s / q)`` per voxel, the sum over scales not
    weighted; gradients flow through q. An image whose largest q, background included, where its label is not IGNORE
    stays below ``gate`` adds 0, but counts in the mean.

    Args:
        logits: One [B, K, *S] per scale s, all resized to one grid.
        label: [B, *S].
        gate: Smallest confidence ρ of an image's surest voxel.
        weights: w, one per scale, summing to 1; None: all equal.
        valid: [B, 1, *S] bool; voxels outside count nowhere. None: all count.

    Returns:
        Scalar, the mean over batch and voxels; slightly below 0 at worst, since q is clamped.
    """
    with torch.autocast(label.device.type, enabled=False):
        maps = [z.float().flatten(2) for z in logits]
        shares = torch.stack([torch.as_tensor(w, dtype=torch.float32) for w in _shares(logits, weights)])
        divergence, surest = _Divergence.apply(shares, *maps)  # type: ignore[no-untyped-call]
        return _gated_mean(divergence, surest, label != IGNORE, valid, gate)


def multiscale_losses(
    logits: Sequence[Tensor],
    label: Tensor,
    *,
    dice: DiceForm = "squared",
    gate: float = 0.8,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean of :func:`segmentation_loss` over the scales, and :func:`multiscale_consistency` of equal weights.

    Computed together, since each alone would need the softmax of every scale and a pass over it backward.

    Args:
        logits: One [B, K, *S] per scale, all resized to one grid.
        label: [B, *S] int64 with IGNORE where nobody has said.
        dice: Form of the Dice loss, see :func:`region_losses`.
        gate: Smallest confidence ρ of an image's surest voxel.
        valid: [B, 1, *S] bool; voxels outside do not count in the consistency. None: all do.

    Returns:
        Two scalars; the first is 0 with a gradient where nothing is known.
    """
    shares = _shares(logits, None)
    with torch.autocast(label.device.type, enabled=False):
        maps = [z.float().flatten(2) for z in logits]
        known = label != IGNORE
        masks = known.flatten(1).unsqueeze(1).float()
        *sums, present, divergence, surest = _Scales.apply(  # type: ignore[no-untyped-call]
            flat_labels(label, maps[0].shape[1]), masks, dice == "squared", shares, *maps
        )
        scales = [losses_of_sums((*of_scale, present), masks, dice=dice) for of_scale in zip(*sums, strict=True)]
        supervised = torch.stack([(cross_entropy + overlap).sum() / 2 for cross_entropy, overlap in scales]).mean()
        return supervised, _gated_mean(divergence, surest, known, valid, gate)


def _gated_mean(divergence: Tensor, surest: Tensor, known: Tensor, valid: Tensor | None, gate: float) -> Tensor:
    """Return the mean of J [B, n] over valid voxels, 0 in images whose q [B, n] stays below the gate where known [B, *S]."""
    known = known.flatten(1)
    inside = torch.ones_like(known) if valid is None else valid.reshape(known.shape)
    opened = (surest * (known & inside)).amax(1, keepdim=True) >= gate
    total: Tensor = (divergence * (opened & inside)).sum()
    return total / inside.sum().clamp_min(1)


def _apart(logs: Sequence[Tensor], probs: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Turn log p into log(p / q) in place, [b, k, n] per scale.

    Returns:
        J [b, n]; the largest q [b, n]; Σ_s p_s / q where q is not clamped and 0 elsewhere, [b, k, n].
    """
    total, mixture = probs[0].clone(), probs[0] * shares[0]
    for w, p in zip(shares[1:], probs[1:], strict=True):
        total += p
        mixture.add_(p, alpha=w)
    q = mixture.clamp(SMALLEST, 1 - SMALLEST)
    surest = q.amax(1)
    unclamped = torch.eq(mixture, q, out=torch.empty_like(q))  # as numbers: a CPU takes ten times as long over bools
    pull = total.div_(q).mul_(unclamped)
    mixed = q.log_()
    divergence = torch.zeros_like(surest)
    for log, p in zip(logs, probs, strict=True):
        log -= mixed
        divergence += (p * log).sum(1)
    return divergence, surest, pull


class _Divergence(torch.autograd.Function):
    """J and the largest q, [b, n] each, of n weights and n maps [b, k, n], and the gradient of J by hand.

    With p the softmax, P = Σ_s p_s and q the clamped mixture, ``∂J/∂z_s = p_s (g - Σ_c p_s g)`` and
    ``g = log p_s - log q - w_s P / q``, the last only where q is not clamped; ``∂J/∂w_s = -Σ_c p_s P / q``. On the CPU it
    goes block by block, see :func:`voxel_blocks`.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, *logits: Tensor) -> tuple[Tensor, Tensor]:
        divergence, surest = logits[0].new_empty(2, len(logits[0]), logits[0].shape[2])
        to_logits = [
            torch.empty_like(z) if needed else None for z, needed in zip(logits, ctx.needs_input_grad[1:], strict=True)
        ]
        to_shares = [torch.empty_like(divergence) for _ in logits] if ctx.needs_input_grad[0] else []
        numbers: list[float] = shares.tolist()
        for block in voxel_blocks(logits[0]):
            flat = block[::2]
            logs = [F.log_softmax(z[block], dim=1) for z in logits]
            probs = [log.exp() for log in logs]
            divergence[flat], surest[flat], pull = _apart(logs, probs, numbers)
            for s, (p, log) in enumerate(zip(probs, logs, strict=True)):
                if to_shares:
                    to_shares[s][flat] = -(p * pull).sum(1)
                target = to_logits[s]
                if target is not None:
                    through_softmax(log.sub_(pull, alpha=numbers[s]).mul_(p), p, out=target[block])
        ctx.save_for_backward(*to_logits, *to_shares)
        ctx.count, ctx.device = len(logits), shares.device
        ctx.mark_non_differentiable(surest)
        return divergence, surest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        to_logits, to_shares = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        of_shares = torch.stack([(upstream * d).sum() for d in to_shares]).to(ctx.device) if to_shares else None
        return of_shares, *(None if d is None else d * upstream.unsqueeze(1) for d in to_logits)


class _Scales(torch.autograd.Function):
    """The sums of :class:`_RegionSums`, one region, and J of given weights, of n maps [b, k, n]: one softmax per map.

    Returns likelihood, overlap and size [scales, b, k, 1], present [b, k, 1], J and the largest q [b, n]. Backward, J passes
    ``p_s g``, of :class:`_Divergence`, on to log p_s beside what the sums do.
    """

    @staticmethod
    def forward(
        ctx: Any, label: Tensor, masks: Tensor, squared: bool, shares: Sequence[float], *logits: Tensor
    ) -> tuple[Tensor, ...]:
        count, (batch, classes, voxels) = len(logits), logits[0].shape
        divergence, surest = logits[0].new_empty(2, batch, voxels)
        kept, apart = ([torch.empty_like(z) for z in logits] for _ in range(2))
        likelihood, overlap, size = logits[0].new_zeros(3, count, batch, classes, 1)
        present = logits[0].new_zeros(batch, classes, 1)
        for block in voxel_blocks(logits[0]):
            y, m = one_hot_block(label, block, logits[0]), masks[block]
            present.baddbmm_(y, m.transpose(1, 2))
            logs = [F.log_softmax(z[block], dim=1) for z in logits]
            probs = [log.exp() for log in logs]
            for s, (log, p) in enumerate(zip(logs, probs, strict=True)):
                add_region_sums(likelihood[s], overlap[s], size[s], log, p, y, m, squared=squared)
                kept[s][block] = p
            divergence[block[::2]], surest[block[::2]], pull = _apart(logs, probs, shares)
            for s, log in enumerate(logs):
                torch.sub(log, pull, alpha=shares[s], out=apart[s][block])
        ctx.save_for_backward(label, masks, *kept, *apart)
        ctx.squared = squared
        ctx.mark_non_differentiable(present, surest)
        return likelihood, overlap, size, present, divergence, surest

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        to_likelihood: Tensor,
        to_overlap: Tensor,
        to_size: Tensor,
        _: Tensor,
        to_divergence: Tensor,
        __: Tensor,
    ) -> tuple[Tensor | None, ...]:
        label, masks, *maps = ctx.saved_tensors
        kept, apart = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        grads, to_divergence = [torch.empty_like(p) for p in kept], to_divergence.unsqueeze(1)
        for block in voxel_blocks(kept[0]):
            y, m, upstream = one_hot_block(label, block, kept[0]), masks[block], to_divergence[block]
            for s, grad in enumerate(grads):
                p = kept[s][block]
                of_p = towards_probs(to_overlap[s], to_size[s], p, y, m, squared=ctx.squared)
                of_log_p = of_p.addcmul_(apart[s][block], upstream).mul_(p).addcmul_(spread(to_likelihood[s], m), y)
                through_softmax(of_log_p, p, out=grad[block])
        return None, None, None, None, *grads


def multiscale_cross_entropy(
    logits: Sequence[Tensor],
    label: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    temperature: float | None = None,
    reduction: Literal["all", "known"] = "all",
) -> Tensor:
    """Return the cross-entropy summed over scales.

    The authors weigh the logits, ``Σ_s CE(w_s z_s, y)``, which for n equal weights is cross-entropy at temperature n.
    With a ``temperature`` T it is ``Σ_s n w_s CE(z_s / T, y)``: T = n is the authors' for equal weights, T = 1 the usual.

    Args:
        logits: One [B, K, *S] per scale s, all resized to one grid.
        label: [B, *S] int64 with IGNORE where nobody has said.
        weights: w, one per scale, summing to 1; None: all equal.
        temperature: T; None: the authors' form.
        reduction: Mean over ``all`` voxels, IGNORE adding 0 (the authors'), or over the ``known``.

    Returns:
        Scalar; 0 with a gradient where nothing is known.
    """
    count = len(logits)
    with torch.autocast(label.device.type, enabled=False):
        total: Tensor = logits[0].new_zeros((), dtype=torch.float32)
        for w, z in zip(_shares(logits, weights), logits, strict=True):
            scores = w * z.float() if temperature is None else z.float() / temperature
            term = _summed_cross_entropy(scores, label)
            total = total + (term if temperature is None else count * w * term)
        voxels = (label != IGNORE).sum().clamp_min(1) if reduction == "known" else label.numel()
        return total / voxels


def _summed_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return the sum over voxels; a GPU makes torch's own in an order that differs from run to run."""
    if logits.is_cuda:
        return voxel_cross_entropy(logits, label).sum()
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")


def _shares(logits: Sequence[Tensor], weights: Sequence[float] | Tensor | None) -> list[float | Tensor]:
    """Return one weight per scale.

    Raises:
        ShapeError: There is not one weight per scale, or the scales differ in shape.
    """
    if weights is not None and len(weights) != len(logits):
        raise ShapeError(f"{len(weights)} weights for {len(logits)} scales")
    if len({tuple(z.shape) for z in logits}) != 1:
        raise ShapeError(f"the scales have the shapes {[tuple(z.shape) for z in logits]}; resize them to one grid")
    return [1 / len(logits)] * len(logits) if weights is None else list(weights)

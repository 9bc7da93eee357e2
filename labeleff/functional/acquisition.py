"""What a model is unsure of, voxel by voxel and window by window: scores that say where to ask for labels.

Entropies of one or several predictions, their means over boxes at a cost that does not grow with the box, and noise that
spreads what is asked. Scores carry no gradient.

Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", 2011, arXiv:1112.5745 (BALD); Lüth et
al., "nnActive: A Framework for Evaluation of Active Learning in 3D Biomedical Segmentation", TMLR 2025, arXiv:2511.19183;
ClaSP PE: TMLR 2026, arXiv:2601.13677.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from labeleff.errors import ShapeError

Radius = int | Sequence[int]
"""Half width of a window in voxels, 2 radius + 1 wide: one for every axis, or one per axis."""

LARGE_LAYER = 8192
"""Voxels of a layer of an image from which a call for each layer costs less than to turn the image round."""

# -- windows ------------------------------------------------------------------------------------------------------------


def half_widths(radius: Radius, axes: int) -> tuple[int, ...]:
    """Return one half width per axis.

    Raises:
        ShapeError: Another number of them than axes, or one below 0.
    """
    given = tuple(radius) if isinstance(radius, Sequence) else (radius,) * axes
    widths = tuple(int(r) for r in given)
    if len(widths) != axes or min(widths) < 0 or widths != given:
        raise ShapeError(
            f"radius is {radius}; it must be one whole number, or one for each of {axes} axes, none below 0"
        )
    return widths


@torch.no_grad()
def box_sum(values: Tensor, radius: Radius) -> Tensor:
    """Return the sum over the window around every voxel, cut off at the border of the image.

    Differences of running sums, axis by axis, so that the cost does not depend on the radius.

    Args:
        values: [B, *S]. Numbers that are not finite would spread along the axes.
        radius: Half width.

    Returns:
        [B, *S]: int32 of booleans and int64 of integers, exact; else float64.
    """
    widths = half_widths(radius, values.ndim - 1)
    exact = torch.int32 if values.dtype == torch.bool else torch.int64
    # of two long sums in 32 bits, the difference has lost its digits
    dtype = torch.float64 if values.is_floating_point() else exact
    layers = [values.numel() // max(length, 1) for length in values.shape[1:-1]]
    if values.device.type == "cpu" and min(layers, default=0) >= LARGE_LAYER:
        summed = _sum_along_last(values, widths[-1], dtype)
        for axis in range(values.ndim - 2, 0, -1):
            summed = _sum_by_layers(summed, widths[axis - 1], axis)
        return summed
    summed = values
    for width in reversed(widths):  # the last axis is summed and moved to the front; after all, the order is back
        summed = _last_to_front(_sum_along_last(summed, width, dtype))
    return summed


def _sum_by_layers(values: Tensor, reach: int, axis: int) -> Tensor:
    """Return sums along an axis, each layer from the one before it: nothing is turned round, and few voxels are touched twice."""
    length = values.shape[axis]
    if reach == 0:
        return values
    if reach >= length - 1:
        return values.sum(axis, keepdim=True, dtype=values.dtype).expand_as(values)
    summed = torch.empty_like(values)
    given, made = values.unbind(axis), summed.unbind(axis)
    torch.sum(values.narrow(axis, 0, reach + 1), axis, dtype=values.dtype, out=made[0])
    for at in range(1, length):
        last, first = at + reach, at - reach - 1
        if last < length:
            torch.add(made[at - 1], given[last], out=made[at])
        else:
            made[at].copy_(made[at - 1])
        if first >= 0:
            made[at].sub_(given[first])
    return summed


def _last_to_front(maps: Tensor) -> Tensor:
    """Return ``maps.movedim(-1, 1)``, copied: as transposed matrices, which torch does block by block."""
    moved = maps.new_empty(len(maps), maps.shape[-1], *maps.shape[1:-1])
    for source, target in zip(maps, moved, strict=True):
        target.view(len(target), -1).copy_(source.reshape(-1, len(target)).t())
    return moved


def _sum_along_last(values: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    length = values.shape[-1]
    if reach == 0:
        return values.to(dtype)
    running = values.cumsum(-1, dtype=dtype)
    if reach >= length - 1:
        return running[..., -1:].expand_as(running)
    summed = torch.empty_like(running)
    if 2 * reach + 1 < length:  # the windows that lie inside, in one pass
        inside = length - 2 * reach - 1
        torch.sub(running[..., 2 * reach + 1 :], running[..., :inside], out=summed[..., reach + 1 : length - reach])
        summed[..., : reach + 1] = running[..., reach : 2 * reach + 1]
        torch.sub(running[..., -1:], running[..., inside : inside + reach], out=summed[..., length - reach :])
        return summed
    summed[..., : length - reach] = running[..., reach:]
    summed[..., length - reach :] = running[..., -1:]
    summed[..., reach + 1 :] -= running[..., : length - reach - 1]
    return summed


def box_count(like: Tensor, radius: Radius, known: Tensor | None = None) -> Tensor:
    """Return how many voxels of each window lie inside the image and are known; 1 where there are none.

    Args:
        like: [B, *S], for its shape and device.
        radius: Half width.
        known: [B, *S] bool. None: all.

    Returns:
        int32 [B, *S], or [1, *S] where all are known.
    """
    if known is not None:
        return box_sum(known, radius).clamp_min_(1)
    count = torch.ones([1] * like.ndim, dtype=torch.int32, device=like.device)
    for axis, reach in enumerate(half_widths(radius, like.ndim - 1), start=1):
        length = like.shape[axis]
        at = torch.arange(length, dtype=torch.int32, device=like.device)
        inside = (at + reach).clamp_max(length - 1) - (at - reach).clamp_min(0) + 1
        count = count * inside.view([-1 if a == axis else 1 for a in range(like.ndim)])
    return count


@torch.no_grad()
def box_mean(score: Tensor, radius: Radius, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean over the window around every voxel, over what lies inside the image and is valid.

    Args:
        score: [B, *S].
        radius: Half width.
        valid: [B, 1, *S] bool; what is outside counts nowhere. None: all is valid.

    Returns:
        [B, *S] float32; 0 where nothing of the window is valid.

    Raises:
        ShapeError: A number is not finite, or the shapes do not belong together.
    """
    known = valid_map(valid, score)
    values = score.float() if known is None else score.float().masked_fill(~known, 0)
    if not torch.isfinite(values).all():
        raise ShapeError(
            "score holds NaN or infinity, which would spread along the axes; leave such voxels out of valid"
        )
    return (box_sum(values, radius) / box_count(values, radius, known)).float()


def valid_map(valid: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``valid`` [B, 1, *S] as a map [B, *S] that belongs to ``like`` [B, *S]; None stays None.

    Raises:
        ShapeError: It is not boolean, or has another shape.
    """
    if valid is None:
        return None
    if valid.dtype != torch.bool or valid.shape != (len(like), 1, *like.shape[1:]):
        raise ShapeError(
            f"valid must be boolean of shape {(len(like), 1, *like.shape[1:])}, not {valid.dtype} {tuple(valid.shape)}"
        )
    return valid[:, 0]


# -- voxels -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictive_entropy(probs: Tensor) -> Tensor:
    """Return the entropy ``-Σ_k p_k log p_k`` of the mean prediction, in nats.

    Args:
        probs: [T, B, K, *S] probabilities of T networks, folds or dropout samples.

    Returns:
        [B, *S] float32, in [0, log K].

    Raises:
        ShapeError: The shape has no T, B, K and one to three axes, or a number is NaN.
    """
    return _refuse_nan(_entropy(_samples(probs).float().mean(0)))


@torch.no_grad()
def expected_entropy(probs: Tensor) -> Tensor:
    """Return the mean of the entropies of the predictions, in nats: see :func:`predictive_entropy`."""
    samples = _samples(probs)
    total = _entropy(samples[0].float())
    for sample in samples[1:]:
        total += _entropy(sample.float())
    return _refuse_nan(total / len(samples))


@torch.no_grad()
def mutual_information(probs: Tensor) -> Tensor:
    """Return predictive minus expected entropy (BALD), in nats, never below 0: see :func:`predictive_entropy`.

    How much the predictions contradict one another; 0 for a single one.
    """
    return (predictive_entropy(probs) - expected_entropy(probs)).clamp_min_(0)


@torch.no_grad()
def class_entropy(probs: Tensor, index: int) -> Tensor:
    """Return the predictive entropy times the mean probability of one class: ClaSP PE's score of that class.

    Args:
        probs: [T, B, K, *S].
        index: The class.

    Returns:
        [B, *S] float32.

    Raises:
        ShapeError: As :func:`predictive_entropy`, or there is no such class.
    """
    samples = _samples(probs)
    if not 0 <= index < samples.shape[2]:
        raise ShapeError(f"class {index} is none of the {samples.shape[2]} of probs")
    return predictive_entropy(probs) * samples[:, :, index].float().mean(0)


def _samples(probs: Tensor) -> Tensor:
    if not 4 <= probs.ndim <= 6 or not probs.is_floating_point() or not len(probs):
        raise ShapeError(
            f"probs must be [T, B, K, *S] of one to three spatial axes, T at least 1, not {tuple(probs.shape)} {probs.dtype}"
        )
    return probs


def _entropy(probs: Tensor) -> Tensor:
    """Return [B, *S] of [B, K, *S], class by class."""
    total: Tensor = torch.special.entr(probs[:, 0])
    for index in range(1, probs.shape[1]):
        total += torch.special.entr(probs[:, index])
    return total


def _refuse_nan(score: Tensor) -> Tensor:
    if score.isnan().any():
        raise ShapeError("probs hold NaN; the network that made them has diverged")
    return score


# -- noise --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def power_noise(score: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return ``log score + g / beta`` with independent g ~ Gumbel(0, 1): PowerBALD, PowerPE.

    The n largest are then n draws without replacement with odds ``score^beta``. Kirsch et al., "Stochastic Batch
    Acquisition: A Simple Baseline for Deep Active Learning", TMLR 2023, arXiv:2106.12059.

    Args:
        score: Any shape, not negative but for rounding.
        beta: β > 0; the larger, the closer to the order of the scores.
        generator: Source of randomness, on the CPU, so that the draws are the same on every device.

    Returns:
        float32 of the same shape; -inf, never picked, where the score is 0 or less.

    Raises:
        ShapeError: β is not above 0, or a score is NaN.
    """
    if not beta > 0:
        raise ShapeError(f"beta is {beta}; it must be above 0")
    if score.isnan().any():
        raise ShapeError("score holds NaN; there is no order to disturb")
    uniform = torch.rand(score.shape, generator=generator, dtype=torch.float64).clamp_min_(torch.finfo().tiny)
    gumbel = uniform.log_().neg_().log_().neg_().to(score.device)
    return (score.double().clamp_min(0).log() + gumbel / beta).float()


def rising_beta(number: int, total: int, *, first: float = 1.0, last: float = 100.0) -> float:
    """Return β of round ``number`` (from 0) of ``total``, rising from ``first`` to ``last`` by equal factors (ClaSP PE)."""
    return first * math.pow(last / first, number / max(total - 1, 1))

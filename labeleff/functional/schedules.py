"""Schedules as pure functions of a step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def sigmoid_rampup(fraction: float) -> float:
    """Return ``exp(-5 (1 - t)²)`` for t clipped to [0, 1] (Laine and Aila, arXiv:1610.02242): 0.0067 at 0, 1 at 1."""
    return math.exp(-5 * (1 - min(max(fraction, 0.0), 1.0)) ** 2)


def ramped(weight: float, fraction: float, length: float) -> float:
    """Return a weight at a share of a stage: it rises by :func:`sigmoid_rampup` over the share ``length``; 0: no ramp."""
    return weight * (sigmoid_rampup(fraction / length) if length else 1.0)


def early_decay(step: int, decay: float) -> float:
    """Return ``min(1 - 1 / (step + 1), decay)``, with which a teacher is the plain mean of the first students (UA-MT)."""
    return min(1 - 1 / (step + 1), decay)


def rate_factor(
    step: int,
    total: int,
    *,
    name: Literal["constant", "step", "poly", "cosine"] = "constant",
    warmup: int = 0,
    every: int = 2500,
    gamma: float = 0.1,
    power: float = 0.9,
    final: float = 0.0,
) -> float:
    """Return the factor on the learning rate for the optimiser step ``step`` (0-based) of ``total``.

    Args:
        step: 0-based step.
        total: Steps of the stage.
        name: ``constant``; ``step``: ``gamma`` to the number of whole ``every``; ``poly``: ``(1 - t)^power``;
            ``cosine``: ``(1 + cos(π t)) / 2``, with t the share of the steps after warm-up that are done.
        warmup: Steps of linear warm-up, the first at ``1 / warmup``.
        every: Steps between drops.
        gamma: Factor of a drop.
        power: Exponent of ``poly``.
        final: Factor that ``poly`` and ``cosine`` end at.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if name == "step":
        return math.pow(gamma, step // every)
    if name == "poly":
        return final + (1 - final) * math.pow(max(0.0, 1 - done), power)
    if name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return 1.0

"""Exponential moving averages of networks (mean teachers)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from labeleff.errors import ShapeError

BufferRule = Literal["copy", "average", "keep"]


@torch.no_grad()
def ema_update_(average: nn.Module, model: nn.Module, decay: float, *, buffers: BufferRule = "copy") -> None:
    """Move ``average`` towards ``model`` in place: ``θ̄ ← decay · θ̄ + (1 - decay) · θ``.

    Args:
        average: The averaged network; its parameters are written to.
        model: The network that is followed; same architecture.
        decay: λ in [0, 1]; 0 copies the model.
        buffers: ``copy`` the model's, ``average`` them like parameters (integer ones in float, then truncated, as BCP's
            ACDC code does), or ``keep`` the average's own.

    Raises:
        ShapeError: The decay is outside [0, 1], or the networks differ.
    """
    if not 0 <= decay <= 1:
        raise ShapeError(f"decay is {decay}; it must lie in [0, 1]")
    mine, theirs = dict(average.named_parameters()), dict(model.named_parameters())
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())[0]
        raise ShapeError(f"the averaged network and the model differ in parameter {odd!r}")
    if mine:
        torch._foreach_mul_(list(mine.values()), decay)
        torch._foreach_add_(list(mine.values()), [theirs[name] for name in mine], alpha=1 - decay)
    if buffers == "keep":
        return
    followed = dict(model.named_buffers())
    pairs = [(buffer, followed[name]) for name, buffer in average.named_buffers()]
    floating = [pair for pair in pairs if pair[0].is_floating_point() and buffers == "average"]
    if floating:
        torch._foreach_lerp_([own for own, _ in floating], [other for _, other in floating], 1 - decay)
    for own, other in pairs:
        if buffers == "copy":
            own.copy_(other)
        elif not own.is_floating_point():
            own.copy_((decay * own.double() + (1 - decay) * other.double()).trunc())

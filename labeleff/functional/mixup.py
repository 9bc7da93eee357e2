"""Mixtures of images and of what is known of them (mixup)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from labeleff.batch import beside

Pairs = Literal["each", "drawn"]


def draw_mixture(
    count: int, alpha: float, *, generator: torch.Generator, pairs: Pairs = "each"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which images of a batch are mixed, and how much of the first is in the mixture.

    Zhang, Cisse, Dauphin and Lopez-Paz, "mixup", ICLR 2018, arXiv:1710.09412; λ ~ Beta(α, α) for every mixture.

    Args:
        count: Images B, and mixtures.
        alpha: α above 0; the smaller, the nearer a mixture is to one of its images.
        generator: On the CPU; everything drawn is a function of it.
        pairs: ``each``: image b with another one, so that all take part; ``drawn``: two images at random, perhaps the same.

    Returns:
        First and second images, [B] int64, and λ, [B] float32 in [0, 1].
    """
    if pairs == "drawn":
        first, second = torch.randint(count, (2, count), generator=generator)
    else:
        first = torch.arange(count)
        order = torch.randperm(count, generator=generator)
        second = torch.empty_like(first)
        second[order] = order.roll(1)  # a cycle: nobody is its own partner
    # torch draws no beta from a generator
    seed = int(torch.randint(2**62, (1,), generator=generator))
    share = np.random.default_rng(seed).beta(alpha, alpha, size=count)
    return first, second, torch.from_numpy(share.astype(np.float32))


def mixed(values: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return ``λ x_i + (1 - λ) x_j`` of values [B, C, *S]."""
    weight = beside(share.to(values.dtype), values).view(-1, *([1] * (values.ndim - 1)))
    return weight * values[beside(first, values)] + (1 - weight) * values[beside(second, values)]


def mixed_shares(shares: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return the mixture of shares of classes [B, K, *S]; 0 where either image is unknown: nobody has said what the mixture is.

    Args:
        shares: They sum to 1 over the classes, or to 0 where nothing is known.
        first: Images [B].
        second: Images [B].
        share: λ [B].
    """
    known = (shares.sum(1, keepdim=True) > 0).to(shares)
    both = known[beside(first, shares)] * known[beside(second, shares)]
    return mixed(shares, first, second, share) * both

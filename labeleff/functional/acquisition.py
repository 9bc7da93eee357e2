"""Scores of active learning beside RIPU: entropies, mutual information, and noise that spreads picks out."""

from __future__ import annotations

import torch
from torch import Tensor

from labeleff.errors import ShapeError
from labeleff.functional.ripu import box_mean

__all__ = ["box_mean", "expected_entropy", "mutual_information", "power_noise", "predictive_entropy"]


def predictive_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of the mean prediction of T samples.

    Args:
        probs: [T, B, K, *S].

    Returns:
        [B, *S] float32, nats; 0 · log 0 is 0.
    """
    entropy: Tensor = torch.special.entr(_checked(probs).mean(0)).sum(1)
    return entropy


def expected_entropy(probs: Tensor) -> Tensor:
    """Return the mean over T samples of the entropy of their predictions, [B, *S] of [T, B, K, *S], nats."""
    total = torch.zeros_like(probs[0, :, 0], dtype=torch.float32)
    for sample in _checked(probs):
        total += torch.special.entr(sample).sum(1)
    return total / len(probs)


def mutual_information(probs: Tensor) -> Tensor:
    """Return the mutual information of label and weights (BALD; Houlsby et al., 2011, arXiv:1112.5745, equation 2).

    Args:
        probs: [T, B, K, *S] of samples of the weights, such as with dropout left on.

    Returns:
        [B, *S] float32, nats: predictive minus expected entropy, at least 0.
    """
    return (predictive_entropy(probs) - expected_entropy(probs)).clamp_min(0)


def power_noise(score: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return log score + Gumbel(0, 1/beta): the ranking is then a draw in proportion to score^beta.

    Kirsch et al., "Stochastic Batch Acquisition", TMLR 2023, arXiv:2106.12059 (PowerBALD). Where the score is 0, -inf.

    Args:
        score: Any shape, at least 0.
        beta: How much the score decides: 0 < beta; large, and the noise is nothing.
        generator: Of the CPU.

    Raises:
        ShapeError: A score is negative or NaN, or beta is not above 0.
    """
    if beta <= 0 or not bool((score >= 0).all()):
        raise ShapeError("beta must be above 0, and scores at least 0")
    uniform = torch.rand(score.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    gumbel = -(-uniform.log()).log()
    return (score.double().cpu().log() + gumbel / beta).float().to(score.device)


def _checked(probs: Tensor) -> Tensor:
    if probs.ndim < 4 or not probs.is_floating_point():
        raise ShapeError(f"probabilities of samples [T, B, K, *S] are needed, not {tuple(probs.shape)}")
    return probs.float()

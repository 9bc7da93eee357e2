"""Source-free domain adaptation: entropy of predictions, and the shares of classes that are expected beforehand.

Bateson et al., "Source-Relaxed Domain Adaptation for Image Segmentation" (AdaEnt), MICCAI 2020, arXiv:2005.03697, and
"Source-Free Domain Adaptation for Image Segmentation" (AdaMI), Medical Image Analysis 2022, arXiv:2108.03152. All in
float32. Voxels that are not ``valid`` (padding, labelled ones) take no part; without a mask all do, as in the authors' code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from labeleff.batch import beside
from labeleff.functional.losses import through_softmax, voxel_blocks

EPS = 1e-10
Ratio = Literal["max_normalised", "mean_softmax"]
Direction = Literal["pred_prior", "prior_pred", "cross_entropy"]


def weighted_entropy(logits: Tensor, weights: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean over voxels of ``-Σ_k ν_k p_k log(p_k + 1e-10)``, nats.

    Args:
        logits: [B, K, *S].
        weights: [K], ν; None: ones. The mean is not divided by them.
        valid: [B, 1, *S] bool.

    Returns:
        Scalar; 0, with a gradient, where no voxel counts.
    """
    return entropy_and_ratio(logits, weights, None, entropy_valid=valid)[0]


def class_ratio(logits: Tensor, how: Ratio = "max_normalised", *, valid: Tensor | None = None) -> Tensor:
    """Return the predicted share of every class in every image.

    Args:
        logits: [B, K, *S].
        how: ``mean_softmax``: the mean probability, which is what the papers say. ``max_normalised``: the share of
            p / (max_k p + 1e-10), which is what the authors' code does; equal on one-hot predictions, larger for classes that
            do not win otherwise. The gradient goes through the maximum.
        valid: [B, 1, *S] bool.

    Returns:
        [B, K]; rows sum to 1, and are all 0 where no voxel counts.
    """
    return entropy_and_ratio(logits, None, how, ratio_valid=valid)[1]


def entropy_and_ratio(
    logits: Tensor,
    weights: Tensor | None,
    how: Ratio | None,
    *,
    entropy_valid: Tensor | None = None,
    ratio_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return :func:`weighted_entropy` and :func:`class_ratio` from one pass over the logits.

    Args:
        logits: [B, K, *S].
        weights: [K], ν of the entropy.
        how: What shares are made of; None: they are not wanted, and the second result is of zeros.
        entropy_valid: [B, 1, *S] bool, where the entropy is taken.
        ratio_valid: [B, 1, *S] bool, where shares are taken.
    """
    with torch.autocast(logits.device.type, enabled=False):  # sums over many voxels do not fit into 16 bits
        masks = [None if mask is None else mask.flatten(2) for mask in (entropy_valid, ratio_valid)]
        nu = None if weights is None else beside(weights.float(), logits).view(1, -1, 1)
        total, mass, sums = _Sums.apply(logits.float().flatten(2), nu, *masks, how)  # type: ignore[no-untyped-call]
        return -total / (mass + EPS), sums / (sums.sum(1, keepdim=True) + EPS)


class _Sums(torch.autograd.Function):
    """The sums over voxels that both terms are made of, and their gradient by hand.

    b batch, k class, n voxel, p softmax of logits [b, k, n]: it returns ``Σ_bkn ν_k m p log(p + ε)``, ``Σ_bn m`` and
    ``Σ_n m' a`` [b, k], a being p or p / (max p + ε). On the CPU it goes block by block, as the losses on labels do.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, nu: Tensor | None, inside: Tensor | None, counted: Tensor | None, how: Ratio | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs = torch.empty_like(logits)
        total, sums = logits.new_zeros(()), logits.new_zeros(logits.shape[:2])
        for block in voxel_blocks(logits):
            p = torch.softmax(logits[block], 1, out=probs[block])
            terms = (p + EPS).log_().mul_(p)
            if nu is not None:
                terms.mul_(nu)
            if inside is not None:
                terms.mul_(inside[block])
            total += terms.sum()
            if how is not None:
                a = p if how == "mean_softmax" else p / (p.amax(1, keepdim=True) + EPS)
                sums[block[0]] += (a if counted is None else a * counted[block]).sum(2)
        mass = logits.new_full((), logits.shape[0] * logits.shape[2]) if inside is None else inside.sum().to(logits)
        ctx.save_for_backward(probs, nu, inside, counted)
        ctx.how = how
        ctx.mark_non_differentiable(mass)
        return total, mass, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor, _: Tensor, to_sums: Tensor) -> tuple[Tensor, None, None, None, None]:
        probs, nu, inside, counted = ctx.saved_tensors
        grad = torch.empty_like(probs)
        for block in voxel_blocks(probs):
            p = probs[block]
            of_p = (p + EPS).log_().add_(p / (p + EPS)).mul_(to_total)
            if nu is not None:
                of_p.mul_(nu)
            if inside is not None:
                of_p.mul_(inside[block])
            if ctx.how is not None:
                of_p.add_(
                    _of_shares(p, to_sums[block[0]].unsqueeze(2), ctx.how, None if counted is None else counted[block])
                )
            of_p.mul_(p)
            through_softmax(of_p, p, out=grad[block])
        return grad, None, None, None, None


def _of_shares(p: Tensor, to_sums: Tensor, how: str, counted: Tensor | None) -> Tensor:
    """Return the gradient of ``Σ c a`` with respect to p [b, k, n], c [b, k, 1]."""
    if how == "mean_softmax":
        found = to_sums.expand_as(p)
        return found if counted is None else found * counted
    best, winner = p.max(1, keepdim=True)
    unit = best + EPS
    found = to_sums / unit
    lost = (to_sums * p).sum(1, keepdim=True) / (unit * unit)
    # not scatter_add: so that it repeats, a GPU would sort all voxels
    found = torch.where(torch.arange(p.shape[1], device=p.device).view(1, -1, 1) == winner, found - lost, found)
    return found if counted is None else found.mul_(counted)


def class_ratio_kl(ratio: Tensor, prior: Tensor, *, direction: Direction = "pred_prior", eps: float = EPS) -> Tensor:
    """Return the mean over images of the divergence of predicted from expected shares, nats.

    ``eps`` is more than a guard: a class that is expected nowhere costs -log eps per unit of predicted share, 23 at 1e-10.

    Args:
        ratio: [B, K], predicted.
        prior: [B, K], expected; rows of NaN (nothing is known) take no part.
        direction: ``pred_prior``: Σ r (log r - log τ), AdaMI; ``prior_pred``: Σ τ (log τ - log r); ``cross_entropy``:
            -Σ τ log r, as an earlier state of the authors' code has it.
        eps: Added within every logarithm.

    Returns:
        Scalar; 0, with a gradient, where nothing is known of any image.
    """
    known = ~prior.isnan().any(1)
    tau = torch.where(known[:, None], prior, 1.0).to(ratio)
    log_ratio, log_prior = (ratio + eps).log(), (tau + eps).log()
    if direction == "pred_prior":
        terms = ratio * (log_ratio - log_prior)
    elif direction == "prior_pred":
        terms = tau * (log_prior - log_ratio)
    else:
        terms = -tau * log_ratio
    return (terms.sum(1) * known).sum() / known.sum().clamp_min(1)

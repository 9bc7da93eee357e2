"""Losses that several methods share. All honour IGNORE and return 0 with a gradient where nothing is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from labeleff.batch import IGNORE

DiceForm = Literal["squared", "linear"]
SQUARED_EPS, LINEAR_EPS, REGION_EPS = 1e-10, 1e-5, 1e-16
CPU_BLOCK, SMALLEST_BLOCK = 1 << 16, 512
"""Numbers in one map of a block of :class:`_RegionSums`, and the fewest voxels of a block."""
FEW_KNOWN = 8
"""Where fewer than one voxel in so many is known, :func:`segmentation_loss` gathers them on a CPU."""


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Return [B, K, *S] float32; labels outside 0 … K-1 (IGNORE among them) are all zero."""
    classes = torch.arange(num_classes, device=label.device).view(1, -1, *([1] * (label.ndim - 1)))
    return (label.unsqueeze(1) == classes).float()


def region_losses(
    logits: Tensor, label: Tensor, regions: Tensor, *, dice: DiceForm = "squared"
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and Dice loss of each of R regions, every one normalised by itself.

    Cross-entropy is ``Σ ce · m / Σ m`` over batch and space. The Dice loss is averaged over all classes, background
    included. ``squared`` pools over the batch: ``1 - (2 Σ p y m + ε) / (Σ p² m + Σ y² m + ε)``, ε = 1e-10 (BCP's ACDC
    code). ``linear`` is per sample: ``1 - (2 Σ p y m + ε) / (Σ (p + y) m + ε)``, ε = 1e-5 (BCP's LA and pancreas code).
    An empty region costs 0.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64; where it is no class, every region must be 0.
        regions: [B, R, *S] weights m in [0, 1].
        dice: Form of the Dice loss.

    Returns:
        Two tensors [R], float32.
    """
    masks = regions.flatten(2).float()
    with torch.autocast(logits.device.type, enabled=False):  # sums over many voxels do not fit into 16 bits
        sums = _RegionSums.apply(  # type: ignore[no-untyped-call]
            logits.float().flatten(2), flat_labels(label, logits.shape[1]), masks, dice == "squared"
        )
    return losses_of_sums(sums, masks, dice=dice)


def losses_of_sums(sums: Sequence[Tensor], masks: Tensor, *, dice: DiceForm) -> tuple[Tensor, Tensor]:
    """Return what :func:`region_losses` does, of the four sums of :class:`_RegionSums` over the regions [B, R, n]."""
    likelihood, overlap, size, present = sums
    cross_entropy = -likelihood.sum((0, 1)) / (masks.sum((0, 2)) + REGION_EPS)
    if dice == "linear":
        ratio = (2 * overlap + LINEAR_EPS) / (size + present + LINEAR_EPS)
        return cross_entropy, 1 - ratio.mean((0, 1))
    ratio = (2 * overlap.sum(0) + SQUARED_EPS) / ((size + present).sum(0) + SQUARED_EPS)
    return cross_entropy, 1 - ratio.mean(0)


class _RegionSums(torch.autograd.Function):
    """The sums over voxels that the losses are made of, and their gradient by hand.

    b batch, k class, r region, n voxel; y one-hot label, m region, p softmax: of logits [b, k, n] it returns
    ``Σ_n m y log p``, ``Σ_n m y p``, ``Σ_n m p`` (squared: ``Σ_n m p²``) and ``Σ_n m y``, all [b, k, r]. On the CPU it goes
    block by block, so that what it writes in between stays in the cache (large 3-D patches: a third of the time) and
    rounding does not grow with the patch.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, label: Tensor, masks: Tensor, squared: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        probs = torch.empty_like(logits)
        likelihood, overlap, size, present = logits.new_zeros(4, *logits.shape[:2], masks.shape[1])
        for block in voxel_blocks(logits):
            log_p, y, m = F.log_softmax(logits[block], dim=1), one_hot_block(label, block, logits), masks[block]
            p = torch.exp(log_p, out=probs[block])
            add_region_sums(likelihood, overlap, size, log_p, p, y, m, squared=squared)
            present.baddbmm_(y, m.transpose(1, 2))
        ctx.save_for_backward(probs, label, masks)
        ctx.squared = squared
        ctx.mark_non_differentiable(present)
        return likelihood, overlap, size, present

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_likelihood: Tensor, to_overlap: Tensor, to_size: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None]:
        probs, label, masks = ctx.saved_tensors
        grad = torch.empty_like(probs)
        for block in voxel_blocks(probs):
            p, y, m = probs[block], one_hot_block(label, block, probs), masks[block]
            of_p = towards_probs(to_overlap, to_size, p, y, m, squared=ctx.squared)
            of_log_p = of_p.mul_(p).addcmul_(spread(to_likelihood, m), y)
            through_softmax(of_log_p, p, out=grad[block])
        return grad, None, None, None


def add_region_sums(
    likelihood: Tensor, overlap: Tensor, size: Tensor, log_p: Tensor, p: Tensor, y: Tensor, m: Tensor, *, squared: bool
) -> None:
    """Add a block's share, [b, k, n] and regions m [b, r, n], to the sums of :class:`_RegionSums`."""
    m = m.transpose(1, 2)
    likelihood.baddbmm_(log_p * y, m)
    overlap.baddbmm_(p * y, m)
    size.baddbmm_(p * p if squared else p, m)


def towards_probs(to_overlap: Tensor, to_size: Tensor, p: Tensor, y: Tensor, m: Tensor, *, squared: bool) -> Tensor:
    """Return the gradient of a block's probabilities [b, k, n], of those of the sums [b, k, r], as a new tensor."""
    of_p = spread(2 * to_size, m).mul_(p) if squared else spread(to_size, m)
    return of_p.addcmul_(spread(to_overlap, m), y)


def spread(to_sums: Tensor, m: Tensor) -> Tensor:
    """Return [b, k, n]: what sums over regions, [b, k, r], pass back to the voxels of m, [b, r, n]."""
    return to_sums * m if m.shape[1] == 1 else torch.bmm(to_sums, m)  # of one region alone there is nothing to add up


def through_softmax(of_log_p: Tensor, p: Tensor, *, out: Tensor) -> None:
    """Write the gradient of logits, of that of log-probabilities (p times that of p), all [B, K, *S]."""
    torch.addcmul(of_log_p, p, of_log_p.sum(1, keepdim=True), value=-1, out=out)


def flat_labels(label: Tensor, num_classes: int) -> Tensor:
    """Return labels [B, *S] as [B, 1, n], in one byte each where classes fit.

    Those that are no class may come out as one: their regions are 0.
    """
    return (label.to(torch.uint8) if num_classes <= 256 else label).flatten(1).unsqueeze(1)


def voxel_blocks(maps: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [b, k, n] along the voxels into pieces that fit into a core's cache; off the CPU: all at once."""
    count = maps.shape[2]
    size = (
        max(CPU_BLOCK // max(maps.shape[0] * maps.shape[1], 1), SMALLEST_BLOCK) if maps.device.type == "cpu" else count
    )
    for start in range(0, count, max(size, 1)):
        yield slice(None), slice(None), slice(start, start + size)


def one_hot_block(label: Tensor, block: tuple[slice, slice, slice], like: Tensor) -> Tensor:
    """Return [b, k, block] of the labels [b, 1, n], in the type and on the device of ``like``."""
    numbers = torch.arange(like.shape[1], device=label.device, dtype=label.dtype).view(1, -1, 1)
    cut = label[block]
    return torch.eq(cut, numbers, out=like.new_empty(len(cut), like.shape[1], cut.shape[2]))


def segmentation_loss(
    logits: Tensor, label: Tensor, *, dice: DiceForm = "squared", ignore_index: int = IGNORE
) -> Tensor:
    """Return (cross-entropy + Dice loss) / 2 over the voxels whose label is known; 0 where there are none.

    Regions that overlap, told by a label with an axis for them, are so many two-class problems, see :func:`overlapping_losses`.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64 with ``ignore_index`` where nobody has said; or [B, R, *S] of {0, 1, ``ignore_index``}, R = K.
        dice: Form of the Dice loss, see :func:`region_losses`.
        ignore_index: Label that is left out.
    """
    if label.ndim == logits.ndim:
        return torch.stack(overlapping_losses(logits, label, dice=dice, ignore_index=ignore_index)).sum() / 2
    known = label != ignore_index
    if dice == "squared" and logits.device.type == "cpu" and known.count_nonzero() * FEW_KNOWN < known.numel():
        # pooled over the batch, so what is known may be gathered: a few clicks should not cost what whole images do
        image, voxel = known.flatten(1).nonzero(as_tuple=True)
        logits, label = logits.flatten(2)[image, :, voxel].t().unsqueeze(0), label.flatten(1)[image, voxel].unsqueeze(0)
        known = known.new_ones(label.shape)
    cross_entropy, overlap = region_losses(logits, label, known.unsqueeze(1), dice=dice)
    return (cross_entropy + overlap).sum() / 2


def overlapping_losses(
    logits: Tensor, label: Tensor, *, dice: DiceForm = "squared", ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor]:
    """Return binary cross-entropy and Dice loss of regions that overlap; both 0 with a gradient where nothing is known.

    p is the sigmoid. Cross-entropy is the mean over regions and known voxels. The Dice loss is that of :func:`region_losses`
    for the inside of each region alone, averaged over regions (``linear``: and samples).

    Args:
        logits: [B, R, *S].
        label: [B, R, *S] of {0, 1, ``ignore_index``}.
        dice: Form of the Dice loss.
        ignore_index: Label that is left out.

    Returns:
        Two scalars, float32.
    """
    z, known = logits.float(), (label != ignore_index).float()
    y = (label == 1).float()
    cross_entropy = (F.binary_cross_entropy_with_logits(z, y, reduction="none") * known).sum()
    p = z.sigmoid() * known
    space = tuple(range(2, z.ndim))
    overlap = (p * y).sum(space)
    if dice == "linear":
        ratio = (2 * overlap + LINEAR_EPS) / ((p + y).sum(space) + LINEAR_EPS)
    else:
        ratio = (2 * overlap.sum(0) + SQUARED_EPS) / ((p * p + y * y).sum(space).sum(0) + SQUARED_EPS)
    return cross_entropy / (known.sum() + REGION_EPS), 1 - ratio.mean()


def probabilities(logits: Tensor, *, exclusive: bool = True) -> Tensor:
    """Return softmax over classes, or sigmoids of regions that overlap, float32."""
    return logits.float().softmax(1) if exclusive else logits.float().sigmoid()


def soft_losses(logits: Tensor, target: Tensor, *, dice: DiceForm = "squared") -> tuple[Tensor, Tensor]:
    """Return cross-entropy and Dice loss with shares q for labels; both 0 with a gradient where nothing is known.

    Cross-entropy is the mean of ``-Σ_k q_k log p_k`` over the known voxels; the Dice loss is that of :func:`region_losses`
    with q for y. ``squared`` is smallest at p = q; ``linear`` is not: it pulls p towards 0 and 1.

    Args:
        logits: [B, K, *S].
        target: [B, K, *S] shares that sum to 1 over the classes, or to 0 where nothing is known.
        dice: Form of the Dice loss.

    Returns:
        Two scalars, float32.
    """
    q = target.float()
    known = (q.sum(1, keepdim=True) > 0).float()
    log_p = F.log_softmax(logits.float(), dim=1)
    p = log_p.exp() * known
    space = tuple(range(2, q.ndim))
    cross_entropy = -(q * log_p).sum() / (known.sum() + REGION_EPS)
    overlap = (p * q).sum(space)
    if dice == "linear":
        ratio = (2 * overlap + LINEAR_EPS) / ((p + q).sum(space) + LINEAR_EPS)
    else:
        ratio = (2 * overlap.sum(0) + SQUARED_EPS) / ((p * p + q * q).sum(space).sum(0) + SQUARED_EPS)
    return cross_entropy, 1 - ratio.mean()


def soft_segmentation_loss(logits: Tensor, target: Tensor, *, dice: DiceForm = "squared") -> Tensor:
    """Return (cross-entropy + Dice loss) / 2 with shares for labels, such as several raters'; see :func:`soft_losses`.

    Where the shares are one-hot this is :func:`segmentation_loss`.

    Args:
        logits: [B, K, *S].
        target: [B, K, *S] shares that sum to 1 over the classes, or to 0 where nothing is known.
        dice: Form of the Dice loss.
    """
    cross_entropy, overlap = soft_losses(logits, target, dice=dice)
    return (cross_entropy + overlap) / 2


def probability_mse(logits: Tensor, target: Tensor, valid: Tensor, *, exclusive: bool = True) -> Tensor:
    """Return the mean squared difference of probabilities over classes and valid voxels.

    Args:
        logits: [B, K, *S] of the student.
        target: [B, K, *S] probabilities of the teacher, without gradient.
        valid: [B, 1, *S] bool.
        exclusive: Softmax over classes; otherwise sigmoid for each region.
    """
    squared = (probabilities(logits, exclusive=exclusive) - target.float()).square() * valid
    return squared.sum() / (valid.sum() * logits.shape[1]).clamp_min(1)

"""Cross pseudo supervision: two networks, each taught by the hard labels of the other.

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv:2106.01226.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labeleff.batch import IGNORE
from labeleff.functional.regions import hard_labels
from labeleff.functional.robust import voxel_cross_entropy


def crossed_losses(one: Tensor, two: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return CE(one, argmax two), CE(two, argmax one) and the share of voxels in which the two agree: float32 scalars.

    Means over the valid voxels of the batch; 0 with a gradient where there are none. A label carries no gradient, so that
    either loss moves one network alone. Of equal logits the lowest class is the label.

    Args:
        one: [B, K, *S] logits of the first network.
        two: [B, K, *S] logits of the second.
        valid: [B, 1, *S] bool, False in padding.
    """
    inside = valid.squeeze(1)
    first, second = (torch.where(inside, hard_labels(logits.detach()), IGNORE) for logits in (one, two))
    count = inside.sum().clamp_min(1)
    of_one = voxel_cross_entropy(one, second).sum() / count
    of_two = voxel_cross_entropy(two, first).sum() / count
    return of_one, of_two, ((first == second) & inside).sum() / count

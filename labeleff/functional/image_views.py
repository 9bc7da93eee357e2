"""Views of images for contrastive learning: a crop enlarged to the size of the image, other brightness and contrast.

Drawn per image on the CPU, made for the batch on its device. The operations and ranges are those of GLCL (Chaitanya et al., NeurIPS
2020); its authors' code draws the intensity once per batch, with brightness and contrast tied to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import beside, uniform
from labeleff.errors import ShapeError


def random_crop(image: Tensor, share: float, *, generators: Sequence[torch.Generator]) -> Tensor:
    """Return a window of every image enlarged to the size of the image, linearly: [B, C, *S].

    Its corner is uniform over all places in the image, along every axis by itself.

    Args:
        image: [B, C, *S], 2-D or 3-D.
        share: Side of the window as a share of every axis, in (0, 1].
        generators: Sources of randomness, one per image, on the CPU.

    Raises:
        ShapeError: The share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ShapeError(f"share is {share}; the side of the window must be a share of the axis in (0, 1]")
    axes = image.ndim - 2
    corner = uniform(generators, axes) * (1 - share)
    # from -1 … 1 of the view to the middle of its window and share of it on either side; x first
    affine = torch.cat(
        [share * torch.eye(axes).expand(len(image), -1, -1), (2 * corner + share - 1).flip(1)[..., None]], 2
    )
    grid = F.affine_grid(beside(affine.to(image.dtype), image), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_intensity(
    image: Tensor,
    brightness: float,
    contrast: float,
    *,
    clip: tuple[float, float] | None = None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Return every image with ``x + b`` for x, then ``m + f (x - m)``, m the mean of the channel: [B, C, *S].

    Args:
        image: [B, C, *S].
        brightness: b is uniform in ± this, in units of the image.
        contrast: f is uniform in 1 ± this.
        clip: Range that values are clipped to at the end; None: they are not.
        generators: Sources of randomness, one per image, on the CPU.
    """
    draws = beside((2 * uniform(generators, 2) - 1).to(image.dtype), image)
    shift, factor = draws.view(-1, 2, *[1] * (image.ndim - 1)).unbind(1)
    view = image + brightness * shift
    mean = view.mean(tuple(range(2, image.ndim)), keepdim=True)
    view = mean + (1 + contrast * factor) * (view - mean)
    return view if clip is None else view.clamp(*clip)

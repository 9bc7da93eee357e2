"""Prediction of whole cases of any size from a network that sees patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from labeleff.backbones.mc_dropout import prediction_modes
from labeleff.functional.regions import bits_of, hard_labels, largest_components


@contextmanager
def evaluating(network: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Put a network into eval mode without gradients, and every module back into its own mode afterwards.

    Args:
        network: Any network.
        dropout: Leave dropout on (Monte Carlo dropout); norm layers stay in eval mode.
    """
    with prediction_modes(network, dropout=dropout), torch.inference_mode():
        yield


def predict_volume(
    network: nn.Module,
    image: Tensor,
    *,
    ndim: int,
    patch: tuple[int, ...],
    overlap: float = 0.5,
    window_batch: int = 8,
    slice_axis: int | None = None,
    num_classes: int,
    exclusive: bool = True,
    dropout: bool = False,
) -> Tensor:
    """Return probabilities [K, *S] float32 on the CPU.

    Windows of the patch's size slide over the case; probabilities (not logits) are averaged with Gaussian weights, as
    the softmax scores of BCP's authors are, theirs with equal weights. Cases smaller than the patch are padded with 0.

    Args:
        network: [B, C, *patch] -> logits [B, K, *patch].
        image: [C, *S], on the network's device.
        ndim: Spatial axes of the network.
        patch: Window, voxels.
        overlap: Overlap of windows, share of the patch, in [0, 1).
        window_batch: Windows per forward pass; this and one case's scores bound the memory.
        slice_axis: Axis of a volume that a 2-D network sees slice by slice.
        num_classes: K.
        exclusive: Softmax over classes; otherwise sigmoid for each region.
        dropout: Leave dropout on; what is dropped comes from torch's global generator.
    """

    def probabilities(window: Tensor) -> Tensor:
        logits: Tensor = network(window).float()
        scores: Tensor = logits.softmax(1) if exclusive else logits.sigmoid()
        return scores

    with evaluating(network, dropout=dropout):
        if image.ndim - 1 == ndim:
            return _windows(probabilities, image[None], patch, overlap, window_batch)[0]
        if slice_axis is None:
            raise ValueError(f"a {ndim}-D network needs a slice_axis to see an image of shape {tuple(image.shape)}")
        slices = image.movedim(slice_axis + 1, 0)  # [n, C, *S without the axis]
        result = torch.empty(len(slices), num_classes, *slices.shape[2:])
        for start in range(0, len(slices), window_batch):
            part = slices[start : start + window_batch]
            result[start : start + window_batch] = _windows(probabilities, part, patch, overlap, window_batch)
        return result.movedim(0, slice_axis + 1)


def _windows(
    probabilities: Callable[[Tensor], Tensor], images: Tensor, patch: tuple[int, ...], overlap: float, window_batch: int
) -> Tensor:
    """Return the probabilities [B, K, *S] of [B, C, *S], on the CPU."""
    spatial = images.shape[2:]
    padding = [max(0, size - length) for size, length in zip(patch, spatial, strict=True)]
    before = [p // 2 for p in padding]
    if any(padding):
        images = F.pad(images, [n for p, b in zip(padding[::-1], before[::-1], strict=True) for n in (b, p - b)])
    if tuple(images.shape[2:]) == tuple(patch):  # one window: nothing to blend
        whole = torch.cat([probabilities(part).cpu() for part in torch.split(images, window_batch)])
    else:
        from monai.inferers.utils import sliding_window_inference

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="monai")
            whole = sliding_window_inference(
                images, patch, window_batch, probabilities, overlap=overlap, mode="gaussian", device="cpu"
            )
    inside = tuple(slice(b, b + n) for b, n in zip(before, spatial, strict=True))
    result: Tensor = whole[(slice(None), slice(None), *inside)]
    return result


def segment(probs: Tensor, *, largest_component: bool = False, exclusive: bool = True) -> NDArray[np.uint8]:
    """Return the label map [*S] of [K, *S]: the most probable class, the lowest of equals.

    Of regions that overlap: a map in which bit r is set where region r is as probable as not, or more.

    Args:
        probs: Probabilities.
        largest_component: Keep only the largest component of each class.
        exclusive: Classes exclude one another.
    """
    if not exclusive:
        regions = (probs >= 0.5).cpu()
        if largest_component:  # each region is a map of its own
            regions = largest_components(regions.to(torch.uint8), 2) > 0
        return bits_of(regions[None])[0].numpy()
    label = hard_labels(probs[None])
    if largest_component:
        label = largest_components(label, len(probs))
    return label[0].cpu().numpy().astype(np.uint8)

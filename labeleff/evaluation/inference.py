"""Prediction of whole cases of any size from a network that sees patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from labeleff.backbones.mc_dropout import prediction_modes
from labeleff.functional.losses import probabilities
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


def centred(image: Tensor, size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return an image [..., *S] padded with 0 to a size at least, and the voxels that come before it along each axis."""
    missing = [max(0, n - length) for n, length in zip(size, image.shape[-len(size) :], strict=True)]
    before = [n // 2 for n in missing]
    if any(missing):
        image = F.pad(image, [n for m, b in zip(missing[::-1], before[::-1], strict=True) for n in (b, m - b)])
    return image, before


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
    scores = _scores(network, exclusive=exclusive)
    with evaluating(network, dropout=dropout):
        if image.ndim - 1 == ndim:
            return _windows(scores, image[None], patch, overlap, window_batch)[0]
        if slice_axis is None:
            raise ValueError(f"a {ndim}-D network needs a slice_axis to see an image of shape {tuple(image.shape)}")
        slices = image.movedim(slice_axis + 1, 0)  # [n, C, *S without the axis]
        result = torch.empty(len(slices), num_classes, *slices.shape[2:])
        for start in range(0, len(slices), window_batch):
            part = slices[start : start + window_batch]
            result[start : start + window_batch] = _windows(scores, part, patch, overlap, window_batch)
        return result.movedim(0, slice_axis + 1)


def _scores(network: nn.Module, *, exclusive: bool) -> Callable[[Tensor], Tensor]:
    """Return what gives the probabilities of a window."""

    def scores(window: Tensor) -> Tensor:
        return probabilities(network(window), exclusive=exclusive)

    return scores


def predict_slabs(
    network: nn.Module,
    image: Tensor,
    *,
    ndim: int,
    patch: tuple[int, ...],
    overlap: float = 0.5,
    window_batch: int = 8,
    slice_axis: int | None = None,
    exclusive: bool = True,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the probabilities that :func:`predict_volume` returns, to the bit, in slabs one after the other.

    A slab [K, *S] on the CPU is a part along the first axis (of a 2-D network: along ``slice_axis``), and comes with its
    place there. No more than one window's length of scores is held, so that memory does not grow with the case. To be
    called within :func:`evaluating`.

    Args:
        network: [B, C, *patch] -> logits [B, K, *patch], on the device.
        image: [C, *S] on the CPU; windows are moved to the device one batch at a time.
        ndim: Spatial axes of the network.
        patch: Window, voxels.
        overlap: Overlap of windows, share of the patch, in [0, 1).
        window_batch: Windows per forward pass.
        slice_axis: Axis of a volume that a 2-D network sees slice by slice.
        exclusive: Softmax over classes; otherwise sigmoid for each region.
        device: Where the network lives.
    """
    probabilities = _scores(network, exclusive=exclusive)
    if image.ndim - 1 == ndim:
        yield from _slabs(probabilities, image, patch, overlap, window_batch, device)
        return
    if slice_axis is None:
        raise ValueError(f"a {ndim}-D network needs a slice_axis to see an image of shape {tuple(image.shape)}")
    slices = image.movedim(slice_axis + 1, 0)
    for start in range(0, len(slices), window_batch):
        part = slices[start : start + window_batch].to(device)
        scores = _windows(probabilities, part, patch, overlap, window_batch)
        yield slice(start, start + len(part)), scores.movedim(0, slice_axis + 1)


def count_windows(shape: tuple[int, ...], patch: tuple[int, ...], overlap: float, slice_axis: int | None = None) -> int:
    """Return how many windows cover an image of a size, slices of a volume included."""
    seen = [n for axis, n in enumerate(shape) if axis != slice_axis]
    per_slice = len(_window_starts(tuple(map(max, seen, patch)), patch, overlap))
    return per_slice * (shape[slice_axis] if slice_axis is not None else 1)


def _window_starts(shape: tuple[int, ...], patch: tuple[int, ...], overlap: float) -> list[tuple[slice, ...]]:
    """Return the windows of MONAI's sliding window, the first axis slowest."""
    from monai.data.utils import dense_patch_slices

    steps = [max(1, int(n * (1 - overlap))) if n < length else n for n, length in zip(patch, shape, strict=True)]
    windows: list[tuple[slice, ...]] = dense_patch_slices(shape, patch, steps)
    return windows


def _slabs(
    probabilities: Callable[[Tensor], Tensor],
    image: Tensor,
    patch: tuple[int, ...],
    overlap: float,
    window_batch: int,
    device: str | torch.device,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield what :func:`_windows` returns of one image [C, *S], finished part by finished part along the first axis.

    Sums are taken in the order in which MONAI takes them, and divided once nothing more is added.
    """
    from monai.data.utils import compute_importance_map

    spatial = image.shape[1:]
    image, before = centred(image, patch)
    inside = tuple(slice(b, b + n) for b, n in zip(before, spatial, strict=True))
    shape = tuple(image.shape[1:])
    if shape == tuple(patch):
        yield slice(0, spatial[0]), probabilities(image[None].to(device))[0].cpu()[(slice(None), *inside)]
        return
    weight = compute_importance_map(patch, mode="gaussian", device=device)  # there, as MONAI does: rounding differs
    added = weight.cpu()
    windows = _window_starts(shape, patch, overlap)
    sums: Tensor | None = None
    counts = torch.zeros(0)
    done = 0  # everything before is finished; the buffers begin here
    for first in range(0, len(windows), window_batch):
        group = windows[first : first + window_batch]
        scores = probabilities(torch.cat([image[(slice(None), *window)][None] for window in group]).to(device))
        scores = (scores * weight).cpu()
        if sums is None:
            sums, counts = scores.new_zeros(scores.shape[1], 0, *shape[1:]), scores.new_zeros(1, 0, *shape[1:])
        missing = group[-1][0].stop - done - sums.shape[1]
        if missing > 0:
            sums, counts = (F.pad(t, (*(0, 0) * (len(shape) - 1), 0, missing)) for t in (sums, counts))
        for window, score in zip(group, scores, strict=True):
            place = (slice(None), slice(window[0].start - done, window[0].stop - done), *window[1:])
            sums[place] += score
            counts[place] += added
        later = windows[first + len(group)][0].start if first + len(group) < len(windows) else shape[0]
        if later > done:
            whole = sums[:, : later - done] / counts[:, : later - done]
            low, high = max(done, inside[0].start), min(later, inside[0].stop)
            if high > low:
                part = whole[(slice(None), slice(low - done, high - done), *inside[1:])]
                yield slice(low - before[0], high - before[0]), part
            sums, counts = sums[:, later - done :].clone(), counts[:, later - done :].clone()
            done = later


def _windows(
    probabilities: Callable[[Tensor], Tensor], images: Tensor, patch: tuple[int, ...], overlap: float, window_batch: int
) -> Tensor:
    """Return the probabilities [B, K, *S] of [B, C, *S], on the CPU."""
    spatial = images.shape[2:]
    images, before = centred(images, patch)
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

"""Connected regions of label maps, and regions that overlap."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Literal

import cc3d
import numpy as np
import torch
from torch import Tensor

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError

MOST_REGIONS = 7
"""Regions that fit into one byte beside IGNORE."""
MOST_ON_DEVICE = 2**25
"""Voxels of a batch whose components are found on a GPU, in about 100 bytes each."""
NEIGHBOURS: dict[int, tuple[Literal[4, 6, 8, 18, 26], ...]] = {1: (4,), 2: (4, 8), 3: (6, 18, 26)}
"""Neighbours of a voxel, by number of axes and by connectivity."""


def hard_labels(logits: Tensor) -> Tensor:
    """Return the class with the largest value, the lowest of equals: [B, *S] int64 of [B, K, *S].

    The same as ``argmax(1)``, but class by class, which on the CPU is many times as fast.
    """
    best = logits[:, 0]
    label = torch.zeros_like(best, dtype=torch.uint8 if logits.shape[1] <= 256 else torch.int64)
    for index in range(1, logits.shape[1]):
        value = logits[:, index]
        label = torch.maximum(label, (value > best).to(label.dtype) * index)
        best = torch.maximum(best, value)
    return label.long()


def regions_of(bits: Tensor, count: int) -> Tensor:
    """Return overlapping regions [B, R, *S] of {0, 1, IGNORE}, int64, of maps in which bit r is set where region r is.

    Args:
        bits: [B, *S] integers below 2^R; IGNORE where nobody has said anything about any region.
        count: R, at most 7.
    """
    shifts = torch.arange(count, device=bits.device).view(1, -1, *([1] * (bits.ndim - 1)))
    maps = bits.long().unsqueeze(1)
    return torch.where(maps == IGNORE, IGNORE, (maps >> shifts) & 1)


def bits_of(regions: Tensor) -> Tensor:
    """Return one map [B, *S] uint8 in which bit r is set where region r is, of [B, R, *S] booleans.

    Raises:
        ShapeError: There are more than seven regions.
    """
    if regions.shape[1] > MOST_REGIONS:
        raise ShapeError(f"{regions.shape[1]} overlapping regions; at most {MOST_REGIONS} fit into one map")
    values = torch.tensor([1 << r for r in range(regions.shape[1])], dtype=torch.uint8, device=regions.device)
    return (regions.to(torch.uint8) * values.view(1, -1, *([1] * (regions.ndim - 2)))).sum(1, dtype=torch.uint8)


def largest_components(
    label: Tensor,
    num_classes: int,
    *,
    connectivity: Literal["full"] | int = "full",
    classes: Collection[int] | None = None,
) -> Tensor:
    """Return label maps in which each foreground class keeps only its largest connected component.

    Removed voxels become background. Of components of equal size the one met first in raster order stays. Voxels with a
    label outside 0 … K-1 (IGNORE) are kept. On a GPU a batch of up to 2^25 voxels does not leave it. Not differentiable.

    Args:
        label: [B, *S] integer.
        num_classes: K, background (0) included.
        connectivity: As in ``skimage.measure.label``: 1 (faces) … number of axes (corners too), or ``full``.
        classes: Foreground classes to clean; None: all.

    Raises:
        ShapeError: None or more than three spatial axes, a floating label, or a connectivity the number of axes does not have.
    """
    axes = label.ndim - 1
    if axes not in NEIGHBOURS or label.is_floating_point():
        raise ShapeError(
            f"label must be an integer map [B, *S] of one to three axes, not {label.dtype} {tuple(label.shape)}"
        )
    reach = axes if connectivity == "full" else int(connectivity)
    if not 1 <= reach <= axes:
        raise ShapeError(f"connectivity is {connectivity}; with {axes} axes it is 1 … {axes} or 'full'")
    if label.device.type != "cpu" and label.numel() <= MOST_ON_DEVICE:
        return _largest_by_propagation(label, num_classes, reach, classes)
    neighbours = NEIGHBOURS[axes][reach - 1]
    maps = label.detach().cpu().numpy()
    wanted = (maps > 0) & (maps < num_classes)
    if classes is not None:
        wanted &= np.isin(maps, list(classes))
    sources = maps.astype(np.min_scalar_type(num_classes)) * wanted
    cleaned = np.empty_like(maps)
    for source, result in zip(sources, cleaned, strict=True):
        grid = np.atleast_2d(source)  # cc3d knows no lines
        components, count = cc3d.connected_components(grid, connectivity=neighbours, return_N=True)
        components = components.ravel()
        owner, kept = np.zeros((2, count + 1), maps.dtype)
        owner[components] = source.ravel()
        sizes = np.bincount(components, minlength=count + 1)
        for index in range(1, num_classes):
            largest = np.where(owner == index, sizes, 0).argmax()  # 0, the background, where there is none
            kept[largest] = owner[largest]
        np.take(kept, components, out=result.reshape(-1))
    if classes is not None or maps.max(initial=0) >= num_classes:
        np.copyto(cleaned, maps, where=~wanted)
    return torch.from_numpy(cleaned).to(label.device)


def _largest_by_propagation(label: Tensor, num_classes: int, reach: int, classes: Collection[int] | None) -> Tensor:
    """Return what ``largest_components`` returns, in operations on whole maps: what suits a GPU."""
    wanted = (label > 0) & (label < num_classes)
    if classes is not None:
        wanted &= torch.isin(label, torch.tensor(list(classes), device=label.device, dtype=label.dtype))
    first = _first_of_component(torch.where(wanted, label, 0), reach)
    flat, inside = label.flatten().long(), wanted.flatten()
    places = torch.arange(first.numel(), device=label.device)
    heads = places[inside & (first == places)]  # in raster order
    # the most voxels, and of as many those that come first
    score = torch.bincount(first[inside], minlength=first.numel())[heads] * first.numel() - heads
    group = heads // (first.numel() // len(label)) * num_classes + flat[heads]
    best = torch.full((len(label) * num_classes,), -1, device=label.device, dtype=score.dtype)
    best = best.scatter_reduce(0, group, score, "amax")
    kept = torch.zeros_like(inside)
    kept[heads] = score == best[group]
    return torch.where(wanted & ~kept[first].view_as(wanted), 0, label)


def _with_a_neighbour(label: Tensor, step: Sequence[int]) -> tuple[slice, ...]:
    """Return where voxels of maps [B, *S] lie from which a step does not lead outside."""
    inside = (slice(max(0, -s), n - max(0, s)) for s, n in zip(step, label.shape[1:], strict=True))
    return slice(None), *inside


def _first_of_component(label: Tensor, reach: int) -> Tensor:
    """Return for each voxel where the first one of its component is, in raster order: [B * voxels]. Zeros have none.

    Neighbours of one class tell each other the first place they know, and ask it in turn what it knows, until all agree.
    """
    places = torch.arange(label.numel(), device=label.device)
    grid, pairs = places.view_as(label), []
    for step in itertools.product((-1, 0, 1), repeat=label.ndim - 1):
        if step <= (0,) * len(step) or sum(map(abs, step)) > reach:
            continue  # each pair once
        one, other = _with_a_neighbour(label, step), _with_a_neighbour(label, [-s for s in step])
        together = (label[one] == label[other]) & (label[one] > 0)
        pairs.append(torch.stack([grid[one][together], grid[other][together]]))
    ends, first = torch.cat(pairs, 1), places
    while True:
        known = first[ends]
        lower, higher = known.amin(0), known.amax(0)
        if torch.equal(lower, higher):
            return first
        first = first.scatter_reduce(0, higher, lower, "amin")
        first = first[first]
        first = first[first]

"""GLCL: images are told apart by the part of the body they show, then regions of a feature map by where they lie.

Chaitanya, Erdil, Karani and Konukoglu, "Contrastive learning of global and local features for medical image segmentation with
limited annotations", NeurIPS 2020, arXiv:2006.10511. This follows the authors' code as it runs, in 2-D; regions in 3-D are ours.

With ``E(a, b) = exp(cos(a, b) / τ)`` every term is ``-log(E(a, b) / (E(a, b) + Σ_n E(a, n)))``: one positive b and the negatives
n of the anchor a; its other positives are in neither. It is computed as softplus(logsumexp of negatives - positive), so that no
temperature overflows. Gradients flow through anchors, positives and negatives alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import beside
from labeleff.errors import ShapeError

GlobalScheme = Literal["gr", "gd-", "gd"]
LocalScheme = Literal["lr", "ld"]
EPS = 1e-12
"""Smallest squared length of a vector that has a direction."""
NEGATIVES, NEGATIVES_LD = 5, 4
"""Nearby corners that a region is told from; of ``ld`` the first four, as the authors do to spare memory."""
SMALLEST = {3: 8, 1: 5}
"""Shortest axis of a map, by side of the regions, on which the five corners of an axis differ."""

# -- between images -------------------------------------------------------------------------------------------------------


def global_loss(
    z: Tensor,
    *,
    scheme: GlobalScheme = "gr",
    image: Tensor,
    partition: Tensor,
    volume: Tensor,
    version: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """Return the global contrastive loss of the rows of a batch, in any order.

    * ``gr``: two views of every image are positives, views of other images negatives: SimCLR. Reads ``image``.
    * ``gd-``: the versions of an image are positives, of which it has two or more (authors: the image itself and two views);
      all rows of other partitions are negatives, those of the same volume among them. Reads ``image, partition, version``.
    * ``gd``: every volume has, for every partition, an image (version 0) and one view of it (version 1). These two are
      positives, and so are images of the same partition in one volume and the next, in cyclic order, and their views
      likewise. Negatives as in ``gd-``. Reads ``partition, volume, version``.

    The sum over positive pairs, both ways, is divided by the number of rows N. In ``gd`` the authors visit the pair of an image
    and its view twice, and with two volumes the others too; so does this.

    Where all cosines are equal, ``gr`` of n images is ln(2n - 1), ``gd-`` with three versions of 12 images in 4 partitions
    2 ln 28, ``gd`` with S = 4 partitions and V volumes 4 ln(1 + 6 V).

    Args:
        z: [N, D] embeddings. One of length 1e-6 or less has no direction: it takes part, and gets no gradient.
        scheme: Who is like whom.
        image: [N] int64: number of the image. Ids may lie on the CPU, which then need not wait for the device.
        partition: [N] int64: which part of its volume an image comes from.
        volume: [N] int64: number of the volume, ascending in the cyclic order of ``gd``.
        version: [N] int64: 0 for the image itself, 1 and more for its views.
        temperature: τ.

    Raises:
        ShapeError: The ids do not describe such a batch, or leave nothing to contrast with.
    """
    if z.ndim != 2:
        raise ShapeError(f"z must be [N, D], not {tuple(z.shape)}")
    _check_temperature(temperature)
    ids = {"image": image, "partition": partition, "volume": volume, "version": version}
    pairs = _pairs(scheme, len(z), ids)
    with torch.autocast(z.device.type, enabled=False):
        unit = _directions(z.float())
        cosine = unit @ unit.t() / temperature
        group, anchor, positive, weight = (beside(t, z) for t in pairs)
        negative = cosine.masked_fill(group[:, None] == group, -math.inf).logsumexp(1)
        return (weight * F.softplus(negative[anchor] - cosine[anchor, positive])).sum() / len(z)


class _Pairs(NamedTuple):
    """Who is contrasted with whom: rows of the same group are no negatives of one another."""

    group: Tensor  # [N]
    anchor: Tensor  # [P]
    positive: Tensor  # [P]
    weight: Tensor  # [P] float32


def _pairs(scheme: GlobalScheme, rows: int, ids: dict[str, Tensor]) -> _Pairs:
    read = {"gr": ("image",), "gd-": ("image", "partition", "version"), "gd": ("partition", "volume", "version")}
    if scheme not in read:
        raise ShapeError(f"scheme is {scheme!r}; there are gr, gd- and gd")
    own = {}
    for name in read[scheme]:
        if ids[name].shape != (rows,) or ids[name].is_floating_point():
            raise ShapeError(
                f"{name} must be one whole number for each of {rows} rows, not {ids[name].dtype} {tuple(ids[name].shape)}"
            )
        own[name] = ids[name].detach().cpu()
    pairs = _cyclic_pairs(**own) if scheme == "gd" else _image_pairs(scheme, **own)
    if bool((pairs.group == pairs.group[:1]).all()):
        what = "image" if scheme == "gr" else "partition"
        raise ShapeError(f"{scheme}: all {rows} rows are of one {what}, so that there is no negative; give two or more")
    return pairs


def _image_pairs(scheme: str, image: Tensor, partition: Tensor | None = None, version: Tensor | None = None) -> _Pairs:
    """Return the pairs of rows of the same image, both ways."""
    same = image[:, None] == image
    views = same.sum(1)
    bad = (views != 2) if scheme == "gr" else (views < 2)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        wanted = "exactly 2" if scheme == "gr" else "2 or more"
        raise ShapeError(f"{scheme}: image {int(image[first])} has {int(views[first])} rows; {wanted} are needed")
    if partition is not None and version is not None:
        if bool((same & (version[:, None] == version)).sum() > len(image)):
            raise ShapeError(f"{scheme}: two rows of one image have the same version; number them from 0")
        if bool((same & (partition[:, None] != partition)).any()):
            raise ShapeError(f"{scheme}: rows of one image lie in different partitions; an image comes from one")
    anchor, positive = (same & ~torch.eye(len(image), dtype=torch.bool)).nonzero(as_tuple=True)
    return _Pairs(image if partition is None else partition, anchor, positive, torch.ones(len(anchor)))


def _cyclic_pairs(partition: Tensor, volume: Tensor, version: Tensor) -> _Pairs:
    """Return the pairs of ``gd``: an image and its view (twice), and each with that of the next volume."""
    parts, part = torch.unique(partition, return_inverse=True)
    volumes, number = torch.unique(volume, return_inverse=True)
    if len(volumes) < 2:
        raise ShapeError("gd: all rows are of one volume; images are likened to those of another, so give two or more")
    if bool(((version != 0) & (version != 1)).any()):
        raise ShapeError("gd: version must be 0 (the image itself) or 1 (its view)")
    place = (part * 2 + version) * len(volumes) + number
    counts = torch.bincount(place, minlength=2 * len(parts) * len(volumes))
    if bool((counts != 1).any()):
        bad = int((counts != 1).nonzero()[0])
        where = f"volume {int(volumes[bad % len(volumes)])}, partition {int(parts[bad // len(volumes) // 2])}"
        raise ShapeError(
            f"gd: {int(counts[bad])} rows are of {where}, version {bad // len(volumes) % 2}; there must be one of each"
        )
    own, view = place.argsort().view(len(parts), 2, len(volumes)).unbind(1)  # each [S, V]
    one, two = torch.stack([own, own, view]), torch.stack([view, own.roll(-1, 1), view.roll(-1, 1)])
    weight = torch.tensor([2.0, 1.0, 1.0])[:, None, None].expand(one.shape)
    anchor, positive, weight = (torch.cat(ways).flatten() for ways in ([one, two], [two, one], [weight, weight]))
    return _Pairs(partition, anchor, positive, weight)


# -- between regions ------------------------------------------------------------------------------------------------------

# Quarters of the way along rows and columns: a region, and the corners nearby that it is told from. The authors' tables, by
# (side of the regions, their number), as they are: some entries may be slips.
_TABLES: dict[tuple[int, int], str] = {
    (3, 13): """
        00: 02 11 12 20 21   02: 00 04 11 13 22   04: 02 12 13 23 24   20: 00 11 22 40 31   22: 11 13 31 33 20
        24: 04 22 44 13 33   40: 20 21 42 31 32   42: 22 40 44 31 33   44: 23 24 42 33 32   11: 00 02 20 22 13
        13: 02 04 11 22 24   31: 20 22 40 42 33   33: 22 24 42 44 31""",
    (3, 9): """
        00: 02 20 22 04 40   02: 00 04 20 22 24   04: 00 02 22 24 44   20: 00 02 22 40 42   22: 00 02 20 24 42
        24: 02 04 22 42 44   40: 00 20 22 42 44   42: 20 22 24 40 44   44: 04 22 24 40 42""",
    (1, 13): """
        00: 02 20 22 11 13   02: 00 04 22 11 13   04: 02 22 24 31 13   20: 00 22 40 11 31   22: 11 13 31 33 20
        24: 04 22 44 13 33   40: 20 22 42 31 11   42: 22 40 44 31 33   44: 22 24 42 33 31   11: 00 02 20 22 13
        13: 02 04 22 24 33   31: 20 22 40 02 11   33: 22 24 42 44 13""",
}
_TABLES[1, 9] = _TABLES[3, 9]
COUNTS = {2: (13, 9), 3: (35, 27)}
"""Numbers of regions, by axes: the lattice with and without the points between."""


class RegionTable(NamedTuple):
    """Where regions lie and what they are told from.

    Corners are in quarters of the way that the first voxel of a region can go along each axis.
    """

    corners: tuple[tuple[int, ...], ...]
    """All that are needed: P of them. Some of the authors' negatives are no regions themselves."""
    regions: tuple[int, ...]
    """[A] numbers of corners."""
    near: tuple[tuple[int, ...], ...]
    """[A, 5] numbers of corners: the negatives of every region."""


@lru_cache
def region_table(ndim: int, regions: int, size: int) -> RegionTable:
    """Return the regions of a map and their negatives.

    In 2-D these are the authors' tables. In 3-D, which is ours, regions lie at {0, 2, 4}³ and, of 35, at {1, 3}³ too; the
    negatives of each are the five other regions nearest to it, the first in the order of axes where distances are equal.

    Args:
        ndim: Axes of the map, 2 or 3.
        regions: A: 13 or 9 in 2-D, 35 or 27 in 3-D.
        size: Side of a region, voxels: 3 or 1.

    Raises:
        ShapeError: There is no such table.
    """
    if ndim not in COUNTS or size not in SMALLEST:
        raise ShapeError(f"regions are of side 3 or 1 on maps of 2 or 3 axes, not {size} on {ndim}")
    if regions not in COUNTS[ndim]:
        raise ShapeError(
            f"regions is {regions}; on maps of {ndim} axes there are {COUNTS[ndim][0]} or {COUNTS[ndim][1]}"
        )
    if ndim == 2:
        words = [(int(word[0]), int(word[1])) for word in _TABLES[size, regions].split()]
        lattice: list[tuple[int, ...]] = [*words[:: NEGATIVES + 1]]
        near: list[list[tuple[int, ...]]] = [
            [*words[start : start + NEGATIVES]] for start in range(1, len(words), NEGATIVES + 1)
        ]
    else:
        lattice = list(itertools.product((0, 2, 4), repeat=3))
        lattice += itertools.product((1, 3), repeat=3) if regions == COUNTS[3][0] else []
        near = [[v for _, v in sorted((math.dist(u, v), v) for v in lattice if v != u)[:NEGATIVES]] for u in lattice]
    corners = list(dict.fromkeys([*lattice, *itertools.chain.from_iterable(near)]))
    number = {corner: index for index, corner in enumerate(corners)}
    return RegionTable(
        tuple(corners), tuple(number[u] for u in lattice), tuple(tuple(number[v] for v in row) for row in near)
    )


def local_loss(
    f: Tensor,
    f_other: Tensor,
    *,
    scheme: LocalScheme = "lr",
    regions: int = 13,
    size: int = 3,
    temperature: float = 0.1,
    partitions: int = 4,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the local contrastive loss of feature maps of N images in two views that differ in intensity only.

    A region is like the same region of another map. It is told from nearby ones in both maps, never from other images.

    * ``lr``: the other map is that of the other view; both ways; five nearby regions in each map, ten negatives. The mean over
      regions and maps: ln 11 where all cosines are equal.
    * ``ld``: the other maps are that of the other view, and those of the same partition in every other volume, in the first
      view; one way, from the first view; the first four nearby regions. Divided by regions and by 2 N: with the authors' three
      volumes 3/2 ln 9 where all cosines are equal. Other numbers of volumes are ours.

    Regions lie at ``floor(q m / 4)``, q = 0 … 4, along an axis of n voxels with m = n - 4 (``size=3``; the authors never read the
    last voxel) or n - 1 (``size=1``).

    Args:
        f: [N, C, *S], the first view.
        f_other: [N, C, *S], the other view of the same images.
        scheme: Who is like whom.
        regions: A: 13 or 9 on maps of 2 axes, 35 or 27 on maps of 3, see :func:`region_table`.
        size: Side of a region, voxels: 3 or 1.
        temperature: τ.
        partitions: Of ``ld``, images per volume: rows are volume-major, partition-minor.
        project: Maps regions [2 N, P, size^d · C], each flattened as (…space, channel), to [2 N, P, D] before they are
            compared; None: they are compared as they are.

    Raises:
        ShapeError: The maps differ in shape or are too small, there is no such table, or the rows of ``ld`` are not N / S ≥ 2
            volumes of S partitions.
    """
    if f.shape != f_other.shape or f.ndim not in (4, 5):
        raise ShapeError(
            f"two maps [N, C, *S] of one shape are needed, not {tuple(f.shape)} and {tuple(f_other.shape)}"
        )
    _check_temperature(temperature)
    table = region_table(f.ndim - 2, regions, size)
    if min(f.shape[2:]) < SMALLEST[size]:
        raise ShapeError(
            f"maps are {list(f.shape[2:])}; regions of side {size} need {SMALLEST[size]} voxels along every axis: take a finer "
            "level or a larger patch"
        )
    cells = windows(torch.cat([f, f_other]), table, size)
    cells = cells if project is None else project(cells)
    chosen, near = (beside(torch.tensor(index), f) for index in (table.regions, table.near))
    with torch.autocast(f.device.type, enabled=False):
        one, other = _directions(cells.float()).chunk(2)
        if scheme == "lr":
            terms = _told_apart(one, other, chosen, near, temperature)
            terms = terms + _told_apart(other, one, chosen, near, temperature)
        elif scheme == "ld":
            near = near[:, :NEGATIVES_LD]
            terms = _told_apart(one, other, chosen, near, temperature)
            for volume in range(1, _volumes(len(f), partitions)):
                moved = one.roll(-volume * partitions, 0)
                terms = terms + _told_apart(one, moved, chosen, near, temperature)
        else:
            raise ShapeError(f"scheme is {scheme!r}; there are lr and ld")
        return terms.mean() / 2


def windows(f: Tensor, table: RegionTable, size: int) -> Tensor:
    """Return what lies in windows at the corners of a table: [N, P, size^d · C], each flattened as (…space, channel).

    Args:
        f: [N, C, *S].
        table: Its corners are used.
        size: Side of a window, voxels.
    """
    index = beside(_places(table, size, tuple(f.shape[2:])), f)
    cells = f.flatten(2).index_select(2, index.flatten()).view(*f.shape[:2], *index.shape)
    return cells.permute(0, 2, 3, 1).flatten(2)


@lru_cache(maxsize=16)
def _places(table: RegionTable, size: int, shape: tuple[int, ...]) -> Tensor:
    """Return where the voxels of every window lie in a flattened map: [P, size^d]."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    reach = [n - 4 if size == 3 else n - 1 for n in shape]
    box = itertools.product(range(size), repeat=len(shape))
    inside = torch.tensor([sum(o * s for o, s in zip(offset, strides, strict=True)) for offset in box])
    first = [sum(q * m // 4 * s for q, m, s in zip(corner, reach, strides, strict=True)) for corner in table.corners]
    return torch.tensor(first)[:, None] + inside


def _volumes(rows: int, partitions: int) -> int:
    """Return how many volumes the rows of ``ld`` are of."""
    if partitions < 1 or rows % partitions or rows < 2 * partitions:
        raise ShapeError(f"ld: {rows} images are not two or more volumes of {partitions} partitions each")
    return rows // partitions


def _told_apart(one: Tensor, other: Tensor, chosen: Tensor, near: Tensor, temperature: float) -> Tensor:
    """Return the term of every region of every map [N, A]: anchors and half of the negatives in ``one`` [N, P, D]."""
    anchors = one.index_select(1, chosen)
    within, across = (anchors @ cells.transpose(1, 2) / temperature for cells in (one, other))
    index = near.expand(len(one), -1, -1)
    negatives = torch.cat([within.gather(2, index), across.gather(2, index)], 2)
    positive = across.gather(2, chosen.view(1, -1, 1).expand(len(one), -1, 1)).squeeze(2)
    return F.softplus(negatives.logsumexp(2) - positive)


# -- both -----------------------------------------------------------------------------------------------------------------


def _directions(z: Tensor) -> Tensor:
    """Return vectors [..., D] of length one; those shorter than 1e-6 are not stretched to it, and get no gradient."""
    square = z.square().sum(-1, keepdim=True)
    unit = z * square.clamp_min(EPS).rsqrt()
    return torch.where(square > EPS, unit, unit.detach())


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ShapeError(f"temperature is {temperature}; it must be above 0")

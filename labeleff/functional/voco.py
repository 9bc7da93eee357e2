"""Volume contrast (VoCo): a crop is told by which cells of a grid over its volume it overlaps, and by how much.

Wu, Zhuang and Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image Analysis", CVPR
2024, arXiv:2402.17300, and "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors", arXiv:2410.09890. Three
generations of it differ in the loss, and are told apart by what their code computes, not by the papers' text:

    s_mk = ReLU(cos(x_m, q_k)),  d_mk = |y_mk - s_mk|        crop m, cell k, y the share of the crop inside the cell

    form   positive part                                negative part                           of cells (R)
    v0     -Σ_{y>0} log(1 - d + ε) / (#{y>0} + ε)       Σ_{y=0} s² / (#{y=0} + ε)               both sides have a gradient
    v1     -Σ y log(1 - d + ε) / (Σ y + ε)              as v0                                   the second side has none
    v2     as v1                                        -Σ_{y=0} log(1 - s + ε) / (#{y=0} + ε)  as v1

ε = 1e-6, sums over the crops and cells of one volume. v0 is the CVPR paper's method, v1 what its repository has, v2 the second
paper's. Everything is computed in float32, in 2-D and 3-D alike. Where every cosine is 0, no crop is told from another: R and
the negative part are 0 then, and the positive part is about 0.36 (v0) or 0.71 (v1, v2) where two axes have cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import beside
from labeleff.errors import ShapeError

Form = Literal["v0", "v1", "v2"]
EPS = 1e-6
NORM_EPS = 1e-12
"""Least norm of an embedding: one of zeros has cosine 0 with everything."""


# -- geometry -----------------------------------------------------------------------------------------------------------


def grid_boxes(shape: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Return the cells of a grid over a volume as boxes [K, 2, d] int64 (start, stop), voxels; the last axis runs fastest.

    A cell is ``floor(shape / grid)`` along each axis; where that leaves voxels over, the grid lies in the middle.

    Args:
        shape: Of the volume, d lengths, voxels.
        grid: Cells along each axis; 1: a cell is as long as the volume.

    Raises:
        ShapeError: There is less than one cell along an axis, or less than one voxel to a cell.
    """
    if len(shape) != len(grid) or min(grid) < 1 or any(n < g for n, g in zip(shape, grid, strict=True)):
        raise ShapeError(f"a grid of {list(grid)} cells does not fit into a volume of {list(shape)} voxels")
    cell = [n // g for n, g in zip(shape, grid, strict=True)]
    first = [(n - g * c) // 2 for n, g, c in zip(shape, grid, cell, strict=True)]
    starts = torch.tensor(list(itertools.product(*map(range, grid)))) * torch.tensor(cell) + torch.tensor(first)
    return torch.stack([starts, starts + torch.tensor(cell)], 1)


def draw_boxes(bases: Tensor, count: int, *, generator: torch.Generator, reach_edge: bool = True) -> Tensor:
    """Return random crops as large as a cell, inside a grid: boxes [count, 2, d] int64.

    Args:
        bases: [K, 2, d] from :func:`grid_boxes`.
        count: How many.
        generator: On the CPU.
        reach_edge: Whether crops may touch the far edge of the grid; the authors' code never lets them.
    """
    first, last = bases[:, 0].amin(0), bases[:, 0].amax(0)
    cell = bases[0, 1] - bases[0, 0]
    places = (last - first + 1 - (0 if reach_edge else 1)).clamp_min(1)
    drawn = torch.rand(count, len(places), generator=generator, dtype=torch.float64)
    starts = first + (drawn * places).long()
    return torch.stack([starts, starts + cell], 1)


def overlap_labels(crops: Tensor, bases: Tensor) -> Tensor:
    """Return the share of each crop that lies inside each base: [N, M] float32, exactly 0 where they do not meet.

    Of crops inside a grid of bases every row sums to 1, with at most 2^d entries above 0.

    Args:
        crops: [N, 2, d], or [B, N, 2, d] of B volumes: start and stop along each axis, voxels.
        bases: [M, 2, d].

    Raises:
        ShapeError: These are no boxes of one number of axes, or a crop is empty.
    """
    if crops.ndim < 3 or bases.ndim != 3 or crops.shape[-2:] != bases.shape[1:] or bases.shape[1] != 2:
        raise ShapeError(
            f"crops are {list(crops.shape)} and bases {list(bases.shape)}; boxes [N, 2, d] and [M, 2, d] are needed"
        )
    size = crops[..., 1, :] - crops[..., 0, :]
    if bool((size <= 0).any()):
        raise ShapeError("a crop is empty: boxes are (start, stop) along each axis, stop above start")
    one, two = crops.unsqueeze(-3), bases
    inside = torch.minimum(one[..., 1, :], two[:, 1]) - torch.maximum(one[..., 0, :], two[:, 0])
    shares: Tensor = (inside.clamp_min(0) / size.unsqueeze(-2)).float().prod(-1)
    return shares


# -- losses -------------------------------------------------------------------------------------------------------------


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of all pairs, [..., N, M] float32, of [..., N, D] and [..., M, D]."""
    if one.ndim < 2 or other.ndim < 2 or one.shape[-1] != other.shape[-1]:
        raise ShapeError(f"embeddings are {list(one.shape)} and {list(other.shape)}; [N, D] and [M, D] are needed")
    with torch.autocast(one.device.type, enabled=False):
        return F.normalize(one.float(), dim=-1, eps=NORM_EPS) @ F.normalize(other.float(), dim=-1, eps=NORM_EPS).mT


def position_loss(cosine: Tensor, overlap: Tensor, *, form: Form = "v1", counted: Tensor | None = None) -> Tensor:
    """Return positive + negative part of the loss of positions, see above; the mean over volumes where there are several.

    Args:
        cosine: [N, M] cosines of the N crops and M bases of one volume, or [B, N, M] of B volumes, before the ReLU. (What is
            ReLU'd already, as the mean of the two of v1, is left as it is.)
        overlap: The same shape, y, of :func:`overlap_labels`; no gradient reaches it.
        form: Which generation's.
        counted: [M] or [B, M] bool: bases that are negatives where y = 0; None: all. Bases of padding look alike, and like
            other crops of padding: nobody can tell them apart.

    Raises:
        ShapeError: The shapes differ, or the form is unknown.
    """
    positive, negative = _parts(cosine, overlap, form, counted)
    return (positive + negative).mean()


def constant_losses(
    overlap: Tensor, answers: Sequence[float], *, form: Form = "v1", counted: Tensor | None = None
) -> Tensor:
    """Return the :func:`position_loss` of each of A answers [A] that are the same for every crop and base.

    Args:
        overlap: [N, M] or [B, N, M], y.
        answers: Cosines.
        form: As there.
        counted: As there.
    """
    same = beside(torch.tensor(answers, dtype=overlap.dtype), overlap).view(-1, *([1] * overlap.ndim))
    all_of_them = overlap.expand(len(answers), *overlap.shape)
    positive, negative = _parts(same.expand_as(all_of_them), all_of_them, form, counted)
    return (positive + negative).flatten(1).mean(1) if overlap.ndim > 2 else positive + negative


def base_regularisation(z: Tensor, *, detach_second: bool = False, counted: Tensor | None = None) -> Tensor:
    """Return ``R = 2 / (M (M - 1)) Σ_{i<j} ReLU(cos(z_i, z_j))²``: 0 where bases are orthogonal, 1 where all are one.

    Args:
        z: [M, D] embeddings of the bases of one volume, or [B, M, D]: then the mean over volumes.
        detach_second: No gradient for the later of two bases, as v1 and v2 have it: the last one of a volume gets none.
        counted: [M] or [B, M] bool: pairs of such bases only; 0, with a gradient, where there is none. None: all.

    Raises:
        ShapeError: There is one base only, which is nothing to regularise.
    """
    if z.ndim < 2 or z.shape[-2] < 2:
        raise ShapeError(f"bases are {list(z.shape)}; [M, D] of two bases or more are needed: use a finer grid")
    squares = cosines(z, z.detach() if detach_second else z).relu().square()
    pairs = torch.ones_like(squares, dtype=torch.bool).triu(1)
    if counted is not None:
        pairs = pairs & counted.unsqueeze(-1) & counted.unsqueeze(-2)
    sums = torch.where(pairs, squares, 0).sum((-2, -1))
    return (sums / pairs.sum((-2, -1)).clamp_min(1)).mean()


def inter_volume_loss(
    x_student_i: Tensor,
    q_student_j: Tensor,
    x_teacher_i: Tensor,
    q_teacher_j: Tensor,
    *,
    counted: Tensor | None = None,
) -> Tensor:
    """Return v2's loss between volumes: crops of one and bases of another are as alike to the student as to the teacher.

    ``position_loss(cos(x_S, q_S), t, form="v2")`` with ``t = ReLU(cos(x_T, q_T))`` in place of the overlap. Both of the
    student's factors get a gradient, the teacher's none.

    Args:
        x_student_i: [N, D] crops of volume i by the student, or [B, N, D]: then the mean over volumes.
        q_student_j: [M, D] bases of volume j by the student.
        x_teacher_i: The same crops by the teacher.
        q_teacher_j: The same bases by the teacher.
        counted: [M] or [B, M] bool, see :func:`position_loss`.

    Raises:
        ShapeError: The embeddings do not belong together.
    """
    target = cosines(x_teacher_i, q_teacher_j).relu().detach()
    return position_loss(cosines(x_student_i, q_student_j), target, form="v2", counted=counted)


def _parts(cosine: Tensor, overlap: Tensor, form: Form, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative part of every volume, [...] each of [..., N, M]."""
    if cosine.shape != overlap.shape or cosine.ndim < 2:
        raise ShapeError(f"cosines are {list(cosine.shape)}, overlaps {list(overlap.shape)}; both must be [N, M]")
    if form not in ("v0", "v1", "v2"):
        raise ShapeError(f"form is {form!r}; it must be v0, v1 or v2")
    s = cosine.float().relu().clamp_max(1)  # what rounding leaves above 1 has no logarithm in 16 bits
    y = overlap.detach().float()
    met, apart = y > 0, y == 0
    weight = met.float() if form == "v0" else y
    axes = (-2, -1)
    positive = -(weight * torch.log(1 - (y - s).abs() + EPS)).sum(axes) / (weight.sum(axes) + EPS)
    if counted is not None:
        apart = apart & counted.unsqueeze(-2)
    cost = -torch.log(1 - s + EPS) if form == "v2" else s.square()
    negative = torch.where(apart, cost, 0).sum(axes) / (apart.sum(axes) + EPS)
    return positive, negative

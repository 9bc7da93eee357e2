"""Volume contrast (VoCo): before there are labels, an encoder learns where in a volume a crop comes from.

Wu, Zhuang and Chen, CVPR 2024, arXiv:2402.17300, and arXiv:2410.09890; the losses are in ``functional.voco``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from labeleff.backbones.outputs import nearest_size
from labeleff.backbones.taps import Tap, encode, find_taps
from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Stream, Task, beside, uniform
from labeleff.errors import RecipeError, ShapeError
from labeleff.functional.collapse import watch_
from labeleff.functional.ema import ema_update_
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.resizing import resized
from labeleff.functional.voco import (
    Form,
    base_regularisation,
    constant_losses,
    cosines,
    draw_boxes,
    grid_boxes,
    inter_volume_loss,
    overlap_labels,
    position_loss,
)
from labeleff.registry import register
from labeleff.strategies.base import Strategy, fresh_copy, peer_of, train_only

SAME = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Answers that are the same for every crop and cell, the best of which is what can be had for nothing."""


class Projector(nn.Module):
    """Linear, norm, ReLU, twice, and Linear: [N, F] -> [N, width] float32, in float32 whatever the precision.

    The norm is that of the batch, of all crops of a step, in training and in use, without scale and shift: it is what keeps
    cosines from being all alike. (A norm of every row by itself has hardly ever learnt anything.)
    """

    def __init__(self, inputs: int, width: int) -> None:
        def norm() -> nn.Module:
            return nn.BatchNorm1d(width, affine=False, track_running_stats=False)

        super().__init__()
        hidden = [nn.Linear(inputs, width), norm(), nn.ReLU(), nn.Linear(width, width), norm(), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, width))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return [N, width] of [N, F]."""
        with torch.autocast(embedding.device.type, enabled=False):
            projected: Tensor = self.layers(embedding.float())
            return projected


@register("strategy", "voco")
class Voco(Strategy):
    """L = -Σ y log(1 - |y - s|) / Σ y + Σ_{y=0} s² / #{y=0} + w R, s = ReLU(cos) of crops and the cells of a grid.

    Of a window of every volume, a grid of cells and random crops of their size are embedded by the encoder (all its levels,
    averaged over space) and a projector; the cosine of crop and cell is to be their overlap y, and cells are to be unlike one
    another (R). No label is read, the decoder is neither run nor trained; the next stage is given the backbone. A step costs
    ``crops`` + cells passes of the encoder per window, and as many of a second encoder without gradients (``v1``).

    Three generations, each as its authors' code computes it, see ``functional.voco``: ``v0`` the CVPR paper's, one network;
    ``v1``, the default, what that repository has, whose second network and projector follow the first; ``v2`` the second
    paper's, one encoder, a second projector, and volumes that are told apart from one another. Teachers start with weights of
    their own, and follow (parameters only) after the student's pass, before their own, hence before the optimiser's step.

    The authors' code: ``reach_edge=false, least=0``, and v0 ``grid=4, crops=4, width=2048, levels=bottleneck``, v1 ``grid=4,
    width=2048, size=64, offset_probability=0.1``, v2 ``width=1024, row_dropout=0.2, self_contrast=true``; AdamW with amsgrad
    at 1e-4. Differs from it by default: a projector of the size of our networks, crops at every place, cells of padding left
    out, and no ``row_dropout``, which takes away whole crops and in small trials kept v2 from learning.

    A run that does no better than one answer to every place is reported. Images must share orientation and field of view: a crop
    round one organ, or a slide of tissue, has no anatomy to be placed in.

    Args:
        form: Generation: ``v0``, ``v1`` or ``v2``.
        grid: Cells along each axis, 1: none, cells are as long as the window. One number: along every axis, but in 3-D the
            shortest of the window (of equals the last).
        window: Size of the windows, voxels; empty: ``data.patch``. What lies outside the volume is padding.
        size: Size at which the network sees crops, voxels, one number or one per axis; empty: that of a cell, or what is
            nearest of what the network takes. Others are resized.
        crops: Random crops per window.
        momentum: Decay of the teachers' moving average.
        regulariser: Weight w of R.
        inter: Of ``v2``: weight of the loss between volumes, window i against the cells of window i + 1.
        self_contrast: Of ``v2``: where there is one window, set it against itself; else the loss between volumes is left out.
        row_dropout: Share of the rows (crops) that the student's projector is given as zeros.
        supervised: Weight of (cross-entropy + Dice) / 2 of labelled patches beside; 0: no label is read.
        pseudo: With ``supervised``: weight of the same loss of the random crops, against what a copy of the network says of
            them that is frozen once ``pseudo_after`` of the stage is done: the omni-supervised form. It trains the decoder alone.
        pseudo_after: Share of the stage before that; authors: half.
        levels: What is embedded: ``all`` levels of the encoder, or its ``bottleneck``.
        layers: Modules whose outputs are embedded, the deepest last; empty: found by a dry run.
        width: Of the projector.
        least: Share of a cell that must lie in the image, and not be constant, for it to count in R and as a negative: cells
            of padding are all alike. 0: all count.
        flip: Probability that a crop is mirrored, for each axis.
        rot90: Probability that a crop is turned by 90, 180 or 270 degrees in the plane of the first two axes with cells, if
            they are equally long.
        offset: Largest shift of a crop's intensity, units of the image.
        offset_probability: Share of crops that are shifted.
        reach_edge: Whether crops may touch the far edge of the grid.
    """

    batch_joint: ClassVar[bool] = True
    equivalent_options: ClassVar[Mapping[str, str]] = {
        "grid": "sizes are no two numbers to choose from",
        "window": "as grid",
        "size": "as grid",
        "layers": "as grid",
        "inter": "of v2",
        "self_contrast": "of v2 with one window",
        "levels": "networks of one level, and layers that are named",
        "least": "for windows that hold padding",
        "pseudo": "with supervised",
        "pseudo_after": "with supervised",
        "rot90": "for cells that are square",
    }

    def __init__(
        self,
        *,
        form: Form = "v1",
        grid: tuple[int, ...] = (3,),
        window: tuple[int, ...] = (),
        size: tuple[int, ...] = (),
        crops: int = 2,
        momentum: float = 0.9,
        regulariser: float = 1.0,
        inter: float = 1.0,
        self_contrast: bool = False,
        row_dropout: float = 0.0,
        supervised: float = 0.0,
        pseudo: float = 0.0,
        pseudo_after: float = 0.5,
        levels: Literal["all", "bottleneck"] = "all",
        layers: tuple[str, ...] = (),
        width: int = 256,
        least: float = 0.1,
        flip: float = 0.2,
        rot90: float = 0.2,
        offset: float = 0.1,
        offset_probability: float = 0.5,
        reach_edge: bool = True,
    ) -> None:
        super().__init__()
        if not grid or min(grid) < 1 or max(grid) < 2:
            raise ValueError(
                f"grid is {list(grid)}; at least one axis needs two cells or more: one cell is no place to be told"
            )
        if min((*window, *size, crops, width)) < 1:
            raise ValueError("window, size, crops and width are at least 1")
        if min(regulariser, inter, supervised, pseudo, offset) < 0:
            raise ValueError("regulariser, inter, supervised, pseudo and offset are at least 0")
        if not 0 <= row_dropout < 1 or not 0 <= pseudo_after < 1:
            raise ValueError("row_dropout and pseudo_after lie in [0, 1)")
        if pseudo and not supervised:
            raise ValueError("pseudo needs a network that learns from labels: set supervised, too")
        if not all(0 <= share <= 1 for share in (momentum, least, flip, rot90, offset_probability)):
            raise ValueError("momentum, least, flip, rot90 and offset_probability lie in [0, 1]")
        self.form: Form = form
        self.grid, self.window, self.size, self.crops = tuple(grid), tuple(window), tuple(size), crops
        self.momentum, self.regulariser, self.inter, self.self_contrast = momentum, regulariser, inter, self_contrast
        self.row_dropout, self.supervised, self.reads_labels = row_dropout, supervised, supervised > 0
        self.pseudo, self.pseudo_after = pseudo, pseudo_after
        self.levels, self.layers, self.width, self.least = levels, tuple(layers), width, least
        self.flip, self.rot90, self.offset, self.offset_probability = flip, rot90, offset, offset_probability
        self.reach_edge = reach_edge
        self._seen: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.means: Tensor

    def streams(self) -> dict[str, Stream]:
        """Return windows of all images, and labelled patches where they are learnt from."""
        windows = {"images": Stream("all", kind="window", size=self.window or None)}
        return windows | ({"labelled": Stream("labelled")} if self.supervised else {})

    # -- networks ---------------------------------------------------------------------------------------------------------

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Find the encoder, freeze what is not of it, and make projectors and teachers.

        Raises:
            RecipeError: An option has not one number per axis.
            ShapeError: The network has no encoder that can be found.
        """
        self.task = task
        for name, value in (("grid", self.grid), ("window", self.window), ("size", self.size)):
            if len(value) not in {0, task.ndim} | (set() if name == "window" else {1}):
                raise RecipeError(f"voco: {name} has {len(value)} numbers for a network of {task.ndim} axes")
        self.taps = self._find(backbone, task)
        self.said = "crops are embedded by " + ", ".join(f"{tap.module} ({tap.channels})" for tap in self.taps)
        device = next(backbone.parameters()).device
        inputs = sum(tap.channels for tap in self.taps)
        self.projector = Projector(inputs, self.width).to(device)
        if self.form != "v0":
            self.teacher_projector = Projector(inputs, self.width).to(device).requires_grad_(False)
        if self.form == "v1":
            self.teacher = peer_of(backbone).requires_grad_(False)
        self.encoder = frozenset(name for tap in self.taps for name in tap.parameters)
        if not self.supervised:
            train_only(backbone, self.encoder)
        if self.pseudo:
            self.labeller = fresh_copy(backbone)
        # the loss of positions, and what the same answer for every place would have
        self.register_buffer("means", torch.zeros(3, device=device))

    def set_modes(self, backbone: nn.Module) -> None:
        """Train everything but the network that gives pseudo-labels."""
        super().set_modes(backbone)
        if self.pseudo:
            self.labeller.eval()

    def _find(self, backbone: nn.Module, task: Task) -> tuple[Tap, ...]:
        """Return where crops are embedded."""
        if self.layers:
            *finer, deepest = self.layers
            return find_taps(backbone, task, bottleneck=deepest, encoder=finer, decoder=()).encoder
        taps = find_taps(backbone, task)
        return taps.encoder if self.levels == "all" else (taps.bottleneck,)

    def _embed(self, network: nn.Module, crops: Tensor) -> Tensor:
        """Return the mean over space of every level [N, F] float32, of a pass that stops at the last of them."""
        return torch.cat([f.flatten(2).float().mean(2) for f in encode(network, crops, self.taps)], 1)

    # -- a step -----------------------------------------------------------------------------------------------------------

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``position`` and ``regulariser``; ``inter`` of v2, ``supervised`` and ``pseudo`` where asked for.

        Raises:
            ShapeError: The window has no room for the grid, or a crop none for the network.
        """
        images = batch["images"]
        crops, overlap, counted = self._cut(images, progress.generators("crops", images.geometry.sample))
        volumes = len(crops)
        rows, inside = self._as_seen(backbone, crops.flatten(0, 1)).tensor_split([self.task.channels], 1)
        embedded = self._embed(backbone, rows)
        dropped = self._dropped(embedded, progress.generators("rows", images.geometry.sample))
        student = self.projector(dropped).view(volumes, -1, self.width)
        x, q = student[:, : self.crops], student[:, self.crops :]
        losses = {}
        if self.form == "v0":
            cosine = cosines(x, q.detach())
        else:
            teacher = self._teach(backbone, rows, embedded, progress).view(volumes, -1, self.width)
            x_teacher, q_teacher = teacher[:, : self.crops], teacher[:, self.crops :]
            cosine = cosines(x, q_teacher)
            if self.form == "v1":
                cosine = (cosine.relu() + cosines(x_teacher, q).relu()) / 2
            elif volumes > 1 or self.self_contrast:
                others = [q.roll(-1, 0), x_teacher, q_teacher.roll(-1, 0)]
                theirs = None if counted is None else counted.roll(-1, 0)
                losses["inter"] = self.inter * inter_volume_loss(x, *others, counted=theirs)
        losses["position"] = position_loss(cosine, overlap, form=self.form, counted=counted)
        between = base_regularisation(q, detach_second=self.form != "v0", counted=counted)
        losses["regulariser"] = self.regulariser * between
        logits = {}
        if self.supervised:
            scores = backbone(batch["labelled"].image)
            losses["supervised"] = self.supervised * segmentation_loss(scores, batch["labelled"].label)
            logits = {"labelled": scores.detach()}
        if self.pseudo and progress.fraction >= self.pseudo_after:
            drawn = torch.arange(len(rows), device=rows.device).view(volumes, -1)[:, : self.crops].flatten()
            guessed = self._guessed(backbone, rows[drawn], inside[drawn, 0] > 0.5, progress)
            losses["pseudo"] = self.pseudo * guessed
        idle = constant_losses(overlap, SAME, form=self.form, counted=counted)
        told = _correlation(cosine.detach().relu(), overlap)
        self._watch(losses["position"].detach(), idle.min(), told, progress)
        notes = {"flat": idle[0], "constant": idle.min(), "padded": 1 - images.valid.float().mean()}
        return StepOutput(losses, logits, notes | {"correlation": told})

    @torch.no_grad()
    def _teach(self, backbone: nn.Module, rows: Tensor, embedded: Tensor, progress: Progress) -> Tensor:
        """Let the teachers follow, once a step, and return what they make of the crops [N, D]."""
        if progress.micro == 0:
            ema_update_(self.teacher_projector, self.projector, self.momentum, buffers="keep")
            if self.form == "v1":
                ema_update_(self.teacher, backbone, self.momentum, buffers="keep")
        clean = self._embed(self.teacher, rows) if self.form == "v1" else embedded
        projected: Tensor = self.teacher_projector(clean)
        return projected

    def _guessed(self, backbone: nn.Module, rows: Tensor, inside: Tensor, progress: Progress) -> Tensor:
        """Return the loss of crops [N, C, *cell] against pseudo-labels; no gradient reaches the encoder.

        The authors detach its features, but for one connection that they forget.
        """
        first = progress.step == 0 or (progress.step - 1) / progress.total < self.pseudo_after
        if first and progress.micro == 0:
            self.labeller.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            guess = self.labeller(rows).argmax(1).masked_fill(~inside, IGNORE)
        still = {name: p.detach() for name, p in backbone.named_parameters() if name in self.encoder}
        return segmentation_loss(functional_call(backbone, still, (rows,)), guess)

    def _dropped(self, embedded: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the embeddings with some rows of zeros, the others enlarged: dropout of whole crops."""
        if not self.row_dropout:
            return embedded
        drawn = uniform(generators, len(embedded) // len(generators)).view(-1, 1)
        kept = (drawn >= self.row_dropout).float() / (1 - self.row_dropout)
        return embedded * beside(kept.to(embedded.dtype), embedded)

    # -- crops ------------------------------------------------------------------------------------------------------------

    def _cut(self, images: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return crops, then cells, of every window [B, n + K, C, *cell], overlaps [B, n, K], and the cells that count [B, K].

        With pseudo-labels one channel more says what lies inside the image.
        """
        shape = tuple(images.image.shape[2:])
        grid = self._grid_of(shape)
        bases = grid_boxes(shape, grid)
        boxes = torch.stack(
            [draw_boxes(bases, self.crops, generator=own, reach_edge=self.reach_edge) for own in generators]
        )
        image = images.image
        if self.pseudo:
            image = torch.cat([image, images.valid.to(image)], 1)
        pieces = torch.stack([torch.stack(_pieces(i, [*b, *bases])) for i, b in zip(image, boxes, strict=True)])
        counted = None
        if self.least:
            inside = torch.stack([torch.stack(_pieces(valid, bases)) for valid in images.valid])
            values = pieces[:, self.crops :, : self.task.channels].flatten(3)
            varied = (values.amax(3) > values.amin(3)).any(2)  # before crops are shifted: rounding would do
            counted = varied & (inside.flatten(2).float().mean(2) >= self.least)
        self._augment_(pieces.flatten(0, 1), grid, generators)
        return pieces, beside(overlap_labels(boxes, bases), image), counted

    def _grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the cells along each axis of a window."""
        if len(self.grid) > 1:
            return self.grid
        grid = [self.grid[0]] * len(shape)
        if len(shape) == 3:
            grid[max(axis for axis in range(3) if shape[axis] == min(shape))] = 1
        return tuple(grid)

    def _augment_(self, rows: Tensor, grid: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        """Mirror, turn and shift crops [N, C, *cell] in place, each by itself. What they overlap does not change."""
        each = len(rows) // len(generators)

        def some(share: float) -> Tensor:
            return torch.nonzero(uniform(generators, each).flatten() < share).squeeze(1)

        for axis in range(2, rows.ndim):
            chosen = beside(some(self.flip), rows)
            rows[chosen] = rows[chosen].flip(axis)
        plane = [axis + 2 for axis, cells in enumerate(grid) if cells > 1][:2]
        turns = torch.cat([torch.randint(1, 4, (each,), generator=own) for own in generators])
        chosen = some(self.rot90)
        if len(plane) == 2 and rows.shape[plane[0]] == rows.shape[plane[1]]:
            for k in (1, 2, 3):
                turned = beside(chosen[turns[chosen] == k], rows)
                rows[turned] = torch.rot90(rows[turned], k, plane)
        chosen = some(self.offset_probability)
        shifts = (2 * uniform(generators, each).flatten() - 1) * self.offset
        by = beside(shifts[chosen].to(rows.dtype), rows).view(-1, *[1] * (rows.ndim - 1))
        rows[beside(chosen, rows), : self.task.channels] += by

    def _as_seen(self, backbone: nn.Module, rows: Tensor) -> Tensor:
        """Return crops in the size in which the network sees them."""
        cell = tuple(rows.shape[2:])
        if cell not in self._seen:
            size = self.size * self.task.ndim if len(self.size) == 1 else self.size
            size = size or nearest_size(backbone, self.task, cell)
            deepest = self.taps[-1]
            if prod(max(1, round(n / step)) for n, step in zip(size, deepest.stride, strict=True)) == 1:
                raise ShapeError(
                    f"voco: crops of {list(size)} voxels leave the deepest features ({deepest.module}) one voxel; take a "
                    "larger window, a coarser grid, or a larger size"
                )
            self._seen[cell] = size
        if self._seen[cell] == cell:
            return rows
        return resized(rows, self._seen[cell], align_corners=True)

    # -- guard against learning nothing -----------------------------------------------------------------------------------

    def _watch(self, position: Tensor, constant: Tensor, told: Tensor, progress: Progress) -> None:
        """Follow the loss, and what the best constant answer has; look at times, and say once if they are near.

        The loss punishes what is far off hard, and is near that of a constant where places are told well. So it is said only
        where what is predicted has hardly anything to do with the truth either.
        """
        if near := watch_(self.means, position, constant, progress, told=told):
            self.warn(
                "positions",
                f"the loss of positions is {near[0]:.3f}, and {near[1]:.3f} for one answer to every place: it is not learning; "
                "change the rate, take more crops or windows per step, and make sure that images share orientation and field of "
                "view",
                progress,
            )


def _pieces(image: Tensor, boxes: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Return what lies in some boxes of [C, *S]."""
    places = [tuple(slice(a, b) for a, b in zip(*box.tolist(), strict=True)) for box in boxes]
    return [image[(slice(None), *place)] for place in places]


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return the correlation of two arrays; 0 where one is constant."""
    a, b = (part.flatten() - part.mean() for part in (one, other))
    found: Tensor = (a @ b) / (a.norm() * b.norm()).clamp_min(1e-12)
    return found

"""What flows through the loop: tasks, batches, progress and the output of a step.

Shapes: B batch, C channels, K classes, *S the d = 2 or 3 axes the network sees, A the axes of a stored case
(A may be 3 where d is 2: slices of volumes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE = 255
"""Label of a voxel about which nobody has said anything. Every loss, metric and sampler leaves it out."""


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of its parts (never of history or of Python's hash seed)."""
    digest = hashlib.blake2b("/".join(f"{type(p).__name__}:{p}" for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Return numbers that are uniform in [0, 1), [B, *shape] float32 on the CPU: those of each sample from its own generator."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def beside(drawn: Tensor, like: Tensor) -> Tensor:
    """Return a small tensor of the CPU where another one lies, without waiting until its device has done what it has to do."""
    return drawn.to(like.device, non_blocking=like.is_cuda)


@dataclass(frozen=True)
class Task:
    """What is to be segmented.

    Args:
        classes: Names, background first.
        ndim: Axes the network sees: 2 or 3.
        channels: Input channels C.
        exclusive: Classes exclude one another (softmax). Otherwise they are overlapping regions (sigmoid).
    """

    classes: tuple[str, ...]
    ndim: int
    channels: int = 1
    exclusive: bool = True

    @property
    def num_classes(self) -> int:
        """K: the classes with the background; of overlapping regions their number R, for the background is none of them."""
        return len(self.classes) if self.exclusive else len(self.classes) - 1

    @property
    def regions(self) -> int:
        """R, the number of regions that overlap; 0 where classes exclude one another."""
        return 0 if self.exclusive else self.num_classes


class Geometry(NamedTuple):
    """Where each sample of a batch comes from, and the augmentation it was given.

    ``affine`` is the map from output to input coordinates in the normalised form of ``grid_sample``
    (x fastest); applying it again to another array of the same patch replays the same geometry.
    """

    case: Tensor  # [B] int64: index into the table of cases of the run
    origin: Tensor  # [B, A] int64, voxels
    size: Tensor  # [B, A] int64, voxels
    shape: Tensor  # [B, A] int64: shape of the whole stored case
    spacing: Tensor  # [B, A] float32, mm; NaN where unknown
    affine: Tensor  # [B, d, d + 1] float32; the identity where nothing was drawn
    intensity: (
        Tensor  # [B, 5] float32: gain, offset, gamma, noise sd, blur sd (voxels); 1, 0, 1, 0, 0 where nothing was drawn
    )
    sample: Tensor  # [B] int64: the key of the sample's draws


class Batch(NamedTuple):
    """One stream's share of a step."""

    image: Tensor  # [B, C, *S] float32
    label: Tensor  # [B, *S] int64, IGNORE where nobody has said; overlapping regions: [B, R, *S] of {0, 1, IGNORE}
    given: Tensor  # the label as first given, same shape (the same tensor where it was never edited)
    valid: Tensor  # [B, 1, *S] bool, False in padding
    geometry: Geometry  # on the CPU, wherever the rest is
    soft: Tensor | None = None  # [B, K, *S]: several raters, fused pseudo-labels
    weight: Tensor | None = None  # [B, *S] or [B]
    extras: Mapping[str, Tensor] = {}

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device: what a trainer calls.

        Its geometry stays: what is asked of it, and drawn by it, would wait for the device to come to an end of all its work.
        """
        there = torch.device(device)
        return self._changed(lambda tensor: tensor.to(there, non_blocking=there.type == "cuda"))

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU reads by itself: what a loader calls."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with other tensors; one that is both ``label`` and ``given`` stays one."""
        label = change(self.label)
        return self._replace(
            image=change(self.image),
            label=label,
            given=label if self.given is self.label else change(self.given),
            valid=change(self.valid),
            soft=None if self.soft is None else change(self.soft),
            weight=None if self.weight is None else change(self.weight),
            extras={name: change(value) for name, value in self.extras.items()},
        )


class Progress(NamedTuple):
    """Where a stage stands. Schedules read ``fraction``, so they survive a change of length."""

    step: int  # optimiser steps done in this stage
    total: int  # optimiser steps of this stage
    stage: int = 0
    seed: int = 0
    micro: int = 0  # micro-batch inside a step (gradient accumulation)
    round: int = 0  # revisions of labels that came before in this stage
    micro_batches: int = 1  # in a step

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, in [0, 1]."""
        return min(1.0, self.step / self.total) if self.total else 1.0

    def generator(self, purpose: str) -> torch.Generator:
        """Return a CPU generator that is a function of (seed, stage, step, micro-batch, purpose) alone."""
        key = derive_seed(self.seed, "strategy", self.stage, self.step, self.micro, purpose)
        return torch.Generator().manual_seed(key)

    def generators(self, purpose: str, samples: Tensor) -> list[torch.Generator]:
        """Return a CPU generator for each sample: a function of (seed, stage, step, purpose) and the sample alone.

        What is drawn for a sample is then the same in whatever process and micro-batch it is seen, and no two processes draw
        alike, as they do from :meth:`generator`, which is for what a whole batch has in common.

        Args:
            purpose: What for.
            samples: ``Geometry.sample``, [B].
        """
        keys = (derive_seed(self.seed, "strategy", self.stage, self.step, purpose, key) for key in samples.tolist())
        return [torch.Generator().manual_seed(key) for key in keys]


class StepOutput(NamedTuple):
    """What a strategy hands back from one step."""

    losses: dict[str, Tensor]  # named scalars, summed by the Learner; none with a gradient: no optimiser step
    logits: dict[str, Tensor] = {}  # noqa: RUF012  detached, by stream
    notes: dict[str, Tensor] = {}  # noqa: RUF012  diagnostics that are not losses


@dataclass(frozen=True)
class Stream:
    """One flow of samples a strategy draws from.

    Args:
        role: Whose cases: ``labelled`` (in the budget), ``unlabelled`` (the rest of the training list) or ``all``.
        kind: ``patch`` (random patches or slices), ``slice``: whole images for 2-D networks, patches for 3-D ones, ``window``:
            patches of a ``size`` of their own, or ``partitions``: of volumes that are drawn for the step, one sample from each
            of some equal parts along the axis of slices, volume after volume, whole slices for 2-D networks, patches for 3-D ones.
        optional: A stage may go without this stream (it is then absent from the batch).
        partial: Of unlabelled cases: some voxels may be labelled later (by people who were asked), and are learnt from.
        size: Of windows, voxels, one per axis of the network; None: the patch of the run.
        partitions: Of kind ``partitions``: parts of a volume. A batch is a multiple of them.
        volumes: Of kind ``partitions``: the fewest volumes that a process must see at a time.
        least: Of the others: the fewest samples that a process must see at a time.
    """

    role: Literal["labelled", "unlabelled", "all"]
    kind: Literal["patch", "slice", "window", "partitions"] = "patch"
    optional: bool = False
    partial: bool = False
    size: tuple[int, ...] | None = None
    partitions: int = 1
    volumes: int = 1
    least: int = 1


@dataclass(frozen=True)
class Report:
    """What a hand-off between stages took over, in words for the log."""

    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    note: str = ""

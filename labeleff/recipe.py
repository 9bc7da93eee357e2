"""Recipes: plain values that say the whole of a run. Reading and checking them is in the second half of this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from labeleff.data.augment import Augment
from labeleff.registry import Component as Component  # a recipe is made of them


@dataclass(frozen=True)
class Data:
    """What the run learns from, and how much of it is labelled.

    Args:
        dataset: Registered data set with its options.
        labelled: Budget: a number of patients, a fraction of them (below 1), ``all``, ``first:N`` of the official list, or
            ``none``: a network that was trained elsewhere is adapted (``stages.0.start`` names its file).
        leave_out: Cases that are done without, by name: those that cannot be read. The result says which, and counts those of
            the test.
        draw: Which random draw of labelled patients; budgets are nested within a draw.
        validation: Patients taken out of the budget for validation, or ``official`` (added to it, and the result says so).
        slices: Slices labelled per labelled patient, evenly spread, the rest unknown; null: all of them.
        raters: What becomes of several raters' labels of a case: ``majority`` (ties: unknown), ``staple`` (needs SimpleITK),
            ``random`` (one rater per case, drawn by ``draw``), or ``soft`` (the share of raters for each class, for
            strategies that learn from it; the majority for the others).
        unlabelled: ``rest`` of the training list, ``none``, a number of patients, or ``5x``: five times the labelled ones.
        foreign: Domain whose training patients are never labelled, and join the unlabelled ones only by ``contamination``.
        contamination: Share of the unlabelled patients that are foreign, in place of as many others.
        source: Domains that labels come from; empty: all.
        target: Domains that unlabelled and evaluation cases come from; empty: all. A target named as source too is an oracle.
        unlabelled_from: Domains that unlabelled cases come from in place of those of ``target``; empty: those of ``target``.
        prior: What is known of the sizes of organs in unlabelled cases beforehand, for strategies that learn from it; null:
            nothing.
        noise: Label-noise model by which the labels of labelled patients are made wrong, once, before anything is learned;
            null: they stay as they are. Validation and test labels are never touched.
        drop_noisy: Instead of learning from the cases that the noise touches, treat them as unlabelled.
        evaluate_on: ``test``; ``development``: a fixed part of the training list, never used for claims; or ``none``: nothing
            is evaluated, for a predictor that learns from all there is.
        development: Patients of the development part, cut from the end of the training list of a fixed shuffle.
        spacing: Resample to this voxel size, mm; null keeps the grid.
        window: Smallest and largest intensity that are kept, in the units of the files (CT: Hounsfield); what lies beyond is
            set to them, before resampling and normalisation. null: all intensities.
        normalise: Per image: ``zscore``, ``minmax`` or ``none``. Looks at nothing but the image.
        dimensions: Axes the network sees; null: those of the data. 2 with volumes: slices.
        slice_axis: Axis along which volumes are cut into slices; null: the data set's own.
        patch: Patch size, voxels, one per axis of the network.
        foreground: Share of labelled samples centred on a labelled foreground voxel.
    """

    dataset: Component
    labelled: int | float | str = 4
    leave_out: tuple[str, ...] = ()
    draw: int = 0
    validation: int | str = 0
    slices: int | None = None
    raters: Literal["majority", "staple", "random", "soft"] = "majority"
    unlabelled: int | str = "rest"
    foreign: str = ""
    contamination: float = 0.0
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    unlabelled_from: tuple[str, ...] = ()
    prior: Component | None = None
    noise: Component | None = None
    drop_noisy: bool = False
    evaluate_on: Literal["test", "development", "none"] = "test"
    development: int = 0
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None
    normalise: Literal["zscore", "minmax", "none"] = "zscore"
    dimensions: int | None = None
    slice_axis: int | None = None
    patch: tuple[int, ...] = (96, 96)
    foreground: float = 0.0


@dataclass(frozen=True)
class StreamBinding:
    """How a stage binds one stream: batch size and which cases. What no stream binds, the stage cannot read.

    Args:
        batch: Samples per step; 0 leaves an optional stream out (no source in a stage of adaptation).
        role: Whose cases, where they are not those the strategy means.
        domain: Only cases of this domain.
        known: Share of samples centred on a voxel that somebody has labelled, for labels that know little.
    """

    batch: int | None = None
    role: Literal["labelled", "unlabelled", "all"] | None = None
    domain: str | None = None
    known: float = 0.0


@dataclass(frozen=True)
class Optimiser:
    """SGD or AdamW. Rates are per optimiser step; factors of parameter groups multiply them."""

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a stage, a pure function of the step.

    Args:
        name: ``constant``, ``step`` (times ``gamma`` every ``every`` steps), ``poly`` ((1 - t)^power) or ``cosine``.
        warmup: Steps of linear warm-up.
        every: Steps between drops of ``step``.
        gamma: Factor of a drop.
        power: Exponent of ``poly``.
        final: Lowest factor of ``cosine`` and ``poly``.
    """

    name: Literal["constant", "step", "poly", "cosine"] = "constant"
    warmup: int = 0
    every: int = 2500
    gamma: float = 0.1
    power: float = 0.9
    final: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One strategy, perhaps one annotator, its length and its optimiser.

    Args:
        strategy: What is minimised.
        annotator: How labels change, or null.
        steps: Optimiser steps. 0 is legal: the stage hands on what it was given.
        batch: Samples per step of every stream that its binding does not set.
        streams: Per stream: batch size, role, domain.
        revise_every: Steps between revisions of labels; 0: never after the start.
        revise_at_start: Revise once before the first step.
        answers: Who answers what the annotator asks: ``oracle`` (the labels that training has not seen: a simulation),
            ``person`` (the run stops, see ``labeleff query``), or ``nobody``: an annotator that asks is an error.
        folds: Train so many networks, each without one part of the labelled patients; the annotator then revises once, at
            the end, and sees every labelled case by the network that never did. 0: one network, all patients.
        fold: Which part this stage leaves out; null: all in turn, as stages of their own.
        start: ``previous``, ``fresh``, or a file of weights: safetensors, or a torch file of nothing but tensors.
        start_share: Smallest share of the network's numbers that this file must fill, in (0, 1]; the rest is drawn afresh.
        start_overlap: ``allow`` runs even where this file has learnt from test cases of this run, and marks the result.
        take: Which weights are handed on: ``last`` or ``val_best``.
        optimiser_state: ``fresh``, or ``previous`` to take over moments from the stage before.
    """

    strategy: Component
    annotator: Component | None = None
    steps: int = 1000
    batch: int = 4
    streams: Mapping[str, StreamBinding] = field(default_factory=dict)
    optimiser: Optimiser = field(default_factory=Optimiser)
    optimiser_state: Literal["fresh", "previous"] = "fresh"
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    revise_every: int = 0
    revise_at_start: bool = False
    answers: Literal["nobody", "oracle", "person"] = "nobody"
    folds: int = 0
    fold: int | None = None
    start: str = "previous"
    start_share: float = 1.0
    start_overlap: Literal["refuse", "allow"] = "refuse"
    take: Literal["last", "val_best"] = "last"

    def batch_of(self, stream: str) -> int:
        """Return how many samples of a stream a step has; 0 where it is left out."""
        bound = self.streams.get(stream)
        return self.batch if bound is None or bound.batch is None else bound.batch

    @property
    def revisions(self) -> tuple[int, ...]:
        """The steps before which labels are revised; with folds, after the last of them."""
        if self.annotator is None:
            return ()
        if self.folds:
            return (self.steps,)
        return (
            *((0,) if self.revise_at_start else ()),
            *(range(self.revise_every, self.steps, self.revise_every) if self.revise_every else ()),
        )


@dataclass(frozen=True)
class Trainer:
    """How the steps are run.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``auto``, as in Lightning.
        devices: Processes; more than one trains data-parallel (DDP), the batch being shared out.
        nodes: Machines.
        precision: ``32``, ``bf16`` or ``16`` (mixed).
        clip: Largest gradient norm; 0: no clipping.
        accumulate: Micro-batches per optimiser step.
        threads: CPU threads of torch, part of what a run is (sums depend on it); 0: all that this process may use, written
            down as a number.
        workers: Processes that prepare batches; the result does not depend on it.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines of metrics.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["32", "bf16", "16"] = "32"
    clip: float = 0.0
    accumulate: int = 1
    threads: int = 1
    workers: int = 0
    checkpoint_every: int = 200
    log_every: int = 10


@dataclass(frozen=True)
class Evaluation:
    """How the predictor is measured.

    Args:
        folds: Without a test set: so many parts of the labelled patients, each tested once by a run on the others.
        fold: Only this part; null: one run after the other, and their pooled result.
        every: Steps between validations (and snapshots for ``oracle``); 0: only at the end.
        overlap: Overlap of sliding windows, share of the patch.
        window_batch: Windows (or slices) per forward pass.
        predictors: ``first`` or ``all`` of the strategy's predictors.
        largest_component: Keep only the largest component of each class at test time.
        oracle: Also report the snapshot that is best on the evaluation cases, as a marked row that is not a result.
        rounds: Also evaluate the predictor as it was before every revision of labels in the last stage: the curve over the
            budget of active learning. Marked rows, and one opening of the test labels each; nothing is selected by them.
        pictures: Cases drawn: best, median and worst, and labelled ones whose raters differ most; or none.
        diagnose: Steps between looks at how training cases whose labels ``data.noise`` made wrong are learnt, against the
            clean ones; 0: never. Without ``data.noise`` there is nothing to see. Changes nothing about a result.
        diagnose_cases: Cases predicted at each look, as in validation: what it costs.
        probe: Steps between looks at what the network's features know: a linear head learns the labels of the budget from
            them, and is measured on labelled patients it has not seen; 0: never. Changes nothing about a result.
        probe_level: Features of all levels of the ``encoder``, of the ``decoder`` as well, or of the ``bottleneck``.
        probe_layers: Names of modules whose outputs are the features, in place of ``probe_level``; empty: they are found.
    """

    folds: int = 0
    fold: int | None = None
    every: int = 0
    overlap: float = 0.5
    window_batch: int = 8
    predictors: Literal["first", "all"] = "all"
    largest_component: bool = False
    oracle: bool = False
    rounds: bool = False
    pictures: bool = True
    diagnose: int = 0
    diagnose_cases: int = 8
    probe: int = 0
    probe_level: Literal["encoder", "decoder", "bottleneck"] = "encoder"
    probe_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A run: data, backbone and an ordered list of stages.

    Args:
        name: Name of the run; letters, digits, ``_``, ``-`` and ``.``; becomes a folder.
        seed: Seed of everything drawn in training. The draw of labelled patients has its own (``data.draw``).
        baseline: Stages of a baseline trained on the same data, draw and seed, reported beside; may be empty.
    """

    name: str
    data: Data
    backbone: Component
    stages: tuple[Stage, ...]
    seed: int = 0
    trainer: Trainer = field(default_factory=Trainer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    baseline: tuple[Stage, ...] = ()

"""Everything a run needs that is not trained: networks to begin with, cases for each stream, how whole cases are looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from labeleff import registry
from labeleff.backbones.outputs import check_patch
from labeleff.backbones.views import first_of_ensemble
from labeleff.backbones.weights import load_weights, read_weights
from labeleff.batch import Batch, Stream, Task, derive_seed
from labeleff.data import raters
from labeleff.data.annotations import AnnotationStore
from labeleff.data.audit import Audit
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role
from labeleff.data.module import StepData, make_loader
from labeleff.data.provenance import Provenance, Start, digest, provenance_in
from labeleff.data.sampling import StreamPlan
from labeleff.data.split import Split, evenly
from labeleff.data.store import ImageStore, leave_it_out
from labeleff.errors import RecipeError, RunError, SplitError, StoreError, did_you_mean
from labeleff.evaluation.evaluate import Viewer
from labeleff.labels import on_grid, votes_of
from labeleff.recipe import Recipe, Stage
from labeleff.strategies.base import Strategy

MULTIPLE = 32
"""Whole images are padded to multiples of this, or of a divisor where the patch is of smaller ones."""


@dataclass(frozen=True)
class Prepared:
    """Data and task of a run.

    The training side is :attr:`store` (images) and :attr:`annotations` (labels of the budget); neither has a path to a
    label outside it. :attr:`dataset` is for evaluation.
    """

    recipe: Recipe
    dataset: DataSet
    manifest: Manifest
    split: Split
    audit: Audit
    store: ImageStore
    annotations: AnnotationStore
    task: Task
    slice_axis: int | None
    raters: Mapping[str, Any] | None = None
    """How far the raters of the labelled cases agree, see ``data.raters``; None where every case has one."""
    priors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Expected shares of the classes in unlabelled cases [1, K], or in their slices [n, K], see ``data.prior``."""
    prior_mark: str = ""
    """What must stand beside a result that rests on them."""
    starts: tuple[Start, ...] = ()
    """The files that stages start from, and what these have learnt from."""
    left_out: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    """Cases that ``data.leave_out`` does without, by the role they would have played."""

    # -- networks -------------------------------------------------------------------------------------------------------

    def backbone(self, seed: int) -> nn.Module:
        """Return the recipe's network with weights that are a function of the seed."""
        return make_backbone(self.recipe, self.task, seed)

    def start(self, backbone: nn.Module, stage: Stage, seed: int) -> tuple[nn.Module, dict[str, Tensor], str]:
        """Return the network a stage starts from: the previous stage's, a fresh one, or one from a file.

        With it come what the file holds beside a network, the other networks of an ensemble, and what to say of the file.

        Raises:
            RunError: The file cannot be read, is not the one that was looked at, or fills less of the network than
                ``start_share``.
        """
        if stage.start == "previous":
            return backbone, {}, ""
        if stage.start == "fresh":
            return self.backbone(seed), {}, ""
        looked_at = next((start for start in self.starts if start.file == stage.start), None)
        if looked_at is not None and provenance_in(Path(stage.start)) != looked_at.provenance:
            raise RunError(f"start: {stage.start}: the file has changed since the run began; start over with --fresh")
        if stage.start_share < 1:  # what the file leaves is drawn as in a fresh network, not what came before
            backbone = self.backbone(seed)
        own, others = first_of_ensemble(read_weights(Path(stage.start)))
        report = load_weights(
            backbone,
            own,
            channels=self.task.channels,
            axis=self.manifest.slice_axis if self.manifest.axes == 3 else -1,
            minimum=stage.start_share,
            what=f"start: {stage.start}: these weights do not load into {self.recipe.backbone.name}",
        )
        warning = f". {looked_at.note}" if looked_at is not None and looked_at.note else ""
        return backbone, others, f"{stage.start}: {report.summary}{warning}"

    @cached_property
    def provenance(self) -> Provenance:
        """Return what the weights of this run have learnt from, with all that its files have."""
        split, seen = self.split, set[str]()
        if self.recipe.evaluation.every:
            seen.update(split.validation)
        if split.evaluate_on == "development":  # settings are chosen by them
            seen.update(split.test)
        if self.recipe.data.prior is not None:
            seen.update(split.unlabelled)
        for index, stage in enumerate(self.recipe.stages):
            if stage.steps:
                strategy = registry.made("strategy", stage.strategy)
                seen |= self.bound(stage, index, strategy)
        found = Provenance(frozenset(digest(self.store.content(case)) for case in seen), (self.manifest.name,))
        for start in self.starts:
            found = found.joined(start.provenance or Provenance(unknown=(start.file,)))
        return found

    # -- data -----------------------------------------------------------------------------------------------------------

    def cases_of(self, role: str, domain: str | None = None) -> tuple[str, ...]:
        """Return the ids of training cases by role: labelled, unlabelled or all, these in an order that no budget changes."""
        split = self.split
        if role == "all":
            known = {*split.labelled, *split.unlabelled}
            ids = tuple(case.id for case in self.manifest.cases if case.id in known)
        else:
            ids = {"labelled": split.labelled, "unlabelled": split.unlabelled}[role]
        return tuple(i for i in ids if domain is None or self.manifest.case(i).domain == domain)

    def held_out(self, stage: Stage) -> tuple[str, ...]:
        """Return the labelled cases that a stage with folds leaves out: those of one part of the patients.

        Raises:
            SplitError: There are more parts than labelled patients.
        """
        if stage.fold is None:
            return ()
        patient = {i: self.manifest.case(i).patient for i in self.split.labelled}
        seed = self.recipe.seed
        order = sorted(set(patient.values()), key=lambda name: (derive_seed("stage-folds", seed, name), name))
        if len(order) < stage.folds:
            raise SplitError(
                f"stages.folds is {stage.folds}, but {len(order)} patients are labelled; lower it or raise data.labelled"
            )
        part = set(order[stage.fold :: stage.folds])
        return tuple(i for i in self.split.labelled if patient[i] in part)

    def plans(self, stage: Stage, index: int, strategy: Strategy) -> dict[str, StreamPlan]:
        """Bind the strategy's streams to cases and batch sizes.

        Raises:
            RecipeError: The stage names a stream the strategy has not, or one that is needed has no cases.
        """
        streams = strategy.streams()
        for name in stage.streams:
            if name not in streams:
                raise RecipeError(
                    f"stages.{index}.streams: {stage.strategy.name} has no stream {name!r}."
                    f"{did_you_mean(name, streams)} It has: {', '.join(streams)}"
                )
        plans = {}
        for name, stream in streams.items():
            plan = self._plan(stage, name, stream)
            if plan is None and not stream.optional:
                raise RecipeError(
                    f"stages.{index}: {stage.strategy.name} needs the stream {name!r}, but no case is bound to it; "
                    "check data.labelled, data.unlabelled and the stage's streams"
                )
            if plan is not None:
                plans[name] = plan
        if streams and not plans:
            raise RecipeError(
                f"stages.{index}: no case is bound to any stream of {stage.strategy.name}, so that it has nothing to learn "
                "from; check data.labelled, data.unlabelled and the stage's streams"
            )
        return plans

    def _bound_cases(self, stage: Stage, name: str, stream: Stream) -> tuple[str, tuple[str, ...]]:
        """Return the role of the cases that a stage gives a stream, and these."""
        bound = stage.streams.get(name)
        role = (bound.role if bound is not None else None) or stream.role
        left_out = frozenset(self.held_out(stage))
        cases = self.cases_of(role, bound.domain if bound is not None else None)
        return role, tuple(i for i in cases if i not in left_out)

    def _plan(self, stage: Stage, name: str, stream: Stream) -> StreamPlan | None:
        bound = stage.streams.get(name)
        role, cases = self._bound_cases(stage, name, stream)
        batch = stage.batch_of(name)
        if not cases or not batch:
            return None
        if stream.kind == "partitions":
            return self._in_partitions(stage, stream, cases, batch)
        patch = self._whole(cases) if stream.kind == "slice" and self.task.ndim == 2 else stream.size
        if role != "labelled":
            known = bound.known if bound is not None else 0.0
            return StreamPlan(cases, batch, known=known, patch=patch, least=stream.least)
        count, axis = self.recipe.data.slices, self.slice_axis
        some = None
        if count is not None and axis is not None:
            some = tuple(tuple(evenly(self.store.shape(case)[axis], count)) for case in cases)
        return StreamPlan(
            cases,
            batch,
            foreground=self.recipe.data.foreground,
            slices=some,
            patch=patch,
            known=bound.known if bound is not None else 0.0,
            least=stream.least,
        )

    def _in_partitions(self, stage: Stage, stream: Stream, cases: tuple[str, ...], batch: int) -> StreamPlan:
        """Return a stream of one sample per part of a volume.

        Raises:
            RecipeError: There are no volumes, or too few.
        """
        name, parts, volumes = stage.strategy.name, stream.partitions, batch // stream.partitions
        if self.manifest.axes != 3:
            raise RecipeError(
                f"{name}: {self.manifest.name} has single images, which have no parts along an axis of slices; "
                f"give it volumes, or a scheme without partitions"
            )
        long = tuple(i for i in cases if self.places(i) >= parts)
        if len(long) < volumes:
            raise RecipeError(
                f"{name}: a batch of {batch} is {parts} partitions of {volumes} volumes, but only {len(long)} of {len(cases)} "
                f"cases have {parts} places or more along axis {self.through}; lower the batch or the partitions"
            )
        patch = self._whole(long) if self.task.ndim == 2 else None
        return StreamPlan(long, batch, patch=patch, partitions=parts, along=self.through, volumes=stream.volumes)

    @property
    def through(self) -> int:
        """The axis of slices, whatever the network sees."""
        return self.manifest.slice_axis if self.recipe.data.slice_axis is None else self.recipe.data.slice_axis

    def places(self, case: str) -> int:
        """Return in how many places along the axis of slices a sample of the network can lie."""
        own = 1 if self.slice_axis is not None else self.recipe.data.patch[self.through]
        return self.store.shape(case)[self.through] - own + 1

    def too_short(self, stage: Stage) -> dict[int, int]:
        """Return how many cases have fewer places than a stream of a stage wants parts, by the number of parts."""
        strategy: Strategy = registry.made("strategy", stage.strategy)
        counts = {}
        for name, stream in strategy.streams().items():
            if stream.kind == "partitions" and self.manifest.axes == 3:
                _, cases = self._bound_cases(stage, name, stream)
                counts[stream.partitions] = sum(self.places(i) < stream.partitions for i in cases)
        return {parts: count for parts, count in counts.items() if count}

    def _whole(self, cases: Iterable[str]) -> tuple[int, ...]:
        """Return the size in which every one of some images (or slices) lies whole, of lengths that the network takes."""
        axes = [a for a in range(self.manifest.axes) if a != self.slice_axis]
        longest = [max(self.store.shape(case)[a] for case in cases) for a in axes]
        units = [math.gcd(n, MULTIPLE) for n in self.recipe.data.patch]  # the patch is known to fit
        return tuple(math.ceil(n / unit) * unit for n, unit in zip(longest, units, strict=True))

    def bound(self, stage: Stage, index: int, strategy: Strategy) -> frozenset[str]:
        """Return the cases that a stage may read: those its streams are bound to."""
        return frozenset(case for plan in self.plans(stage, index, strategy).values() for case in plan.cases)

    def loader(
        self,
        stage: Stage,
        index: int,
        strategy: Strategy,
        *,
        first: int,
        last: int,
        revision: int,
        rank: int = 0,
        world: int = 1,
    ) -> DataLoader[dict[str, Batch]]:
        """Return the micro-batches of the steps ``first`` … ``last`` of a stage, for one process of ``world``."""
        plans = self.plans(stage, index, strategy)
        bound = frozenset(case for plan in plans.values() for case in plan.cases)
        data = StepData(
            self.store.only(bound),
            self.annotations.only(bound),
            plans,
            first_step=first,
            last_step=last,
            accumulate=self.recipe.trainer.accumulate,
            revision=revision,
            patch=self.recipe.data.patch,
            slice_axis=self.slice_axis,
            augment=stage.augment,
            seed=self.recipe.seed,
            stage=index,
            num_classes=self.task.num_classes,
            priors=self.priors,
            rank=rank,
            world=world,
        )
        return make_loader(data, workers=self.recipe.trainer.workers, pin=device_of(self.recipe).type == "cuda")

    def viewer(self, *networks: nn.Module) -> Viewer:
        """Return how whole cases are looked at, and move the networks that will look to the device of the run.

        Lightning leaves them on the CPU after a fit, and takes them back for the next.
        """
        device = device_of(self.recipe)
        for network in networks:
            network.to(device)
        spec = self.recipe.evaluation
        return Viewer(
            self.store,
            self.task,
            self.recipe.data.patch,
            self.slice_axis,
            overlap=spec.overlap,
            window_batch=spec.window_batch,
            largest_component=spec.largest_component,
            device=device,
        )

    def evaluation_cases(self, role: str) -> list[Case]:
        """Return the cases of the validation or test part."""
        ids = self.split.validation if role == "validation" else self.split.test
        return [self.manifest.case(i) for i in ids]

    def reference(self, case: Case) -> NDArray[np.uint8]:
        """Return the label [*S] that an evaluation case is measured against, on the grid the case came in."""
        with leave_it_out(case):
            return raters.reference(self.dataset, case, self.recipe.data.raters)

    def votes(self, case: str) -> NDArray[np.uint8]:
        """Return what the raters of a labelled case say [R, *S], on the stored grid; IGNORE outside the budget.

        Raises:
            StoreError: The case is not in the budget.
        """
        if case not in self.split.labelled:
            raise StoreError(f"case {case!r} is not in the budget of this run; what its raters say is out of reach")
        return votes_of(self.dataset, self.manifest, self.store, self.recipe.data, case)

    def hidden_label(self, case: str) -> NDArray[np.uint8]:
        """Return the label [*S] of a training case on the stored grid, for an oracle that answers questions.

        Raises:
            StoreError: The case is not one that training may ask about.
        """
        if case not in self.split.labelled + self.split.unlabelled:
            raise StoreError(f"case {case!r} is no training case of this run; its label is out of reach")
        return on_grid(self.dataset.read_label(self.manifest.case(case)), self.store, case)


def device_of(recipe: Recipe) -> torch.device:
    """Return where networks are evaluated: the GPU that the recipe lets training use, or the CPU."""
    gpu = recipe.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def make_backbone(recipe: Recipe, task: Task, seed: int) -> nn.Module:
    """Return the recipe's network with weights that are a function of the seed.

    Raises:
        RecipeError: An option is out of range.
        ShapeError: The network cannot take the patch.
    """
    torch.manual_seed(seed)
    try:
        network: nn.Module = registry.get("backbone", recipe.backbone.name)(task, **recipe.backbone.options)
    except ValueError as error:
        raise RecipeError(f"backbone: {recipe.backbone.name}: {error}") from error
    check_patch(network, task, recipe.data.patch)
    return network

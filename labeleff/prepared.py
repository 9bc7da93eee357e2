"""Everything a run needs that is not trained: split, prepared images, the labels of the budget, the task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from labeleff import registry
from labeleff.backbones.outputs import check_patch
from labeleff.backbones.views import first_of_ensemble
from labeleff.backbones.weights import load_weights, read_weights
from labeleff.batch import IGNORE, Batch, Stream, Task, derive_seed
from labeleff.data import raters
from labeleff.data.annotations import AnnotationStore
from labeleff.data.audit import Audit, audit_labels, check_audit
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role, without
from labeleff.data.module import StepData, check_shares, make_loader
from labeleff.data.noise.base import NoiseModel
from labeleff.data.noise.measure import Achieved
from labeleff.data.priors.base import Known, Prior, as_plain, checked
from labeleff.data.provenance import Provenance, Start, digest, provenance_in, start_from, starts_in
from labeleff.data.sampling import StreamPlan
from labeleff.data.split import Split, evenly, make_split
from labeleff.data.store import ImageStore, leave_it_out
from labeleff.errors import DataError, RecipeError, RunError, SplitError, StoreError, did_you_mean
from labeleff.evaluation.evaluate import Viewer
from labeleff.files import write_json
from labeleff.recipe import Component, Data, Recipe, Stage
from labeleff.runlog import console, progress
from labeleff.strategies.base import Strategy

HIDDEN = "hidden"
"""Folder of a run that keeps the clean labels where label noise was asked for: for diagnostics, never for training."""
MULTIPLE = 32
"""Whole images are padded to multiples of this, or of a divisor where the patch is of smaller ones."""
DEFAULT_CACHE = Path.home() / ".cache" / "labeleff" / "prepared"


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
        batch = stage.batch if bound is None or bound.batch is None else bound.batch
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
        return make_loader(data, workers=self.recipe.trainer.workers)

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
        return _votes(self.dataset, self.manifest, self.store, self.recipe.data, case)

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


def prepare(recipe: Recipe, folder: Path, *, cache: Path | None = None, write: bool = True) -> Prepared:
    """Read the data set, split it, audit it, prepare the images and copy the labels of the budget into the run.

    Args:
        recipe: The run.
        folder: Its directory: gets ``split.json``, ``audit.json``, ``annotations/`` and perhaps ``raters.json``.
        cache: Where prepared images are kept.
        write: False on all but the first process.

    Raises:
        DataError: The data cannot be used as they are.
        SplitError: The budget cannot be met, or roles leak into one another.
    """
    spec = recipe.data
    dataset: DataSet = registry.made("dataset", spec.dataset)
    manifest, left_out = _without(dataset.manifest(), spec.leave_out)
    raters.check_fusion(manifest, spec.raters)
    if spec.noise is not None:
        raters.check_alone(manifest, "data.noise")
    split = make_split(
        manifest,
        labelled=spec.labelled,
        draw=spec.draw,
        validation=spec.validation,
        unlabelled=spec.unlabelled,
        evaluate_on=spec.evaluate_on,
        development=spec.development,
        folds=recipe.evaluation.folds,
        fold=recipe.evaluation.fold or 0,
        foreign=spec.foreign,
        contamination=spec.contamination,
        slices=spec.slices,
        source=spec.source,
        target=spec.target,
        unlabelled_from=spec.unlabelled_from,
    )
    noise = make_noise(spec.noise)
    if noise is not None and spec.drop_noisy:
        split = without_noisy(split, noise)
    ndim = spec.dimensions or manifest.axes
    if not 2 <= ndim <= manifest.axes or len(spec.patch) != ndim:
        raise RecipeError(
            f"data.patch is {list(spec.patch)} for a {ndim}-D network on {manifest.axes}-D cases; give one length per axis "
            "of the network, and data.dimensions 2 or 3 but not more than the data have"
        )
    task = Task(manifest.classes, ndim, manifest.channels, exclusive=not manifest.overlapping)
    if not task.exclusive:
        _check_overlapping(recipe, manifest.name)
    make_backbone(
        recipe, task, 0
    )  # a network that cannot be made, or cannot take the patch, is found before data are read
    ids = split.labelled + split.unlabelled + split.validation + split.test
    with progress("preparing images", quiet=not write) as seen:
        store = ImageStore.prepare(
            dataset,
            [manifest.case(i) for i in ids],
            axes=manifest.axes,
            cache=cache or DEFAULT_CACHE,
            normalise=spec.normalise,
            window=spec.window,
            spacing=spec.spacing,
            processes=None if write else 1,
            say=console().print if write else _say_nothing,
            on_progress=seen,
        )
    audit = check_audit(
        manifest,
        split,
        contents={i: store.content(i) for i in ids},
        images=store,
        adapted=bool(spec.source or spec.target or spec.foreign),
    )
    if write:
        _write_split(folder, split)
    starts = _starts(folder / "starts.json", recipe, split, store, write=write)
    annotations = _annotations(folder / "annotations", dataset, manifest, split, store, spec, write=write)
    audit = audit.with_labels(audit_labels(manifest, split.labelled, annotations.read_given))
    if write:
        write_json(folder / "audit.json", audit.to_dict())
    slice_axis = None
    if ndim != manifest.axes:
        slice_axis = manifest.slice_axis if spec.slice_axis is None else spec.slice_axis
    prepared = Prepared(
        recipe=recipe,
        dataset=dataset,
        manifest=manifest,
        split=split,
        audit=audit,
        store=store,
        annotations=annotations,
        task=task,
        slice_axis=slice_axis,
        starts=starts,
        raters=_raters(folder / "raters.json", dataset, manifest, split, store, spec) if write else None,
        left_out=left_out,
    )
    if spec.prior is not None:
        prepared = _with_priors(prepared, spec.prior, folder / "priors.json", write=write)
    _check_stages(prepared)
    return prepared


def _check_stages(prepared: Prepared) -> None:
    """Raise where a stage cannot draw what it needs: of a later stage, too, that is found before anything is trained."""
    recipe = prepared.recipe
    for where, stages in (("stages", recipe.stages), ("baseline", recipe.baseline)):
        for index, stage in enumerate(stages):
            prepared.held_out(stage)
            if stage.steps:
                plans = prepared.plans(stage, index, registry.made("strategy", stage.strategy))
                world = recipe.trainer.devices * recipe.trainer.nodes
                check_shares(plans, accumulate=recipe.trainer.accumulate, world=world, where=f"{where}.{index}")


def _without(manifest: Manifest, names: Sequence[str]) -> tuple[Manifest, dict[Role, tuple[str, ...]]]:
    try:
        return without(manifest, names)
    except DataError as error:
        raise RecipeError(f"data.leave_out: {error}") from error


def _say_nothing(_: str) -> None:
    """Say nothing."""


def _check_overlapping(recipe: Recipe, name: str) -> None:
    """Raise a :class:`RecipeError` where something in a recipe needs classes that exclude one another."""

    def able(strategy: str) -> bool:
        return bool(getattr(registry.get("strategy", strategy), "supports_regions", False))

    for where, stages in (("stages", recipe.stages), ("baseline", recipe.baseline)):
        for index, stage in enumerate(stages):
            if not able(stage.strategy.name):
                raise RecipeError(
                    f"{where}.{index}.strategy: {stage.strategy.name} needs classes that exclude one another, and those of {name} "
                    f"overlap; strategies that can: {', '.join(filter(able, registry.names('strategy')))}"
                )
            if stage.annotator is not None:
                raise RecipeError(
                    f"{where}.{index}.annotator: {stage.annotator.name} needs classes that exclude one another, and those of "
                    f"{name} overlap; leave it out"
                )
    data = recipe.data
    unable = {"data.noise": data.noise, "data.prior": data.prior, "evaluation.probe": recipe.evaluation.probe}
    for key, value in unable.items():
        if value:
            raise RecipeError(
                f"{key}: needs classes that exclude one another, and those of {name} overlap; leave it out"
            )


def _with_priors(prepared: Prepared, component: Component, path: Path, *, write: bool) -> Prepared:
    """Return what a run needs with the expected sizes of organs in its unlabelled cases, computed once and written down."""
    prior: Prior = registry.made("prior", component)
    if write and not path.exists():
        found = checked(prior.ratios(_visible(prepared)), _visible(prepared))
        write_json(
            path,
            {"prior": {"name": component.name, **component.options}, "mark": prior.mark, "shares": as_plain(found)},
        )
    try:
        shares = json.loads(path.read_text())["shares"]
        priors = {case: np.array(rows, np.float32) for case, rows in shares.items()}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: damaged ({error}); start over with --fresh") from error
    return replace(prepared, priors=priors, prior_mark=prior.mark)


def _visible(prepared: Prepared) -> Known:
    """Return what a prior may look at: labels of the budget, images, and (for those that own up to it) hidden labels."""
    split, store = prepared.split, prepared.store

    def budget() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        return ((case, prepared.annotations.read_given(case)) for case in split.labelled)

    return Known(
        classes=prepared.task.classes,
        cases=split.unlabelled,
        slice_axis=prepared.slice_axis,
        shape=store.shape,
        spacing=store.spacing,
        image=store.read,
        budget=budget,
        truth=prepared.hidden_label,
    )


def _starts(path: Path, recipe: Recipe, split: Split, store: ImageStore, *, write: bool) -> tuple[Start, ...]:
    """Return the files that stages start from, looked at once: a resumed run needs them no more.

    Raises:
        RunError: A file cannot be read, or has learnt from test cases.
    """
    if path.exists():
        try:
            return starts_in(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}); start over with --fresh") from error
    test = [(case, store.content(case)) for case in split.test]
    starts = tuple(
        start_from(index, stage.start, test, allowed=stage.start_overlap == "allow")
        for index, stage in enumerate(recipe.stages)
        if stage.start not in ("previous", "fresh")
    )
    if starts and write:
        write_json(path, [start.as_plain() for start in starts])
    return starts


def _write_split(folder: Path, split: Split) -> None:
    """Write the split; a folder that holds another one belongs to other data.

    Raises:
        RunError: The data set has changed since the run began.
    """
    path = folder / "split.json"
    if path.exists() and (found := json.loads(path.read_text()).get("hash")) != split.hash:
        raise RunError(
            f"{path}: the split was {found} and is now {split.hash}: the data set has changed since the run began; "
            "restore it, or start over with --fresh"
        )
    write_json(path, {"hash": split.hash, **split.to_dict()})


@overload
def make_noise(noise: Component) -> NoiseModel: ...
@overload
def make_noise(noise: Component | None) -> NoiseModel | None: ...
def make_noise(noise: Component | None) -> NoiseModel | None:
    """Return the label-noise model that a recipe names."""
    if noise is None:
        return None
    model: NoiseModel = registry.made("noise", noise)
    return model


def without_noisy(split: Split, noise: NoiseModel) -> Split:
    """Return a split in which the cases that the noise touches are unlabelled.

    Raises:
        SplitError: None is left.
    """
    kept = tuple(i for i in split.labelled if not noise.touches(i))
    gone = tuple(i for i in split.labelled if noise.touches(i))
    if not kept:
        raise SplitError("data.drop_noisy: the noise touches every labelled case; lower data.noise.share")
    note = f"{len(gone)} of {len(split.labelled)} labelled cases have wrong labels and are used without them"
    return replace(split, labelled=kept, unlabelled=split.unlabelled + gone, notes=(*split.notes, note))


def _annotations(
    folder: Path,
    dataset: DataSet,
    manifest: Manifest,
    split: Split,
    store: ImageStore,
    spec: Data,
    *,
    write: bool,
) -> AnnotationStore:
    """Open the run's labels, or make them from those of the labelled cases: no other label file is touched."""
    if (folder / "current").exists() or not write:
        return AnnotationStore.open(folder)
    shapes = {i: store.shape(i) for i in split.labelled + split.unlabelled}
    known = partial(_known, manifest, store, spec)
    if spec.noise is None:
        votes = partial(_votes, dataset, manifest, store, spec)
        labels = ((i, raters.fuse(votes(i), spec.raters, case=i, draw=spec.draw)) for i in split.labelled)
        kept = [i for i in split.labelled if spec.raters == "soft" and manifest.case(i).raters]
        return AnnotationStore.create(folder, shapes, labels, ((i, votes(i)) for i in kept))
    clean = ((i, known(i, dataset.read_label(manifest.case(i)))) for i in split.labelled)
    AnnotationStore.create(folder.parent / HIDDEN, shapes, clean)
    achieved = Achieved(manifest.classes)
    noisy = _corrupted(make_noise(spec.noise), dataset, manifest, split, achieved)
    annotations = AnnotationStore.create(folder, shapes, ((i, known(i, label)) for i, label in noisy))
    model = {"name": spec.noise.name, **spec.noise.options}
    found = {"model": model, "labels_sha256": annotations.digest(), **achieved.summary()}
    write_json(folder.parent / "noise.json", found)
    return annotations


def _corrupted(
    noise: NoiseModel, dataset: DataSet, manifest: Manifest, split: Split, achieved: Achieved
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the labelled cases with labels made wrong, and count what that did."""
    for case in map(manifest.case, split.labelled):
        with leave_it_out(case):
            clean = dataset.read_label(case)
        found = noise.corrupt(
            clean, case=case.id, names=manifest.classes, spacing=case.spacing, slice_axis=manifest.slice_axis
        )
        achieved.add(case.id, clean, found.label, spacing=case.spacing, strength=found.strength)
        yield case.id, found.label


def _known(manifest: Manifest, store: ImageStore, spec: Data, case: str, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a label on the stored grid; slices outside the budget are IGNORE."""
    found = on_grid(label, store, case)
    if spec.slices is None or manifest.axes != 3:
        return found
    return only_slices(found, manifest.slice_axis if spec.slice_axis is None else spec.slice_axis, spec.slices)


def _votes(dataset: DataSet, manifest: Manifest, store: ImageStore, spec: Data, case: str) -> NDArray[np.uint8]:
    """Return what the raters of a case say [R, *S], on the stored grid; slices outside the budget are IGNORE."""
    with leave_it_out(manifest.case(case)):
        votes = dataset.read_votes(manifest.case(case))
    return np.stack([_known(manifest, store, spec, case, label) for label in votes])


def _raters(
    path: Path, dataset: DataSet, manifest: Manifest, split: Split, store: ImageStore, spec: Data
) -> dict[str, Any] | None:
    """Return how far the raters of the labelled cases agree, written to ``raters.json`` once; None without any."""
    several = [i for i in split.labelled if len(manifest.case(i).raters) > 1]
    if not several:
        return None
    if not path.exists():
        votes = ((i, _votes(dataset, manifest, store, spec, i)) for i in several)
        write_json(path, raters.record(votes, manifest.classes, spec.raters))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def only_slices(label: NDArray[np.uint8], axis: int, count: int) -> NDArray[np.uint8]:
    """Return a label of which only some slices, evenly spread along an axis, are known."""
    kept = np.full_like(label, IGNORE)
    window: list[Any] = [slice(None)] * label.ndim
    window[axis] = evenly(label.shape[axis], count)
    kept[tuple(window)] = label[tuple(window)]
    return kept


def on_grid(label: NDArray[np.uint8], store: ImageStore, case: str) -> NDArray[np.uint8]:
    """Return a label [*S] on the grid of the prepared image, by nearest neighbour.

    Raises:
        DataError: The label does not fit the image it came with.
    """
    if label.shape != tuple(store.original_shape(case)):
        raise DataError(
            f"case {case!r}: the label has shape {label.shape}, the image {tuple(store.original_shape(case))}"
        )
    return nearest(label, tuple(store.shape(case)))


def nearest(label: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a label [*S] on another grid of the same extent, by nearest neighbour."""
    if label.shape == shape:
        return label
    index = [
        np.minimum((np.arange(n) + 0.5) * old / n, old - 1).astype(int)
        for n, old in zip(shape, label.shape, strict=True)
    ]
    return label[np.ix_(*index)]


def describe(prepared: Prepared) -> dict[str, Any]:
    """Return counts for the terminal and the summary."""
    split = prepared.split

    def patients(ids: tuple[str, ...]) -> int:
        return len({prepared.manifest.case(i).patient for i in ids})

    return {
        "dataset": prepared.manifest.name,
        "classes": list(prepared.task.classes),
        "split": split.hash,
        "labelled_patients": patients(split.labelled),
        "unlabelled_patients": patients(split.unlabelled),
        "validation_patients": patients(split.validation),
        "test_patients": patients(split.test),
        "evaluated_on": split.evaluate_on,
        "audit": prepared.audit.verdict,
        **({"left_out": {role: list(names) for role, names in prepared.left_out.items()}} if prepared.left_out else {}),
        "notes": [
            *_left_out_notes(prepared),
            *_window_notes(prepared),
            *split.notes,
            *([prepared.prior_mark] if prepared.prior_mark else []),
            *(start.note for start in prepared.starts if start.note),
            *_rater_notes(prepared),
            *_query_notes(prepared.recipe),
            *_partition_notes(prepared),
            *prepared.audit.warnings,
        ],
    }


def _left_out_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which cases the run does without; those of the test are missing from its result."""
    for role, names in prepared.left_out.items():
        every = len(names) + len(prepared.manifest.of_role(role))
        text = f"data.leave_out: {len(names)} of {every} {role} cases are left out ({', '.join(names)})"
        yield f"{text}: the result is of the others alone" if role == "test" else text


def _window_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which images a window leaves nothing of."""
    window, flat = prepared.recipe.data.window, prepared.store.constant()
    if window is not None and flat:
        more = ", …" if len(flat) > 5 else ""
        yield (
            f"data.window: {len(flat)} of {len(prepared.store.ids)} images are constant in [{window[0]:g}, {window[1]:g}] "
            f"({', '.join(flat[:5])}{more}): are they in other units?"
        )


def _query_notes(recipe: Recipe) -> Iterator[str]:
    """Yield what a reader must know of who was asked for labels."""
    for index, stage in enumerate(recipe.stages):
        if stage.annotator is None or stage.answers == "nobody":
            continue
        if registry.get("annotator", stage.annotator.name).oracle:  # type: ignore[attr-defined]  # a class of annotators
            yield f"stages.{index}: {stage.annotator.name} chose what to ask by the hidden labels: a bound, not a result"
        if stage.answers == "oracle":
            yield f"stages.{index}: questions were answered from hidden labels of training cases: a simulation of people"


def _partition_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which cases a stage cannot cut into parts."""
    for index, stage in enumerate(prepared.recipe.stages):
        for parts, count in prepared.too_short(stage).items():
            yield f"stages.{index}: {count} cases have fewer than {parts} places along axis {prepared.through} and are left out"


def _rater_notes(prepared: Prepared) -> Iterator[str]:
    """Yield what a reader must know of cases with several raters."""
    how = prepared.recipe.data.raters
    if prepared.raters is not None:
        yield raters.in_words(prepared.raters)
    if how == "soft":
        for index, stage in enumerate(prepared.recipe.stages):
            strategy: Strategy = registry.made("strategy", stage.strategy)
            if not strategy.soft_labels:
                yield f"stages.{index}: {stage.strategy.name} as set does not learn from soft labels, but from the majority"
    if any(case.label is None for case in prepared.evaluation_cases("test")):
        yield f"evaluated against {'STAPLE' if how == 'staple' else 'the majority'} of the raters where there is no consensus"

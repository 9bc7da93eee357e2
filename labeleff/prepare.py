"""From a recipe to what a run needs: data set, split, audit, prepared images and the labels of the budget."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff import registry
from labeleff.batch import Task
from labeleff.data import raters
from labeleff.data.audit import audit_labels, check_audit
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role, without
from labeleff.data.module import check_shares
from labeleff.data.priors.base import Known, Prior, as_plain, checked
from labeleff.data.provenance import Start, start_from, starts_in
from labeleff.data.split import Split, make_split
from labeleff.data.store import ImageStore
from labeleff.errors import DataError, RecipeError, RunError
from labeleff.files import write_json
from labeleff.labels import agreement, budget_labels, make_noise, without_noisy
from labeleff.prepared import Prepared, make_backbone
from labeleff.recipe import Component, Data, Recipe
from labeleff.runlog import console, progress

DEFAULT_CACHE = Path.home() / ".cache" / "labeleff" / "prepared"


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
        store = prepared_images(
            spec,
            dataset,
            [manifest.case(i) for i in ids],
            axes=manifest.axes,
            cache=cache,
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
    annotations = budget_labels(folder / "annotations", dataset, manifest, split, store, spec, write=write)
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
        raters=agreement(folder / "raters.json", dataset, manifest, split, store, spec) if write else None,
        left_out=left_out,
    )
    if spec.prior is not None:
        prepared = _with_priors(prepared, spec.prior, folder / "priors.json", write=write)
    _check_stages(prepared)
    return prepared


def prepared_images(
    spec: Data, dataset: DataSet, cases: Sequence[Case], *, axes: int, cache: Path | None, **how: Any
) -> ImageStore:
    """Return the images of cases as a recipe's data have them prepared: what trains and what is compared with a run see the same.

    Args:
        spec: The recipe's data.
        dataset: Reads them.
        cases: To be read.
        axes: Of a case.
        cache: Where prepared images are kept; None: where they usually are.
        how: ``processes``, ``say`` and ``on_progress`` of :meth:`ImageStore.prepare`.
    """
    return ImageStore.prepare(
        dataset,
        cases,
        axes=axes,
        cache=cache or DEFAULT_CACHE,
        normalise=spec.normalise,
        window=spec.window,
        spacing=spec.spacing,
        **how,
    )


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

"""From a benchmark to its runs: one recipe each, on equal terms, named and keyed by what matters to the result."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from labeleff import __version__, registry
from labeleff.data.augment import Augment
from labeleff.errors import RecipeError
from labeleff.recipe import Component, Evaluation, Recipe, Stage, Trainer
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.sweep.benchmark import Benchmark, DataChoice, method_file

TERMS = ("backbone", "augmentation", "steps", "labelled images per step", "data", "evaluation")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        name: Its folder.
        key: Hash of what matters to its result.
        dataset: Name of the data set in the benchmark.
        method: Name of the method.
        labelled: Label budget as written.
        draw: Draw of labelled patients.
        seed: Number of the training seed.
        fold: Fold of a cross-validation, or None.
        axes: Values of the further keys.
        recipe: What is run.
    """

    name: str
    key: str
    dataset: str
    method: str
    labelled: str
    draw: int
    seed: int
    fold: int | None
    axes: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """All runs of a benchmark, and the terms on which its methods differ."""

    jobs: tuple[Job, ...]
    deviations: tuple[str, ...]


def result_key(recipe: Recipe) -> str:
    """Return 12 hex digits of a hash of what matters to a result: not its name, nor how it is logged or drawn.

    Values that are the defaults do not enter, so that a new option leaves the keys of earlier results as they are. (A changed
    default comes with a new version, which does enter.)
    """
    return key_of(told(plain_ways(recipe)))


def key_of(*parts: Any) -> str:
    """Return 12 hex digits of a hash of plain values and of the version."""
    text = json.dumps([__version__, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_ways(recipe: Recipe) -> Recipe:
    """Return the recipe with the usual values in place of all that leaves its result as it is."""
    usual, found = Trainer(), recipe.trainer
    trainer = replace(found, workers=usual.workers, checkpoint_every=usual.checkpoint_every, log_every=usual.log_every)
    looks = Evaluation()
    evaluation = replace(
        recipe.evaluation,
        pictures=looks.pictures,
        diagnose=looks.diagnose,
        diagnose_cases=looks.diagnose_cases,
        probe=looks.probe,
        probe_level=looks.probe_level,
        probe_layers=looks.probe_layers,
    )
    return replace(recipe, name="", trainer=trainer, evaluation=evaluation)


def told(value: Any, kind: str = "") -> Any:
    """Return plain values of which those that are the defaults are left out."""
    if isinstance(value, Component):
        known = registry.options(registry.get(kind, value.name))  # type: ignore[arg-type]  # the field is called as its kind
        own = {k: v for k, v in value.options.items() if known[k].required or v != known[k].default}
        return [value.name, {k: told(v, kind) for k, v in own.items()}]  # a component within is of the same kind
    if is_dataclass(value):
        usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        return {key: told(item, key) for key, item in own.items() if item != usual[key]}
    if isinstance(value, Mapping):
        return {key: told(item, kind) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [told(item) for item in value]
    return value


def expand(benchmark: Benchmark, chosen: Mapping[str, Sequence[str]] | None = None) -> Grid:
    """Return the runs of a benchmark, ordered so that an early stop leaves whole comparisons: draw by draw.

    Args:
        benchmark: What is compared.
        chosen: Settings that tuning chose, by ``dataset/method``.

    Raises:
        RecipeError: A recipe is not valid, or methods differ on terms that the benchmark does not allow.
    """
    jobs: dict[str, Job] = {}
    datasets = benchmark.datasets or {"": DataChoice()}
    for seed, draw in itertools.product(range(benchmark.seeds), benchmark.draws):
        for dataset, choice in datasets.items():
            for method in benchmark.methods:
                for job in _cells(benchmark, dataset, choice, method, draw, seed, chosen or {}):
                    jobs.setdefault(job.key, job)
    deviations = _deviations(benchmark, list(jobs.values()))
    return Grid(tuple(jobs.values()), deviations)


def _cells(
    benchmark: Benchmark,
    dataset: str,
    choice: DataChoice,
    method: str,
    draw: int,
    seed: int,
    chosen: Mapping[str, Sequence[str]],
) -> Iterator[Job]:
    """Yield the runs of one method at one draw and seed: every budget, value of an axis, and fold."""
    spec = benchmark.methods[method]
    if spec.draws is not None and draw not in benchmark.draws[: spec.draws]:
        return
    settings = [*benchmark.set, *choice.set, *spec.set, *chosen.get(f"{dataset}/{method}", ())]
    for labelled in spec.labelled or choice.labelled or benchmark.labelled:
        axes = [
            [(axis.key, value) for value in axis.values]
            for axis in benchmark.axes
            if (not axis.methods or method in axis.methods)
            and (not axis.labelled or str(labelled) in map(str, axis.labelled))
        ]
        for values in itertools.product(*axes):
            recipe = method_recipe(
                benchmark,
                choice,
                method,
                [
                    *settings,
                    f"data.labelled={labelled}",
                    f"data.draw={draw}",
                    f"seed={1000 * seed + draw}",
                    *(f"{key}={json.dumps(value)}" for key, value in values),
                ],
            )
            for fold in range(recipe.evaluation.folds) if recipe.evaluation.folds else [None]:
                yield _job(recipe, dataset, method, str(labelled), draw, seed, fold, dict(values))


def method_recipe(benchmark: Benchmark, choice: DataChoice, method: str, settings: Sequence[str]) -> Recipe:
    """Return the recipe of a method: the base with the method's stages and these settings.

    Raises:
        RecipeError: It is not valid.
    """
    stages = method_file(method, benchmark.methods[method])
    try:
        recipe = load_recipe(choice.base or benchmark.base, ["baseline=[]", f"stages={stages}", *settings])
    except RecipeError as error:
        raise RecipeError(f"method {method}: {error}") from error
    return recipe if benchmark.steps is None else replace(recipe, stages=rescaled(recipe.stages, benchmark.steps))


def rescaled(stages: Sequence[Stage], steps: int) -> tuple[Stage, ...]:
    """Return stages that take so many steps in all, each in proportion, with the revisions and warm-up in them."""
    before = total_steps(stages)
    if before in (0, steps):
        return tuple(stages)
    lengths: list[int] = []
    for stage in stages[:-1]:
        parts = _networks(stage)
        lengths.append(max(1, round(steps * stage.steps / before)) * parts if stage.steps else 0)
    lengths.append(max(0, steps - sum(lengths)))
    return tuple(
        replace(
            stage,
            steps=length // _networks(stage),
            revise_every=max(1, round(stage.revise_every * steps / before)) if stage.revise_every else 0,
            schedule=replace(stage.schedule, every=max(1, round(stage.schedule.every * steps / before))),
        )
        for stage, length in zip(stages, lengths, strict=True)
    )


def total_steps(stages: Sequence[Stage]) -> int:
    """Return the optimiser steps of all stages, those of every network of a stage with folds counted."""
    return sum(stage.steps * _networks(stage) for stage in stages)


def _networks(stage: Stage) -> int:
    return stage.folds if stage.folds and stage.fold is None else 1


def _job(
    recipe: Recipe,
    dataset: str,
    method: str,
    labelled: str,
    draw: int,
    seed: int,
    fold: int | None,
    axes: dict[str, Any],
) -> Job:
    if fold is not None:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, fold=fold))
    key = result_key(recipe)
    parts = [dataset, method, f"n{labelled}", f"d{draw}", f"s{seed}", "" if fold is None else f"f{fold}", key]
    name = "-".join(part for part in parts if part).replace(":", "_")
    return Job(name, key, dataset, method, labelled, draw, seed, fold, axes, replace(recipe, name=name))


# -- equal terms --------------------------------------------------------------------------------------------------------


def terms(recipe: Recipe) -> dict[str, Any]:
    """Return what methods must have in common for their scores to be compared."""
    plain = to_mapping(recipe)
    data = {k: v for k, v in plain["data"].items() if k != "unlabelled"}
    return {
        "backbone": plain["backbone"],
        "augmentation": " | ".join(sorted({_in_words(stage.augment) for stage in recipe.stages})),
        "steps": total_steps(recipe.stages),
        "labelled images per step": sorted({n for stage in recipe.stages if (n := labelled_images(stage))}),
        "data": data,
        "evaluation": plain["evaluation"],
    }


def _in_words(augment: Augment) -> str:
    """Return the settings that are not the usual ones, as ``rotate 20, scale 0.15``."""
    return ", ".join(f"{key} {value}" for key, value in told(augment).items()) or "none"


def labelled_images(stage: Stage) -> int:
    """Return how many labelled samples an optimiser step of a stage draws."""
    streams = registry.made("strategy", stage.strategy).streams()
    count = 0
    for name, stream in streams.items():
        bound = stage.streams.get(name)
        if ((bound.role if bound else None) or stream.role) == "labelled":
            count += stage.batch_of(name)
    return count


def _deviations(benchmark: Benchmark, jobs: Sequence[Job]) -> tuple[str, ...]:
    """Return the terms on which methods differ from the baseline.

    Raises:
        RecipeError: One of them is not allowed.
    """

    def place(job: Job) -> tuple[Any, ...]:
        own = {axis.key for axis in benchmark.axes if axis.methods}
        axes = tuple(sorted((k, str(v)) for k, v in job.axes.items() if k not in own))
        return (job.dataset, job.labelled, job.draw, job.seed, job.fold, axes)

    baselines = {place(job): terms(job.recipe) for job in jobs if job.method == benchmark.baseline}
    found: dict[str, None] = {}
    for job in jobs:
        reference = baselines.get(place(job))
        if reference is None or job.method == benchmark.baseline:
            continue
        own = terms(job.recipe)
        for term in TERMS:
            if own[term] != reference[term]:
                said = _difference(term, own[term], reference[term])
                if term not in benchmark.allow:
                    raise RecipeError(
                        f"{benchmark.name}: {job.method} and {benchmark.baseline} are not on equal terms: {said}; make them "
                        f"equal, or write allow: [{term}] and the report will say so"
                    )
                found[f"{job.method}: {said}"] = None
    return tuple(found)


def _difference(term: str, own: Any, other: Any) -> str:
    if isinstance(own, dict):
        keys = [key for key in {**own, **other} if own.get(key) != other.get(key)]
        return f"{term} differs in " + ", ".join(f"{key} ({own.get(key)} instead of {other.get(key)})" for key in keys)
    return f"{term} {own} instead of {other}"

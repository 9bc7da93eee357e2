"""Benchmark files: which methods are compared, at how many labels, over which draws, and what they must have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from labeleff.convert import from_mapping
from labeleff.errors import RecipeError, did_you_mean
from labeleff.recipe_io import method_names, read_plain

Term = Literal["backbone", "augmentation", "steps", "labelled images per step", "data", "evaluation"]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        stages: List of stages; null: ``methods/NAME``.
        set: Changes to its recipe, ``key=value``.
        labelled: Its label budgets, where they are not those of the benchmark.
        draws: How many of the benchmark's draws it runs; null: all.
    """

    stages: str | None = None
    set: tuple[str, ...] = ()
    labelled: tuple[int | float | str, ...] | None = None
    draws: int | None = None


@dataclass(frozen=True)
class DataChoice:
    """One data set of the comparison.

    Args:
        base: Recipe that gives data, backbone, trainer and evaluation; null: the benchmark's.
        set: Changes to it.
        labelled: Label budgets on this data set, where they are not those of the benchmark.
    """

    base: str | None = None
    set: tuple[str, ...] = ()
    labelled: tuple[int | float | str, ...] | None = None


@dataclass(frozen=True)
class Axis:
    """A further recipe key that is varied.

    Args:
        key: Dotted key.
        values: Its values.
        methods: Only for these methods; the others keep their own value. Empty: for all.
        labelled: Only at these budgets. Empty: at all.
    """

    key: str
    values: tuple[Any, ...]
    methods: tuple[str, ...] = ()
    labelled: tuple[int | float | str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A number from a paper, shown beside ours and never a target.

    Args:
        method: As the paper names it.
        labelled: Labelled patients.
        dice: As printed there, as a share.
        source: Where it is printed.
        selection: How the weights were chosen there.
    """

    method: str
    labelled: int
    dice: float
    source: str
    selection: str


@dataclass(frozen=True)
class Tuning:
    """Choosing settings on development patients, which no claim is made on, with as many trials for every method.

    Args:
        trials: Settings tried per method; the first is the method as it stands.
        labelled: Budget of the trials.
        draw: Label draw of the trials.
        development: Development patients, cut from the training list.
        space: Values to try by method, then by recipe key.
    """

    trials: int
    labelled: int
    development: int
    space: Mapping[str, Mapping[str, tuple[Any, ...]]]
    draw: int = 10_000


@dataclass(frozen=True)
class Benchmark:
    """A sweep: every method at every budget, draw and seed, on every data set, all else equal.

    Args:
        name: Name; becomes a folder.
        base: Recipe that gives data, backbone, trainer and evaluation. Its stages are replaced by each method's.
        methods: Names of ``methods/NAME``, or names with changes; ``all``: every shipped method.
        baseline: What the others are compared with.
        labelled: Label budgets, as in ``data.labelled``.
        draws: Number of draws of labelled patients, or their numbers.
        seeds: Training seeds per draw.
        steps: Optimiser steps of every method, its stages shortened or lengthened in proportion; null: as they stand.
        datasets: Data sets by name; empty: the base's.
        axes: Further keys that are varied.
        set: Changes for all.
        allow: Terms on which methods may differ; the report says so. All others must be equal.
        references: Methods that know what the others may not (clean labels, true sizes): in every table, but never the answer.
        tuning: Choose settings first.
        published: Numbers of papers.
        note: Shown in the report.
    """

    name: str
    base: str
    methods: Mapping[str, Method]
    labelled: tuple[int | float | str, ...]
    baseline: str = "supervised"
    draws: tuple[int, ...] = (0, 1, 2)
    seeds: int = 1
    steps: int | None = None
    datasets: Mapping[str, DataChoice] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    set: tuple[str, ...] = ()
    allow: tuple[Term, ...] = ()
    references: tuple[str, ...] = ()
    tuning: Tuning | None = None
    published: tuple[Published, ...] = ()
    note: str = ""


def benchmark_folder() -> Path:
    """Return the folder of the benchmarks that came with the package (or stand beside it in a checkout)."""
    inside = Path(__file__).parent.parent / "benchmarks"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "benchmarks" / "suites"


def benchmark_names() -> list[str]:
    """Return the names of the shipped benchmarks."""
    return sorted(path.stem for path in benchmark_folder().glob("*.yaml"))


def find_benchmark(source: str | Path) -> Path:
    """Return the file of a benchmark given by path, or by the name of a shipped one.

    Raises:
        RecipeError: There is none.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"{path}: no such benchmark file")
        return path
    names = benchmark_names()
    if str(source) in names:
        return benchmark_folder() / f"{source}.yaml"
    raise RecipeError(
        f"unknown benchmark {str(source)!r}.{did_you_mean(str(source), names)} Shipped: {', '.join(names)}; or give a .yaml file"
    )


def load_benchmark(source: str | Path, overrides: Sequence[str] = ()) -> Benchmark:
    """Return a checked benchmark.

    Args:
        source: A file, or the name of a shipped benchmark.
        overrides: ``key=value`` on keys of the benchmark (``labelled=[4]``), or of every run's recipe
            (``trainer.accelerator=gpu``).

    Raises:
        RecipeError: Anything is wrong; one line that names the key.
    """
    path = find_benchmark(source)
    own = tuple(Benchmark.__dataclass_fields__)
    mine = [text for text in overrides if re.split(r"[.=]", text, maxsplit=1)[0] in own]
    others = [text for text in overrides if text not in mine]
    try:
        plain = read_plain(path, mine)
        plain["set"] = [*plain.get("set", []), *others]
        return parse_benchmark(_beside(plain, path.parent))
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {str(error).removeprefix(f'{path}: ')}") from error


def _beside(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return values in which recipe files are found from the benchmark's folder, not from the current one."""

    def found(base: Any) -> Any:
        is_file = isinstance(base, str) and base.endswith((".yaml", ".yml"))
        return str((folder / base).resolve()) if is_file else base

    datasets = plain.get("datasets")
    if isinstance(datasets, Mapping):
        choices = {
            k: {**v, "base": found(v["base"])} if isinstance(v, Mapping) and "base" in v else v
            for k, v in datasets.items()
        }
        plain = {**plain, "datasets": choices}
    return {**plain, "base": found(plain.get("base"))} if "base" in plain else plain


def parse_benchmark(plain: Mapping[str, Any]) -> Benchmark:
    """Return a benchmark from plain values, in which methods may be a list and draws a number.

    Raises:
        RecipeError: Anything is wrong.
    """
    values = dict(plain)
    methods = values.get("methods")
    if methods == "all":
        methods = method_names()
    if isinstance(methods, list):
        methods = {str(name): {} for name in methods}
    if isinstance(methods, Mapping):
        values["methods"] = {name: {} if options is None else options for name, options in methods.items()}
    if isinstance(values.get("draws"), int):
        values["draws"] = list(range(values["draws"]))
    found = from_mapping(Benchmark, values, "")
    _check(found)
    return found


def _check(found: Benchmark) -> None:
    for name in (found.name, *found.methods, *found.datasets):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"{name!r} becomes part of folder names; use letters, digits, '_', '-' and '.'")
    _known(found, "baseline", [found.baseline])
    _known(found, "references", found.references)
    if not found.labelled or not found.draws or found.seeds < 1 or (found.steps is not None and found.steps < 1):
        raise RecipeError("labelled, draws, seeds, steps: at least one of each is needed")
    for key, values in (("draws", found.draws), ("labelled", tuple(map(str, found.labelled)))):
        if len(set(values)) < len(values):
            raise RecipeError(f"{key}: {list(values)} names the same one twice")
    _check_settings({"set": found.set})
    _check_settings({f"methods.{name}.set": method.set for name, method in found.methods.items()})
    _check_settings({f"datasets.{name}.set": choice.set for name, choice in found.datasets.items()})
    for axis in found.axes:
        _known(found, f"axes: {axis.key}", axis.methods)
        if not axis.values:
            raise RecipeError(f"axes: {axis.key}: at least one value is needed")
    if found.tuning is not None:
        _known(found, "tuning.space", found.tuning.space)
        if found.tuning.trials < 1 or found.tuning.development < 1:
            raise RecipeError("tuning: trials and development must be at least 1")


GRID = {"data.labelled": "labelled (a method may have its own)", "data.draw": "draws", "seed": "seeds and draws"}


def _check_settings(found: Mapping[str, Iterable[str]]) -> None:
    """Raise a :class:`RecipeError` where a setting is one that the grid makes, and would write over."""
    for where, settings in found.items():
        for key in (text.partition("=")[0].strip() for text in settings):
            if key in GRID:
                raise RecipeError(
                    f"{where}: {key} is what the sweep sets in every run, so that this would be lost; use {GRID[key]}"
                )


def _known(found: Benchmark, where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in found.methods:
            raise RecipeError(
                f"{where}: {name!r} is none of the methods.{did_you_mean(name, found.methods)} "
                f"They are: {', '.join(found.methods)}"
            )


def method_file(name: str, method: Method) -> str:
    """Return the reference of a method's list of stages."""
    return method.stages or f"methods/{name}"

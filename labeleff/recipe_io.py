"""Reading, checking and writing recipes. Everything is checked before any data is read.

A recipe from a stranger cannot run code: YAML is read by a safe loader, components are looked up by registered name, and
the only interpolation is the plain reference ``${a.b}`` to another key of the same recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from labeleff import registry
from labeleff.convert import convert, from_mapping
from labeleff.errors import RecipeError, did_you_mean, one_line
from labeleff.recipe import Component, Data, Recipe, Stage

LARGEST_FILE = 1 << 20
_COMPONENTS = ("dataset", "backbone", "strategy", "annotator", "noise", "prior")
_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")


def recipe_folder() -> Path:
    """Return the folder of the recipes that came with the package (or stand beside it in a checkout)."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = recipe_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("methods/"))


def method_names() -> list[str]:
    """Return the names of the shipped methods: lists of stages that a sweep compares."""
    return sorted(path.stem for path in (recipe_folder() / "methods").glob("*.yaml"))


def read_plain(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain values of a YAML file with overrides, references filled in.

    Raises:
        RecipeError: It is not readable, or holds more than plain values.
    """
    plain = _read(path)
    for override in overrides:
        _override(plain, override, path.parent)
    return _resolved(plain)


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe given by path, or by the name of a shipped one.

    Raises:
        RecipeError: There is none.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        return path
    shipped = recipe_folder() / f"{source}.yaml"
    if ".." not in path.parts and not path.is_absolute() and shipped.is_file():
        return shipped
    names = recipe_names()
    raise RecipeError(
        f"unknown recipe {str(source)!r}.{did_you_mean(str(source), names)} Shipped: {', '.join(names)}; or give a .yaml file"
    )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return a checked recipe with every default filled in.

    Args:
        source: A file, the name of a shipped recipe, or plain values.
        overrides: ``key=value`` with dotted keys, list positions as numbers: ``stages.0.steps=200``.

    Raises:
        RecipeError: Anything is wrong; one line that names the key and, where there is one, the likely meaning.
    """
    if isinstance(source, Mapping):
        name, plain, folder = "recipe", _plain(dict(source)), None
    else:
        path = find_recipe(source)
        name, plain, folder = path.name, _read(path), path.parent
    try:
        for key in ("stages", "baseline"):
            if isinstance(plain.get(key), str):
                plain[key] = _method(plain[key], folder)
        for override in overrides:
            _override(plain, override, folder)
        return check_recipe(from_mapping(Recipe, _resolved(plain), ""))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error


def load_component(kind: registry.Kind, name: str, overrides: Sequence[str] = ()) -> Component:
    """Return a checked component by name and ``option=value``, every default filled in.

    Raises:
        RecipeError: The name or an option is unknown, has the wrong type or is out of range.
    """
    plain: dict[str, Any] = {"name": name}
    for override in overrides:
        _override(plain, override, None)
    return _completed(kind, convert(_resolved(plain), Component, kind), kind)


# -- reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """Return the plain values of a YAML file, references unresolved."""
    if path.stat().st_size > LARGEST_FILE:
        raise RecipeError(f"{path}: larger than 1 MiB; this is no recipe")
    try:
        return _plain(path.read_text())
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "unknown place"
        problem = str(error.problem)
        if "expansion" in problem:  # omegaconf's words name a way around
            problem = "its references stand for more than 10,000 values; this is no recipe"
        raise RecipeError(f"{path}: not valid YAML at {place}: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise RecipeError(f"{path}: not a readable recipe ({one_line(error)})") from error


def _plain(content: str | dict[str, Any]) -> dict[str, Any]:
    """Return plain values, references unresolved. Text that was read before is not parsed again: sweeps repeat theirs."""
    return deepcopy(_parsed(content)) if isinstance(content, str) else _contained(content)


@lru_cache(maxsize=256)
def _parsed(text: str) -> dict[str, Any]:
    return _contained(text)


def _contained(content: str | dict[str, Any]) -> dict[str, Any]:
    found = OmegaConf.create(content)
    if not OmegaConf.is_dict(found):
        raise RecipeError("the top level of a recipe is a mapping of keys to values")
    plain: dict[str, Any] = OmegaConf.to_container(found, resolve=False)  # type: ignore[assignment]  # checked above
    return plain


def _method(reference: str, folder: Path | None) -> Any:
    """Return the list of stages in ``methods/NAME.yaml``, from beside the recipe or from the shipped ones."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", reference):
        raise RecipeError(f"stages: {reference!r} is no reference to a list of stages; write methods/NAME")
    for place in (folder, recipe_folder()):
        if place is not None and (path := place / f"{reference}.yaml").is_file():
            return _read(path).get("stages")
    known = [f"methods/{name}" for name in method_names()]
    raise RecipeError(f"stages: there is no {reference!r}.{did_you_mean(reference, known)} Known: {', '.join(known)}")


def _override(plain: dict[str, Any], override: str, folder: Path | None) -> None:
    """Set one dotted key; every step of the path but the last must exist, and positions must be in the list."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"override {override!r}: write key=value, such as stages.0.steps=200")
    try:
        value = _plain(f"value: {text}" if text else "value: null")["value"]
    except (yaml.YAMLError, OmegaConfBaseException, RecipeError) as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from error
    here: Any = plain
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        here = _below(here, part, ".".join(path[: depth + 1]))
    if isinstance(here, list):
        here[_position(here, last, key)] = value
    else:
        here[last] = value
    if key in ("stages", "baseline") and isinstance(value, str):
        plain[key] = _method(value, folder)


def _below(here: Any, part: str, where: str) -> Any:
    """Return the mapping or list at a key; a component given by its bare name becomes a mapping that options can join."""
    key: Any = _position(here, part, where) if isinstance(here, list) else part
    found = here.get(key) if isinstance(here, dict) else here[key]
    if found is None or (isinstance(found, str) and part in _COMPONENTS):
        here[key] = found = {} if found is None else {"name": found}
    if not isinstance(found, dict | list):
        raise RecipeError(f"override: {where} is the single value {found!r}; there is nothing below it")
    return found


def _position(here: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(here):
        raise RecipeError(f"override: {where}: the list has the positions 0 … {len(here) - 1}")
    return int(part)


def _resolved(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the values with plain references filled in; any other interpolation is refused."""
    references = [(where, text) for where, text in _strings(plain, "") if "${" in text]
    if not references:
        return plain
    for where, text in references:
        if "${" in _REFERENCE.sub("", text):
            raise RecipeError(
                f"{where}: {text!r} is refused; only plain references such as ${{seed}} or ${{data.patch}} are allowed"
            )
    try:
        resolved: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, RecursionError) as error:
        raise RecipeError(f"a reference cannot be resolved: {str(error).splitlines()[0]}") from error
    return resolved


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield every string of nested values, keys included, with its dotted place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{where}.{key}".lstrip("."), str(key)
            yield from _strings(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}.{index}".lstrip("."))


# -- checking -----------------------------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every component's options checked and completed.

    Raises:
        RecipeError: A name is unknown, an option does not exist, has the wrong type or is out of range.
    """
    if not re.fullmatch(r"\w[\w.-]*", recipe.name):
        raise RecipeError(f"name: {recipe.name!r} becomes a folder; use letters, digits, '_', '-' and '.'")
    if not recipe.stages:
        raise RecipeError("stages: at least one stage is needed")
    _check_ranges(recipe)

    noise = _completed("noise", recipe.data.noise, "data.noise") if recipe.data.noise else None
    if recipe.data.drop_noisy and noise is None:
        raise RecipeError("data.drop_noisy: there is no label noise to drop cases for; name a model as data.noise")
    prior = _completed("prior", recipe.data.prior, "data.prior") if recipe.data.prior else None
    data = replace(
        recipe.data, prior=prior, dataset=_completed("dataset", recipe.data.dataset, "data.dataset"), noise=noise
    )
    return replace(
        recipe,
        data=data,
        backbone=_completed("backbone", recipe.backbone, "backbone"),
        stages=_checked_stages(recipe.stages, "stages", data),
        baseline=_checked_stages(recipe.baseline, "baseline", data),
    )


def _check_follows(stages: Sequence[Stage], index: int, where: str) -> None:
    """Raise a :class:`RecipeError` where a strategy goes on from another whose stage does not come right before."""
    name = stages[index].strategy.name
    wanted = getattr(registry.get("strategy", name), "follows", ())
    before = stages[index - 1].strategy.name if index else "nothing"
    if wanted and before not in wanted:
        raise RecipeError(
            f"{where}.strategy: {name} goes on from what {wanted[0]} has learnt, but comes after {before}; put a stage of "
            f"{wanted[0]} right before it"
        )


def _checked_stages(stages: Sequence[Stage], where: str, data: Data) -> tuple[Stage, ...]:
    checked = tuple(_checked_stage(stage, f"{where}.{i}") for i, stage in enumerate(stages))
    for i, stage in enumerate(checked):
        if stage.annotator is not None and stage.fold is not None:
            parts = [(one.folds, one.fold) for one in checked[max(0, i - stage.fold) : i - stage.fold + stage.folds]]
            if parts != [(stage.folds, part) for part in range(stage.folds)]:
                raise RecipeError(
                    f"{where}.{i}.fold: {stage.annotator.name} needs the networks of all {stage.folds} parts; leave out fold"
                )
        _check_follows(checked, i, f"{where}.{i}")
    if checked and checked[-1].folds and data.evaluate_on != "none":
        raise RecipeError(
            f"{where}.{len(checked) - 1}.folds: the last stage would be measured by the network of one part only; add a "
            "stage after it that learns from all labelled patients, with start: fresh"
        )
    return checked


def _checked_stage(stage: Stage, where: str) -> Stage:
    annotator = _completed("annotator", stage.annotator, f"{where}.annotator") if stage.annotator else None
    if annotator is None and (stage.revise_every or stage.revise_at_start):
        raise RecipeError(f"{where}.revise_every: there is no annotator to revise labels; name one or leave this out")
    if annotator is not None and not (stage.revise_every or stage.revise_at_start or stage.folds):
        raise RecipeError(
            f"{where}.revise_every: it is 0, so that annotator {annotator.name!r} would never revise a label; write after how "
            "many steps it is to, as in revise_every: 40 (or revise_at_start: true)"
        )
    if stage.folds:
        _check_folds(stage, where, registry.get("annotator", annotator.name).role if annotator else "labelled")  # type: ignore[attr-defined]  # a class of annotators
    return replace(stage, strategy=_completed("strategy", stage.strategy, f"{where}.strategy"), annotator=annotator)


def _check_folds(stage: Stage, where: str, reviewed: str) -> None:
    """Check that predictions of held-out patients can be what they are meant to be."""
    need(stage.folds >= 2, f"{where}.folds", stage.folds, "0 (none) or at least 2 parts")
    need(stage.steps >= 1, f"{where}.steps", stage.steps, "at least 1, or the parts differ in nothing")
    if stage.fold is not None:
        need(0 <= stage.fold < stage.folds, f"{where}.fold", stage.fold, f"one of 0 … {stage.folds - 1}")
    if stage.start == "previous":
        raise RecipeError(
            f"{where}.start: with folds, each network must start from weights that never saw the patients it leaves out; "
            "write start: fresh, or name a file"
        )
    if stage.optimiser_state == "previous":
        raise RecipeError(
            f"{where}.optimiser_state: with folds, the moments of the part before have seen the patients that this one "
            "leaves out; use fresh"
        )
    if stage.revise_every or stage.revise_at_start:
        raise RecipeError(
            f"{where}.revise_every: with folds, labels are revised once, when all parts are trained; leave it out"
        )
    for name, stream in stage.streams.items():
        if stream.role == "all":
            raise RecipeError(
                f"{where}.streams.{name}.role: with folds, labels of unlabelled cases are refused: an earlier network that saw "
                "every patient may have made them; bind labelled"
            )
    if reviewed != "labelled":
        raise RecipeError(
            f"{where}.annotator: {reviewed} cases are reviewed by it, but folds are parts of the labelled ones"
        )


def _completed(kind: registry.Kind, component: Component, where: str) -> Component:
    """Return a component with checked options and all defaults; strategies, annotators and data sets are constructed."""
    try:
        known = registry.options(registry.get(kind, component.name))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    chosen = {}
    for key, value in component.options.items():
        if key not in known:
            raise RecipeError(
                f"{where}.{key}: {component.name} has no such option.{did_you_mean(key, known)} "
                f"It has: {', '.join(known) or 'none'}"
            )
        chosen[key] = _within(kind, convert(value, known[key].type, f"{where}.{key}"), f"{where}.{key}")
    for key, option in known.items():
        if option.required and key not in chosen:
            raise RecipeError(f"{where}.{key}: {component.name} needs this option: {option.help}")
    options = {key: chosen.get(key, option.default) for key, option in known.items()}
    if kind != "backbone":
        try:
            registry.build(kind, component.name, **options)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
    return Component(component.name, options)


def _within(kind: registry.Kind, value: Any, where: str) -> Any:
    """Return an option's value; components in it are checked and completed as the one that it belongs to."""
    if isinstance(value, Component):
        return _completed(kind, value, where)
    if isinstance(value, Mapping):
        return {key: _within(kind, item, f"{where}.{key}") for key, item in value.items()}
    return value


def _check_ranges(recipe: Recipe) -> None:
    """Check what types cannot say."""
    data, trainer, evaluation = recipe.data, recipe.trainer, recipe.evaluation
    need(bool(data.patch) and min(data.patch) > 0, "data.patch", list(data.patch), "lengths in voxels, at least 1")
    need(0 <= data.foreground <= 1, "data.foreground", data.foreground, "a share in [0, 1]")
    need(data.spacing is None or min(data.spacing) > 0, "data.spacing", data.spacing, "lengths in mm")
    window = data.window or (0.0, 1.0)
    need(
        all(map(math.isfinite, window)) and window[0] < window[1],
        "data.window",
        list(window),
        "two finite intensities, the smaller one first",
    )
    need(data.dimensions in (None, 2, 3), "data.dimensions", data.dimensions, "2 or 3")
    need(data.development >= 0, "data.development", data.development, "a number of patients")
    need(data.slices is None or data.slices >= 1, "data.slices", data.slices, "at least 1 slice per patient")
    need(0 <= data.contamination < 1, "data.contamination", data.contamination, "a share in [0, 1)")
    if data.contamination and not data.foreign:
        raise RecipeError("data.contamination: name the domain that the foreign patients come from as data.foreign")
    need(evaluation.folds == 0 or evaluation.folds >= 2, "evaluation.folds", evaluation.folds, "0 (none) or at least 2")
    if evaluation.fold is not None:
        need(
            0 <= evaluation.fold < evaluation.folds,
            "evaluation.fold",
            evaluation.fold,
            "one of 0 … evaluation.folds - 1",
        )
    counted = isinstance(data.labelled, int | float)
    need(not counted or float(data.labelled) > 0, "data.labelled", data.labelled, "at least one patient")
    for key in ("devices", "nodes", "accumulate", "checkpoint_every", "log_every"):
        need(getattr(trainer, key) >= 1, f"trainer.{key}", getattr(trainer, key), "at least 1")
    for key in ("clip", "threads", "workers"):
        need(getattr(trainer, key) >= 0, f"trainer.{key}", getattr(trainer, key), "0 or more")
    need(0 <= evaluation.overlap < 1, "evaluation.overlap", evaluation.overlap, "a share in [0, 1)")
    need(evaluation.window_batch >= 1, "evaluation.window_batch", evaluation.window_batch, "at least 1")
    need(evaluation.every >= 0, "evaluation.every", evaluation.every, "0 or more steps")
    need(evaluation.diagnose >= 0, "evaluation.diagnose", evaluation.diagnose, "0 or more steps")
    need(evaluation.probe >= 0, "evaluation.probe", evaluation.probe, "0 or more steps")
    need(evaluation.diagnose_cases >= 1, "evaluation.diagnose_cases", evaluation.diagnose_cases, "at least 1 case")
    for part, stages in (("stages", recipe.stages), ("baseline", recipe.baseline)):
        for index, stage in enumerate(stages):
            _check_stage_ranges(stage, f"{part}.{index}", data.patch)


def need(holds: bool, where: str, value: Any, what: str) -> None:
    """Raise a :class:`RecipeError` that a value is out of range, unless it is not."""
    if not holds:
        raise RecipeError(f"{where}: {value} is out of range; {what}")


def _check_stage_ranges(stage: Stage, where: str, patch: tuple[int, ...]) -> None:
    need(stage.steps >= 0, f"{where}.steps", stage.steps, "0 or more")
    need(stage.batch >= 1, f"{where}.batch", stage.batch, "at least 1 sample")
    need(stage.optimiser.lr > 0, f"{where}.optimiser.lr", stage.optimiser.lr, "above 0")
    need(
        stage.optimiser.weight_decay >= 0, f"{where}.optimiser.weight_decay", stage.optimiser.weight_decay, "0 or more"
    )
    need(stage.revise_every >= 0, f"{where}.revise_every", stage.revise_every, "0 or more steps")
    need(0 < stage.start_share <= 1, f"{where}.start_share", stage.start_share, "a share in (0, 1]")
    need(stage.schedule.warmup >= 0, f"{where}.schedule.warmup", stage.schedule.warmup, "0 or more steps")
    need(stage.schedule.every >= 1, f"{where}.schedule.every", stage.schedule.every, "at least 1 step")
    for name, stream in stage.streams.items():
        need(stream.batch is None or stream.batch >= 0, f"{where}.streams.{name}.batch", stream.batch, "0 or more")
        need(0 <= stream.known <= 1, f"{where}.streams.{name}.known", stream.known, "a share in [0, 1]")
    augment = stage.augment
    need(0 <= augment.probability <= 1, f"{where}.augment.probability", augment.probability, "a share in [0, 1]")
    for key in ("rotate", "scale", "shift", "gain", "offset", "gamma", "noise", "blur"):
        need(getattr(augment, key) >= 0, f"{where}.augment.{key}", getattr(augment, key), "0 or more")
    for key in ("scale", "gamma", "gain"):
        need(getattr(augment, key) < 1, f"{where}.augment.{key}", getattr(augment, key), "below 1")
    for axis in augment.flip:
        need(0 <= axis < len(patch), f"{where}.augment.flip", axis, f"an axis 0 … {len(patch) - 1}")
    square = len(patch) < 2 or patch[0] == patch[1]
    need(not augment.rot90 or square, f"{where}.augment.rot90", list(patch), "the first two axes must be equally long")


# -- writing ------------------------------------------------------------------------------------------------------------


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values: what :func:`load_recipe` takes, every default spelt out."""
    plain: dict[str, Any] = _plain_value(recipe)
    return plain


def _plain_value(value: Any) -> Any:
    if isinstance(value, Component):
        return {"name": value.name, **{key: _plain_value(item) for key, item in value.options.items()}}
    if is_dataclass(value):
        return {key: _plain_value(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain_value(item) for item in value]
    return value


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(recipe)))


def diff(one: Recipe, two: Recipe) -> list[str]:
    """Return lines ``key: a -> b`` for every key in which two recipes differ."""
    first, second = dict(_flat(to_mapping(one), "")), dict(_flat(to_mapping(two), ""))
    keys = list(dict.fromkeys([*first, *second]))
    return [
        f"{k}: {first.get(k, '(none)')} -> {second.get(k, '(none)')}" for k in keys if first.get(k) != second.get(k)
    ]


def _flat(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield leaves with their dotted keys; lists of plain values are leaves."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for index, item in enumerate(value):
            yield from _flat(item, f"{where}.{index}".lstrip("."))
    else:
        yield where, value

"""``labeleff init``: a recipe to begin with, from what the data look like, each choice with its reason.

Which rule comes from where. Of nnU-Net (Isensee et al., Nature Methods 2021, supplement; rules of thumb in our words
and simpler): images are resampled to the median size of voxels; slices are thick where voxels are three times longer
along one axis than along the others; intensities of CT are kept between percentiles of the labelled foreground
(nnU-Net then normalises by those of all cases, we image by image); a patch has the proportions of the median image and is
as large as memory lets a batch of two be; what memory is left goes into the batch, which holds at most a twentieth of
the training voxels; the resolution is halved until an axis is a few voxels long; a third of the patches is centred on
foreground. Ours: thick slices are seen by a 2-D network (nnU-Net tries both); nothing is resampled where voxels are
nearly alike; half of the patches where the foreground is very small; no more than a CPU can do in seconds; steps by
how often labelled voxels are seen; a semi-supervised method beside its baseline wherever images have no label.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from torch import nn

from labeleff import registry
from labeleff.batch import IGNORE, Task
from labeleff.data.formats.base import DataSet
from labeleff.data.formats.manifest_file import ManifestFile
from labeleff.data.manifest import Manifest
from labeleff.data.recognise import in_words, index_folder
from labeleff.data.recognise import write as write_rows
from labeleff.data.split import evenly
from labeleff.errors import DataError
from labeleff.files import write_atomically
from labeleff.inspecting import label_of
from labeleff.recipe_io import load_recipe
from labeleff.runlog import console

LOOKED_AT = 32
"""Training cases whose voxels are read, evenly spread over the data set."""
THICK = 3.0
"""Slices are thick where voxels are so many times longer along one axis than along the others."""
AIR, DENSE = -900, 200
"""Images whose values reach from below the one to above the other, Hounsfield units, are taken for CT: air has -1000."""
ENDS = (0.5, 99.5)
"""Percentiles of the labelled foreground of CT that a window reaches between."""
FOREGROUND = 10_000
"""Voxels of a case's foreground that are looked at, evenly spread."""
UNLIKE = 1.1
"""Sizes of voxels are unlike where the largest is so many times the smallest."""
FEWEST_SLICES = 12
SMALLEST = 5
"""An axis of the deepest level is not shorter than this where the patch allows it, voxels."""
RARE = 0.01
"""A share of foreground below this is very small."""
MOST = {2: 512**2, 3: 128**3}
MOST_CPU = {2: 192**2, 3: 64**3}
"""Voxels of a patch at the most, by the axes of the network."""
BATCHES = {2: 16, 3: 4}
"""Samples of a batch at the most."""
TRAINED = 3
"""Of what the blocks of a network return, so many copies are planned for: what is kept for the gradient (0.8 of one, for a U-Net of
four levels), gradients, kernels' own room, and methods that pass an image twice."""
SHARE = 0.6
"""Of the memory there is, so much is planned for."""
SEEN = 60
"""How often a step count lets every labelled voxel be seen on average, between the fewest and the most steps."""
STEPS = (400, 4000)


@dataclass(frozen=True)
class Fingerprint:
    """What the training cases look like.

    Args:
        shape: Median shape, voxels.
        spacing: Median size of voxels, mm; None where one of them is unknown.
        spread: Largest size of voxels over the smallest, of the axis where they differ most.
        foreground: Mean share of labelled voxels that are foreground; 0 where nothing is labelled.
        labelled: Patients of whom every case has a label.
        unlabelled: The other patients.
        labelled_cases: Cases with a label.
        tests: Test cases with a label.
        window: Of images that look like CT: the ends of what is usual in the labelled foreground, Hounsfield units.
    """

    shape: tuple[float, ...]
    spacing: tuple[float, ...] | None
    spread: float
    foreground: float
    labelled: int
    unlabelled: int
    labelled_cases: int
    tests: int
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choice:
    """A key of the recipe, its value, and why."""

    key: str
    value: Any
    reason: str


def init(source: Path, output: Path, *, memory: float | None = None) -> list[Choice]:
    """Write a recipe for a data set, print each choice with its reason, and return the choices.

    Deterministic for the same files and the same memory. Labels of test cases are not opened.

    Args:
        source: A folder in any layout that ``labeleff index`` recognises, or a table of files (.csv), whose manifest is then
            written beside the recipe; or a manifest (.json).
        output: The recipe; must be new.
        memory: GiB to plan for; default: what the GPU has, else a quarter of this machine's.

    Raises:
        DataError: The data are not recognised, hold no label or no training case, or a file would be overwritten.
    """
    if output.exists():
        raise DataError(f"{output}: exists already; give --output another name")
    path, lines, found = source, [], None
    if source.suffix != ".json":
        path = output.parent / f"{source.resolve().name.removesuffix('.csv')}.json"
        if path.exists():
            raise DataError(f"{path}: exists already; if it is the manifest of {source}: labeleff init {path}")
        found = index_folder(source)
        lines = in_words(found)
    dataset = ManifestFile(path=str(path))
    manifest = dataset.manifest() if found is None else found.manifest
    dataset.head = manifest
    gpu = torch.cuda.is_available()
    known = memory if memory is not None else _memory(gpu=gpu)
    choices = propose(manifest, fingerprint(dataset, manifest), str(path), memory=known, gpu=gpu)
    text = as_yaml(choices, path)
    if found is not None:  # only once nothing can go wrong any more
        write_rows(manifest, path)
    write_atomically(output, text)
    _print(choices, lines, output)
    return choices


def _memory(*, gpu: bool) -> float:
    """Return the memory that there is to plan for, GiB."""
    if gpu:
        return float(torch.cuda.get_device_properties(0).total_memory) / 2**30
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**32
    except (AttributeError, OSError, ValueError):
        return 4.0


def fingerprint(dataset: DataSet, manifest: Manifest) -> Fingerprint:
    """Look at the training cases: all headers, and the voxels of some.

    Raises:
        DataError: There are none, or a file cannot be read.
    """
    cases = manifest.of_role("train")
    if not cases:
        raise DataError(f"{manifest.name}: there are no training cases")
    shapes, shares, inside = [], [], []
    ct = True
    some = [cases[i] for i in evenly(len(cases), LOOKED_AT)]
    for case in track(some, description="looking", console=console(), transient=True):
        image = dataset.read_image(case)
        shapes.append(image.shape[1:])
        ct = ct and len(image) == 1 and bool(image.min() < AIR and image.max() > DENSE)
        label = label_of(dataset, case)
        if label is not None and (label != IGNORE).any():
            shares.append(_foreground(label))
            if ct and label.shape == image.shape[1:]:
                inside.append(_some(image[0][(label > 0) & (label != IGNORE)]))
    spacings = [case.spacing for case in cases]
    known = np.array([s for s in spacings if s is not None], float) if None not in spacings else None
    bare = {case.patient for case in cases if not case.has_label}
    people = {case.patient for case in cases}
    return Fingerprint(
        shape=tuple(float(n) for n in np.median(shapes, axis=0)),
        spacing=tuple(round(float(n), 4) for n in np.median(known, axis=0)) if known is not None else None,
        spread=float((known.max(0) / known.min(0)).max()) if known is not None else 1.0,
        foreground=float(np.mean(shares)) if shares else 0.0,
        labelled=len(people - bare),
        unlabelled=len(bare),
        labelled_cases=sum(case.has_label for case in cases),
        tests=sum(case.has_label for case in manifest.of_role("test")),
        window=_usual(inside) if ct else None,
    )


def _foreground(label: NDArray[np.uint8]) -> float:
    known = label != IGNORE
    return float(((label > 0) & known).sum() / known.sum())


def _some(values: NDArray[Any]) -> NDArray[Any]:
    """Return values evenly spread over those given, no more than are looked at of a case."""
    return values[:: math.ceil(max(len(values), 1) / FOREGROUND)]


def _usual(inside: Sequence[NDArray[Any]]) -> tuple[int, int] | None:
    """Return the percentiles of values that a window reaches between, if there is a window."""
    values = np.concatenate([np.zeros(0), *inside])
    if not len(values):
        return None
    low, high = (round(float(end)) for end in np.percentile(values, ENDS))
    return (low, high) if low < high else None


# -- choices ------------------------------------------------------------------------------------------------------------


def propose(manifest: Manifest, seen: Fingerprint, path: str, *, memory: float, gpu: bool) -> list[Choice]:
    """Return the choices of a recipe, in the order of its keys.

    Args:
        manifest: The data set.
        seen: What its training cases look like.
        path: The manifest file.
        memory: GiB to plan for.
        gpu: There is one; else patches are kept to what a CPU can do.

    Raises:
        DataError: No patient has a label.
    """
    if not seen.labelled:
        raise DataError(
            f"{manifest.name}: no training patient has a label in every case; a recipe learns from some labels"
        )
    choices = [
        Choice("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", manifest.name).strip("-.") or "mine", "that of the data set"),
        Choice("data.dataset", {"name": "manifest", "path": path}, f"{len(manifest.cases)} cases"),
        Choice("data.labelled", "all", f"{seen.labelled} patients have labels, {seen.unlabelled} have none"),
    ]
    resampled = seen.spacing is not None and seen.spread > UNLIKE
    if resampled:
        choices.append(
            Choice(
                "data.spacing",
                list(seen.spacing or ()),
                f"sizes of voxels differ {seen.spread:.2g} times; their median",
            )
        )
    if seen.window is not None:
        why = (
            f"values as of CT, Hounsfield units; the {ENDS[0]:g} and {ENDS[1]:g} percentiles of the labelled foreground"
        )
        choices.append(Choice("data.window", list(seen.window), why))
    dimensions, axis = 2, None
    if manifest.axes == 3:
        dimensions, axis, why = _dimensions(seen)
        choices.append(Choice("data.dimensions", dimensions, why))
        if axis is not None:
            choices.append(Choice("data.slice_axis", axis, "the axis of the slices"))
    shape = [n for a, n in enumerate(seen.shape) if a != axis]
    task = Task(manifest.classes, dimensions, manifest.channels, exclusive=not manifest.overlapping)
    channels = _channels(shape)
    room = _room(task, channels, memory, streams=2 if seen.unlabelled else 1)
    patch, why = _patch(shape, 1 << (len(channels) - 1), room, dimensions, gpu=gpu)
    choices.append(Choice("data.patch", patch, why))
    foreground, why = _centred(seen, patch, shape, slices=axis is not None)
    choices.append(Choice("data.foreground", foreground, why))
    choices.append(
        Choice(
            "backbone",
            {"name": "unet", "channels": channels},
            f"{len(channels) - 1} halvings leave {min(patch) >> (len(channels) - 1)} voxels of the shortest axis",
        )
    )
    labelled_voxels = seen.labelled_cases * math.prod(seen.shape)
    batch, why = _batch(patch, room, labelled_voxels, dimensions)
    steps, why_steps = _steps(patch, batch, labelled_voxels)
    choices += _stages(seen, batch, steps, why, why_steps, exclusive=task.exclusive)
    choices += _evaluation(seen)
    return choices


def _dimensions(seen: Fingerprint) -> tuple[int, int | None, str]:
    """Return the axes of the network, the axis of slices if there is one, and why."""
    if seen.spacing is not None:
        axis = int(np.argmax(seen.spacing))
        others = max(s for a, s in enumerate(seen.spacing) if a != axis)
        if seen.spacing[axis] >= THICK * others:
            return 2, axis, f"slices are thick: {seen.spacing[axis]:g} mm beside {others:g} mm"
    shortest = int(np.argmin(seen.shape))
    if seen.shape[shortest] < FEWEST_SLICES:
        return 2, shortest, f"only {seen.shape[shortest]:g} slices: too few to halve"
    if seen.spacing is None and min(seen.shape) * THICK <= sorted(seen.shape)[1]:
        return 2, shortest, f"{seen.shape[shortest]:g} slices of unknown thickness, few beside the other axes"
    said = "voxels are about as long along every axis" if seen.spacing is not None else "axes are about equally long"
    return 3, None, said


def _channels(shape: Sequence[float]) -> list[int]:
    """Return the channels of every level: halved while the shortest axis stays longer than some voxels, twice to four times."""
    halvings = min(4, max(2, math.floor(math.log2(max(min(shape), 1) / SMALLEST))))
    return [16 * 2**level for level in range(halvings + 1)]


def _room(task: Task, channels: Sequence[int], memory: float, *, streams: int) -> float:
    """Return how many voxels one stream of a step may have in memory, from what the blocks of the network return per voxel."""
    network = registry.get("backbone", "unet")(task, channels=tuple(channels)).eval()
    numbers: list[int] = []

    def count(module: nn.Module, given: Any, returned: Any) -> None:  # noqa: ARG001
        numbers.append(returned.numel())

    hooks = [m.register_forward_hook(count) for m in network.modules() if not list(m.children())]
    size = (1 << len(channels),) * task.ndim
    with torch.no_grad():
        network(torch.zeros(1, task.channels, *size))
    for hook in hooks:
        hook.remove()
    per_voxel = TRAINED * 4 * sum(numbers) / math.prod(size)  # bytes
    return SHARE * memory * 2**30 / per_voxel / streams


def _patch(shape: Sequence[float], unit: int, room: float, dimensions: int, *, gpu: bool) -> tuple[list[int], str]:
    """Return the patch, in voxels, and why."""
    whole = [max(unit, math.ceil(n / unit) * unit) for n in shape]
    limit = (MOST if gpu else MOST_CPU)[dimensions]
    most = min(room / 2, limit)
    wanted = " × ".join(f"{n:g}" for n in shape)
    if math.prod(whole) <= most:
        return whole, f"the median image, {wanted}, whole, in multiples of {unit}"
    sizes = [float(n) for n in whole]
    for _ in range(len(sizes)):  # axes that are short already stay as they are, and the others give way
        free = [i for i, n in enumerate(sizes) if n > unit]
        fixed = math.prod(n for n in sizes if n <= unit)
        factor = (most / fixed / math.prod(sizes[i] for i in free)) ** (1 / len(free)) if free else 1.0
        if factor >= 1:
            break
        sizes = [max(unit, n * factor) if i in free else n for i, n in enumerate(sizes)]
    patch = [max(unit, math.floor(n / unit + 1e-9) * unit) for n in sizes]
    why = (
        "memory allows for a batch of two" if most < limit else f"{'is sensible' if gpu else 'a CPU can do in seconds'}"
    )
    return patch, f"the proportions of the median image, {wanted}, as large as {why}, in multiples of {unit}"


def _centred(seen: Fingerprint, patch: Sequence[int], shape: Sequence[float], *, slices: bool) -> tuple[float, str]:
    """Return the share of patches that are centred on foreground, and why."""
    share = f"{seen.foreground:.2g} of the labelled voxels are foreground"
    if not slices and all(p >= n for p, n in zip(patch, shape, strict=True)):
        return 0.0, "the patch is the whole image"
    if seen.foreground < RARE:
        return 0.5, f"only {share}"
    return 0.33, share


def _batch(patch: Sequence[int], room: float, labelled: float, dimensions: int) -> tuple[int, str]:
    """Return the samples of a batch, and why."""
    voxels = math.prod(patch)
    limits = {
        "what memory allows": room / voxels,
        "a twentieth of the labelled voxels": labelled / 20 / voxels,
        f"more than {BATCHES[dimensions]} are seldom of use": float(BATCHES[dimensions]),
    }
    why = min(limits, key=lambda reason: limits[reason])
    batch = max(2, int(limits[why]) // 2 * 2)
    return batch, why if limits[why] >= 2 else f"at least two ({why} would be fewer)"


def _steps(patch: Sequence[int], batch: int, labelled: float) -> tuple[int, str]:
    """Return the steps of a run in hundreds, and why."""
    low, high = STEPS
    wanted = SEEN * labelled / (batch * math.prod(patch))
    steps = int(min(high, max(low, math.ceil(wanted / 100) * 100)))
    if wanted > high:
        return steps, "enough to see whether it works; more will be better"
    return steps, f"every labelled voxel is seen {SEEN} times" if wanted > low else "fewer are seldom enough"


def _stages(seen: Fingerprint, batch: int, steps: int, why: str, why_steps: str, *, exclusive: bool) -> list[Choice]:
    """Return stages and, where there are unlabelled images, the baseline that says whether they help."""

    def stage(strategy: str, count: int, rate: float) -> dict[str, Any]:
        return {
            "strategy": strategy,
            "steps": count,
            "batch": batch,
            "optimiser": {"name": "adamw", "lr": rate},
            "schedule": {"name": "cosine", "warmup": 20},
            "augment": {"rotate": 20, "scale": 0.15, "shift": 0.1, "gain": 0.2, "offset": 0.2},
        }

    counts = f"batch {batch}: {why}; {steps} steps: {why_steps}"
    alone = [stage("supervised", steps, 2e-3)]
    if not seen.unlabelled:
        return [Choice("stages", alone, f"all images have labels; {counts}")]
    if exclusive:
        first = stage("bcp_pretrain", steps // 2, 2e-3)
        stages, what = (
            [first, stage("bcp", steps - steps // 2, 1e-3)],
            "copy-paste between labelled and unlabelled images",
        )
    else:
        stages, what = [stage("mean_teacher", steps, 2e-3)], "regions overlap, which this method can"
    return [
        Choice("stages", stages, f"{what}; {counts}"),
        Choice(
            "baseline",
            alone,
            "the labels alone, as many labelled images per step: whether the others help has to be measured",
        ),
    ]


def _evaluation(seen: Fingerprint) -> list[Choice]:
    """Return what the recipe is measured on."""
    if seen.tests:
        return []
    if seen.labelled < 2:
        return [
            Choice("data.evaluate_on", "none", "no test, and one labelled patient, from whom nobody can be held out")
        ]
    folds = min(5, seen.labelled)
    reason = f"no test: 1 of {folds} parts of the labelled patients is held out; without fold, each in turn"
    return [Choice("evaluation", {"folds": folds, "fold": 0}, reason)]


# -- writing ------------------------------------------------------------------------------------------------------------


def as_yaml(choices: Sequence[Choice], data: Path) -> str:
    """Return a recipe, every choice with its reason above it.

    Raises:
        RecipeError: It is none (which would be our fault).
    """
    top: dict[str, list[Choice]] = {}
    for choice in choices:
        top.setdefault(choice.key.split(".")[0], []).append(choice)
    lines = [
        f"# Proposed by labeleff init from {data}. Change what you know better; then: labeleff check, labeleff run."
    ]
    for name, own in top.items():
        if own[0].key == name:
            lines += [f"# {own[0].reason}", *_dumped(name, own[0].value)]
            continue
        lines.append(f"{name}:")
        for choice in own:
            inner = [f"# {choice.reason}", *_dumped(choice.key.split(".")[1], choice.value)]
            lines += [f"  {line}" for line in inner]
    text = "\n".join(lines) + "\n"
    load_recipe(yaml.safe_load(text))
    return text


def _dumped(key: str, value: Any) -> list[str]:
    """Return lines of YAML; lists and mappings of plain values are on one line."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
        return [f"{key}:", *(f"  {line}" for line in text.rstrip().splitlines())]
    text = yaml.safe_dump([value], sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**6)
    return [f"{key}: {text.rstrip()[1:-1]}"]


def _print(choices: Sequence[Choice], lines: Sequence[str], output: Path) -> None:
    out = console()
    for line in lines:
        out.print(line)
    table = Table("key", "value", "why", box=None, pad_edge=False)
    for choice in choices:
        table.add_row(choice.key, _short(choice.value), choice.reason)
    out.print(table)
    out.print(f"written: {output}; next: labeleff check {output}")


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return ", ".join(f"{stage['strategy']} {stage['steps']}" for stage in value)
    return str(value) if not isinstance(value, Mapping) else ", ".join(f"{k} {v}" for k, v in value.items())

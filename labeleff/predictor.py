"""A finished run's predictor, made again from the file it left: no data set, no checkpoint, nothing but what travels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from labeleff import registry
from labeleff.batch import Task
from labeleff.data.provenance import HEADER
from labeleff.errors import RecipeError, RunError, one_line
from labeleff.prepared import Prepared, make_backbone
from labeleff.recipe import Recipe
from labeleff.recipe_io import load_recipe
from labeleff.strategies.base import Strategy

FILE = "predictor.safetensors"
ORIENTATION = "RAS"
"""Closest canonical orientation: axes run to the right, to the front and upwards."""


@dataclass(frozen=True)
class Processing:
    """What happens to an image before the network sees it, and to what the network returns.

    Args:
        axes: Axes of a case.
        dimensions: Axes that the network sees.
        channels: Input channels.
        classes: Names, background first.
        exclusive: Softmax over classes; otherwise sigmoid for each region.
        orientation: ``RAS``, or None: axes are taken as they are stored.
        spacing: Size of voxels that images are resampled to, mm; None: they keep their grid.
        seen: Smallest and largest size of voxels in training per axis, mm; None: unknown.
        normalise: Per image and channel: ``zscore``, ``minmax`` or ``none``.
        slice_axis: Axis along which volumes are cut for a 2-D network, or None.
        patch: Window, voxels.
        overlap: Overlap of windows, share of the patch; they are averaged with Gaussian weights.
        window_batch: Windows per forward pass.
        largest_component: Evaluation kept only the largest component of each class.
        window: Smallest and largest intensity that are kept, before resampling and normalisation; None: all.
    """

    axes: int
    dimensions: int
    channels: int
    classes: tuple[str, ...]
    exclusive: bool
    orientation: str | None
    spacing: tuple[float, ...] | None
    seen: tuple[tuple[float, ...], tuple[float, ...]] | None
    normalise: str
    slice_axis: int | None
    patch: tuple[int, ...]
    overlap: float
    window_batch: int
    largest_component: bool
    window: tuple[float, float] | None = None

    @property
    def task(self) -> Task:
        """What the network was made for."""
        return Task(self.classes, self.dimensions, self.channels, self.exclusive)

    def as_plain(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def processing_of(data: Prepared) -> Processing:
    """Return what the images of a run go through."""
    spec, evaluation = data.recipe.data, data.recipe.evaluation
    ids = data.split.labelled + data.split.unlabelled
    spacings = np.array([data.manifest.case(i).spacing or (np.nan,) * data.manifest.axes for i in ids], float)
    known = bool(len(spacings)) and bool(np.isfinite(spacings).all())
    oriented = bool(ids) and data.dataset.affine(data.manifest.case(ids[0])) is not None
    return Processing(
        axes=data.manifest.axes,
        dimensions=data.task.ndim,
        channels=data.task.channels,
        classes=tuple(data.task.classes),
        exclusive=data.task.exclusive,
        orientation=ORIENTATION if oriented else None,
        spacing=spec.spacing,
        seen=(tuple(spacings.min(0).tolist()), tuple(spacings.max(0).tolist())) if known else None,
        normalise=spec.normalise,
        slice_axis=data.slice_axis,
        patch=tuple(spec.patch),
        overlap=evaluation.overlap,
        window_batch=evaluation.window_batch,
        largest_component=evaluation.largest_component,
        window=spec.window,
    )


@dataclass(frozen=True)
class Predictor:
    """A network that predicts, in eval mode, and what it needs.

    Args:
        network: [B, C, *S] -> logits [B, K, *S].
        processing: What images go through.
        recipe: The run.
        header: All that the file says of itself.
    """

    network: nn.Module
    processing: Processing
    recipe: Recipe
    header: Mapping[str, Any]


def open_predictor(run: Path) -> Predictor:
    """Return the predictor of a finished run.

    Args:
        run: Its directory, or the ``.safetensors`` file it left.

    Raises:
        RunError: There is none, or the file is damaged or no such file.
    """
    path = run / FILE if run.is_dir() else run
    if not path.is_file():
        raise RunError(f"{path}: there is no predictor; a run writes it at its end: labeleff run")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
        if not isinstance(header, dict) or not {"predictor", "recipe"} <= header.keys():
            raise KeyError("predictor")
        tensors = load_file(path)
        processing = _processing(header["processing"]) if "processing" in header else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a predictor that labeleff wrote, or damaged ({error})") from error
    if processing is None:
        raise RunError(
            f"{path}: written by labeleff {header.get('version', '?')}, which did not note how images are prepared; run the "
            "recipe again"
        )
    try:
        recipe = load_recipe(header["recipe"])
    except RecipeError as error:
        raise RunError(f"{path}: {error}") from error
    network = structure_of(recipe, processing.task, header["predictor"])
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = one_line(error)
        raise RunError(f"{path}: its weights are not those of the network that its recipe names ({reason})") from error
    return Predictor(network.eval(), processing, recipe, header)


def _processing(plain: Mapping[str, Any]) -> Processing:
    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return Processing(**{key: frozen(value) for key, value in plain.items()})


def structure_of(recipe: Recipe, task: Task, name: str) -> nn.Module:
    """Return a network of the structure that the last stage of a recipe leaves, with weights of no meaning.

    Raises:
        RunError: The strategy has no such predictor.
    """
    backbone = make_backbone(recipe, task, 0)
    first = max((number for number, stage in enumerate(recipe.stages) if stage.start == "fresh"), default=0)
    for stage in recipe.stages[first:-1]:
        earlier: Strategy = registry.made("strategy", stage.strategy)
        earlier.reshape(backbone, task)
    last = recipe.stages[-1].strategy
    strategy: Strategy = registry.made("strategy", last)
    strategy.build(backbone, task)
    networks = strategy.predictors(backbone)
    if name not in networks:
        raise RunError(f"{last.name} has no predictor {name!r}; it has: {', '.join(networks)}")
    return networks[name]

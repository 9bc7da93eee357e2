"""Overlays of predictions on images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.files import write_atomically
from labeleff.functional.raters import disagreement
from labeleff.functional.regions import MOST_REGIONS

# Okabe and Ito: told apart with any colour vision
COLOURS = np.array(
    [[0, 0, 0], [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]],
    float,
) / 255  # fmt: skip


def grey(image: NDArray[Any]) -> NDArray[np.float64]:
    """Return an image scaled to [0, 1] between its 1st and 99th percentile."""
    low, high = np.percentile(image, [1, 99])
    scaled: NDArray[np.float64] = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return scaled


def overlay(
    image: NDArray[Any], label: NDArray[Any], *, strength: float = 0.4, exclusive: bool = True
) -> NDArray[np.float64]:
    """Return [H, W, 3] in [0, 1]: a grey image with translucent classes and their outlines in full colour.

    Regions that overlap (one bit each) are laid over one another.
    """
    result = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    if not exclusive:
        for bit in range(MOST_REGIONS):
            inside = ((label >> bit) & 1 > 0) & (label != IGNORE)
            result = overlay(result, np.where(inside, bit + 1, 0), strength=0.7 * strength)
        return result
    inside = (label > 0) & (label != IGNORE)
    colour = COLOURS[1 + (label.astype(int) - 1) % (len(COLOURS) - 1)]
    edge = np.zeros(label.shape, bool)
    for axis in (0, 1):
        differs = np.diff(label.astype(int), axis=axis) != 0
        edge[tuple(slice(1, None) if a == axis else slice(None) for a in (0, 1))] |= differs
        edge[tuple(slice(None, -1) if a == axis else slice(None) for a in (0, 1))] |= differs
    mix = np.where(edge & inside, 0.95, np.where(inside, strength, 0.0))[..., None]
    mixed: NDArray[np.float64] = result * (1 - mix) + colour * mix
    return mixed


def png_array(png: bytes) -> NDArray[np.uint8]:
    """Return [3, H, W] of an encoded picture, for TensorBoard."""
    from PIL import Image

    array: NDArray[np.uint8] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)
    return array


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture [3, H, W] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def slices_of(volume: NDArray[Any], axis: int, places: Sequence[int]) -> list[NDArray[Any]]:
    """Return 2-D views of a volume, rows down; the image itself where it is 2-D."""
    if volume.ndim == 2:
        return [volume]
    return [np.take(volume, place, axis=axis) for place in places]


def interesting(reference: NDArray[Any], axis: int) -> list[int]:
    """Return three slices: at a quarter, at the largest section, and at three quarters of the structure's extent."""
    if reference.ndim == 2:
        return [0]
    others = tuple(a for a in range(3) if a != axis)
    area = ((reference > 0) & (reference != IGNORE)).sum(axis=others)
    filled = np.flatnonzero(area)
    if not len(filled):
        return [reference.shape[axis] // 2]
    first, last = int(filled[0]), int(filled[-1])
    return sorted({first + (last - first) // 4, int(area.argmax()), first + 3 * (last - first) // 4})


def draw_case(
    path: Path,
    image: NDArray[Any],
    reference: NDArray[Any],
    predictions: Mapping[str, NDArray[Any]],
    *,
    title: str,
    classes: Sequence[str],
    slice_axis: int = 0,
    beside: str = "reference",
    exclusive: bool = True,
) -> None:
    """Write a PNG: rows are slices; columns the image, the reference and each prediction with its Dice.

    Args:
        path: Where to.
        image: [*S], one channel.
        reference: [*S] labels.
        predictions: [*S] labels by name.
        title: Heading.
        classes: Names, background first.
        slice_axis: Axis of a volume that is cut.
        beside: What the reference is called.
        exclusive: Otherwise regions overlap, one bit each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    places = interesting(reference, slice_axis)
    columns: dict[str, NDArray[Any] | None] = {"image": None, beside: reference, **predictions}
    views = slices_of(image, slice_axis, places)
    ratio = views[0].shape[0] / views[0].shape[1]
    figure = Figure(figsize=(2.6 * len(columns), 2.6 * ratio * len(views) + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(views), len(columns), squeeze=False)
    scaled = grey(image)
    for row, view in enumerate(slices_of(scaled, slice_axis, places)):
        for column, (name, label) in enumerate(columns.items()):
            axes = grid[row, column]
            cut = slices_of(label, slice_axis, places)[row] if label is not None else None
            shown = overlay(view, cut, exclusive=exclusive) if cut is not None else view
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                found = predictions.get(name)
                score = "\n" if found is None else f"\nmean Dice {_dice(found, reference, len(classes), exclusive):.3f}"
                axes.set_title(name + score, fontsize=9)
            if column == 0 and image.ndim == 3:
                axes.set_ylabel(f"slice {places[row]}", fontsize=8)
    colours = [COLOURS[1 + (i - 1) % (len(COLOURS) - 1)] for i in range(1, len(classes))]
    handles = [Patch(color=c, label=n) for c, n in zip(colours, classes[1:], strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def draw_raters(
    path: Path,
    image: NDArray[Any],
    votes: NDArray[np.uint8],
    *,
    title: str,
    classes: Sequence[str],
    slice_axis: int = 0,
) -> None:
    """Write a PNG: rows are slices with disputes; columns the image, every rater's contours on it, and where they disagree.

    Args:
        path: Where to.
        image: [*S], one channel.
        votes: [R, *S] labels of the raters.
        title: Heading.
        classes: Names, background first.
        slice_axis: Axis of a volume that is cut.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    disputes = disagreement(votes, len(classes))
    places = list(dict.fromkeys(interesting(disputes, slice_axis)))
    views = slices_of(grey(image), slice_axis, places)
    ratio = views[0].shape[0] / views[0].shape[1]
    figure = Figure(figsize=(2.9 * 3 + 0.5, 2.9 * ratio * len(views) + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(views), 3, squeeze=False)
    columns = ("image", "raters", "disagreement")
    colours = [tuple(COLOURS[1 + index % (len(COLOURS) - 1)]) for index in range(len(votes))]
    for row, view in enumerate(views):
        for axes, name in zip(grid[row], columns, strict=True):
            axes.imshow(view, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(name, fontsize=9)
        for own, colour in zip(votes, colours, strict=True):
            label = slices_of(own, slice_axis, places)[row]
            for value in np.setdiff1d(label, [0, IGNORE]):
                if (label != value).any():  # a class that fills the slice has no contour
                    grid[row, 1].contour(label == value, levels=[0.5], colors=[colour], linewidths=0.9)
        heat = slices_of(disputes, slice_axis, places)[row]
        shown = grid[row, 2].imshow(
            np.ma.masked_equal(heat, 0), cmap="inferno", vmin=0, vmax=1, interpolation="nearest"
        )
        if image.ndim == 3:
            grid[row, 0].set_ylabel(f"slice {places[row]}", fontsize=8)
    figure.colorbar(shown, ax=grid[:, 2].tolist(), shrink=0.7)
    handles = [Line2D([], [], color=colour, label=f"rater {i + 1}") for i, colour in enumerate(colours)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _dice(prediction: NDArray[Any], reference: NDArray[Any], classes: int, exclusive: bool) -> float:
    from labeleff.evaluation.metrics import measure

    names = [str(i) for i in range(classes)]
    spacing = (float("nan"),) * reference.ndim
    rows = measure(prediction, reference, classes=names, spacing=spacing, exclusive=exclusive, distances=False)
    return float(np.nanmean([row["dice"] for row in rows])) if any(not r["absent"] for r in rows) else float("nan")


def select_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the best, the median and the worst case by mean Dice over classes; ties go to the first name."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if not np.isnan(row["dice"]):
            scores.setdefault(row["case"], []).append(row["dice"])
    ranked = sorted(scores, key=lambda case: (-float(np.mean(scores[case])), case))
    if not ranked:
        return {}
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}


def draw_noise(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    maps: Callable[[str], tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.uint8]]],
    *,
    called: str,
    among: str,
    classes: Sequence[str],
    slice_axis: int = 0,
) -> None:
    """Draw the cases whose labels were changed least, most and in between.

    Args:
        folder: Where to.
        rows: Dice of the labels of cases and classes with the clean ones.
        maps: Returns image, clean and noisy labels [*S] of a case.
        called: What the noisy labels are called.
        among: What the cases are, for headings.
        classes: Names, background first.
        slice_axis: Axis of a volume that is cut.
    """
    for place, case in select_cases(rows).items():
        image, clean, noisy = maps(case)
        draw_case(
            folder / f"{place}.png",
            image,
            clean,
            {called: noisy},
            title=f"{case}: {place} of {among}",
            classes=classes,
            slice_axis=slice_axis,
            beside="clean",
        )


def overlay_grid(
    image: NDArray[Any], labels: Sequence[NDArray[Any]], *, slice_axis: int = 0, exclusive: bool = True
) -> NDArray[np.uint8]:
    """Return [3, H, W] for TensorBoard: the image beside each label map over it, at the largest section."""
    places = interesting(labels[0], slice_axis)
    place = places[len(places) // 2]
    view = slices_of(grey(image), slice_axis, [place])[0]
    tiles = [np.repeat(view[..., None], 3, axis=-1)]
    tiles += [overlay(view, slices_of(label, slice_axis, [place])[0], exclusive=exclusive) for label in labels]
    return np.round(np.concatenate(tiles, axis=1) * 255).astype(np.uint8).transpose(2, 0, 1)

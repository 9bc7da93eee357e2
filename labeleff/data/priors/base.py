"""The contract of a prior, what it may look at, and the arithmetic that priors share.

A prior gives, for every unlabelled case, the expected share of its voxels that each class takes: [1, K] for the whole
case, or [n, K] for the slices of a volume that a 2-D network sees one by one. It is computed once, before adaptation, and
kept in ``priors.json`` of the run.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.errors import DataError, RecipeError, did_you_mean

Unit = Literal["ratio", "voxels", "mm2", "ml"]
Ratios = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What a prior may look at.

    Args:
        classes: Names, background first.
        cases: The unlabelled cases that need a prior.
        slice_axis: Axis along which a 2-D network sees volumes slice by slice, or None.
        shape: Shape of a stored case.
        spacing: Voxel size of a stored case, mm; NaN where unknown.
        image: Image [C, *S] of a stored case.
        budget: Yields the labelled cases with their labels [*S].
        truth: Opens the label [*S] of an unlabelled case: extra supervision, which :attr:`Prior.mark` has to own up to.
    """

    classes: tuple[str, ...]
    cases: tuple[str, ...]
    slice_axis: int | None
    shape: Callable[[str], tuple[int, ...]]
    spacing: Callable[[str], tuple[float, ...]]
    image: Callable[[str], NDArray[np.float32]]
    budget: Callable[[], Iterator[tuple[str, NDArray[np.uint8]]]]
    truth: Callable[[str], NDArray[np.uint8]]

    def parts(self, case: str) -> int:
        """Return how many rows a case has: one, or one per slice."""
        return 1 if self.slice_axis is None else self.shape(case)[self.slice_axis]

    def region(self, case: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return shape and spacing of what one row is about: the case, or one of its slices."""
        axes = [a for a in range(len(self.shape(case))) if a != self.slice_axis]
        shape, spacing = self.shape(case), self.spacing(case)
        return tuple(shape[a] for a in axes), tuple(spacing[a] for a in axes)

    def counted(self, label: NDArray[np.uint8]) -> Ratios:
        """Return the shares of the classes in a label map, row by row, unknown voxels left out; NaN where all are."""
        rows = label[None] if self.slice_axis is None else np.moveaxis(label, self.slice_axis, 0)
        counts = np.array([np.bincount(row[row != IGNORE], minlength=len(self.classes)) for row in rows], float)
        total = counts.sum(1, keepdims=True)
        shares: Ratios = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        return shares


class Prior(ABC):
    """A source of knowledge. Options are the keyword-only arguments of ``__init__``."""

    @abstractmethod
    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return the expected shares [1, K] or [slices, K] of every case of ``known.cases``."""

    @property
    def mark(self) -> str:
        """What must stand beside a result that rests on this prior; empty where nothing must."""
        return ""


def with_background(foreground: Ratios, where: str) -> Ratios:
    """Return shares [..., K] of foreground shares [..., K - 1]: background is the rest.

    Raises:
        DataError: The foreground takes more than there is.
    """
    rest = 1 - foreground.sum(-1, keepdims=True)
    if (rest < 0).any():
        raise DataError(f"{where}: the classes together take {1 - rest.min():.0%} of the image; lower their sizes")
    return np.concatenate([rest, foreground], -1)


def share(size: float, unit: Unit, shape: Sequence[int], spacing: Sequence[float], where: str) -> float:
    """Return the share of an image of a shape and spacing that a size takes.

    Raises:
        DataError: Millimetres are asked for where the spacing is not known, or of the wrong number of axes.
    """
    if unit == "ratio":
        return size
    voxels = float(np.prod(shape))
    if unit == "voxels":
        return size / voxels
    axes = {"mm2": 2, "ml": 3}[unit]
    if len(shape) != axes:
        raise DataError(
            f"{where}: data.prior.unit is {unit}, but the prior is of {len(shape)}-D images; use {'mm2' if axes == 3 else 'ml'}"
        )
    if not np.isfinite(spacing).all():
        raise DataError(f"{where}: data.prior.unit is {unit}, but the voxel size is not known; use voxels or ratio")
    return size * (1000.0 if unit == "ml" else 1.0) / float(np.prod(spacing)) / voxels


def check_sizes(sizes: Mapping[str, float], classes: Sequence[str]) -> NDArray[np.float64]:
    """Return the sizes of the foreground classes in order.

    Raises:
        RecipeError: A class is unknown or has no size.
    """
    for name in sizes:
        if name not in classes[1:]:
            raise RecipeError(
                f"data.prior.sizes.{name}: there is no such class.{did_you_mean(name, classes[1:])} "
                f"Classes: {', '.join(classes[1:])}"
            )
    missing = next((name for name in classes[1:] if name not in sizes), None)
    if missing is not None:
        raise RecipeError(f"data.prior.sizes: give a size of {missing!r} too")
    return np.array([sizes[name] for name in classes[1:]], float)


def read_table(path: str, known: Known, what: str) -> dict[str, dict[int, dict[str, float]]]:
    """Return the numbers of a CSV file: case -> slice (0 without slices) -> class -> value.

    Args:
        path: Columns ``case``, ``slice`` where the prior is of slices, and one for each class.
        known: What the rows must cover.
        what: Key of the recipe, for messages.

    Raises:
        DataError: The file cannot be read, lacks a case or a class, or holds something that is no number.
    """
    try:
        with Path(path).expanduser().open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{what}: {path}: this table cannot be read ({error})") from error
    needed = ["case", *([] if known.slice_axis is None else ["slice"]), *known.classes[1:]]
    if lacking := [name for name in needed if not rows or name not in rows[0]]:
        raise DataError(f"{what}: {path}: the table has no column {lacking[0]!r}; it needs {', '.join(needed)}")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line, row in enumerate(rows, 2):
        try:
            values = {name: float(row[name]) for name in known.classes if row.get(name) not in (None, "")}
            position = int(row["slice"]) if known.slice_axis is not None else 0
        except (TypeError, ValueError):
            raise DataError(f"{what}: {path}, line {line}: a value is no number") from None
        if any(not np.isfinite(v) or v < 0 for v in values.values()) or any(n not in values for n in known.classes[1:]):
            raise DataError(f"{what}: {path}, line {line}: every class needs a number of at least 0")
        if position in found.setdefault(row["case"], {}):
            raise DataError(f"{what}: {path}, line {line}: case {row['case']!r} stands there twice")
        found[row["case"]][position] = values
    for case in known.cases:
        lacking_rows = set(range(known.parts(case))) - set(found.get(case, {}))
        if lacking_rows:
            part = "" if known.slice_axis is None else f", slice {min(lacking_rows)}"
            raise DataError(f"{what}: {path}: there is no row for case {case!r}{part}; every unlabelled case needs one")
    return found


def presence(tags: str, known: Known) -> Callable[[str], NDArray[np.bool_]]:
    """Return which foreground classes are present in a case [rows, K - 1], by tags.

    Args:
        tags: ``none`` (all are), ``truth`` (by the labels: extra supervision), or a CSV file of zeros and ones.
        known: What may be looked at.
    """
    if tags == "none":
        return lambda case: np.ones((known.parts(case), len(known.classes) - 1), bool)
    if tags == "truth":
        return lambda case: np.nan_to_num(known.counted(known.truth(case)))[:, 1:] > 0
    table = read_table(tags, known, "data.prior.tags")
    return lambda case: np.array(
        [[table[case][i][name] > 0 for name in known.classes[1:]] for i in range(known.parts(case))]
    )


def tag_mark(tags: str) -> str:
    """Return what must be said of a result that rests on such tags."""
    return "" if tags == "none" else "which classes are present was told for every unlabelled image"


def as_plain(ratios: Mapping[str, Ratios]) -> dict[str, Any]:
    """Return ratios as lists."""
    return {case: rows.tolist() for case, rows in ratios.items()}


def checked(ratios: Mapping[str, Ratios], known: Known) -> dict[str, Ratios]:
    """Return ratios that fit the cases.

    Raises:
        DataError: Something is missing, negative, or does not sum to 1 within 1 %.
    """
    found = {}
    for case in known.cases:
        rows = np.asarray(ratios[case], float)
        if rows.shape != (known.parts(case), len(known.classes)):
            raise DataError(f"data.prior: case {case!r} has a prior of shape {rows.shape}")
        given = rows[~np.isnan(rows).any(1)]
        if (given < 0).any() or (np.abs(given.sum(1) - 1) > 0.01).any():
            raise DataError(
                f"data.prior: the shares of case {case!r} are {np.round(given[0], 4).tolist()}; they must be at least 0 and "
                "sum to 1 within 1 %"
            )
        found[case] = rows
    return found

"""``labeleff answer``: what a person hands in, checked before anything of it is taken."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.bundle.geometry import grid_of, onto, read_labels
from labeleff.bundle.write import SCHEMA, Mode, expected, open_run
from labeleff.data.rounds import Answer, Asked, Region, Rounds
from labeleff.errors import DataError, LabeleffError, RunError
from labeleff.prepared import Prepared
from labeleff.rundir import RunDirectory

SHOWN = 5
"""Problems that are listed in full."""


@dataclass(frozen=True)
class Terms:
    """What is let pass on request.

    Args:
        partial: Take regions that are in order, and leave the others open.
        cannot_tell: Take voxels that were left at ``ignore`` as unknown for good; the region is charged.
        confirm: Take regions that are as they were predicted.
        done: Regions are finished, so that 0 in files with named segments is background; also listed in manifest.json.
        outside: What becomes of changes outside the regions: ``reject`` or ``drop``.
    """

    partial: bool = False
    cannot_tell: bool = False
    confirm: bool = False
    done: bool = False
    outside: Literal["reject", "drop"] = "reject"


@dataclass
class Handed:
    """What came of a folder that was handed in.

    Args:
        answer: What was taken, or None.
        problems: Why a region or a case was not, in words.
        notes: What else is to be said.
        open_regions: How many regions of the round are still open.
    """

    answer: Answer | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    open_regions: int = 0


def read_answer(
    run: Path,
    folder: Path,
    *,
    terms: Terms | None = None,
    by: str = "",
    seconds: float | None = None,
    cache: Path | None = None,
) -> Handed:
    """Take in the labels of a round: of all its open regions, or of none (with ``partial``, region by region).

    Args:
        run: The run directory.
        folder: What ``labeleff query`` wrote, edited.
        terms: What is let pass.
        by: Who labelled.
        seconds: How long that took.
        cache: Where prepared images are kept.

    Raises:
        RunError: Another process is at work in the run, or the folder belongs to another run or round.
        DataError: Something is wrong with the labels; nothing was taken.
    """
    terms = terms or Terms()
    with RunDirectory(run).locked():
        data, rounds = open_run(run, cache), Rounds(run)
        manifest = _manifest(folder, data, rounds)
        asked = rounds.get(manifest["round"])
        rounds.reconcile()
        handed = Handed()
        labels: dict[int, NDArray[np.uint8]] = {}
        waiting = {region.number for region in rounds.open_regions(asked.number)}
        for case in dict.fromkeys(region.case for region in asked.regions):
            own = [region for region in asked.regions if region.case == case]
            try:
                labels |= _Case(data, rounds, asked, manifest, folder, terms).read(own, waiting, handed)
            except LabeleffError as error:
                handed.problems.append(str(error))
        again = _handed_in_before(rounds, asked, {n: v for n, v in labels.items() if n not in waiting}, handed)
        labels = {number: label for number, label in labels.items() if number in waiting}
        if handed.problems and not terms.partial:
            more = f"; and {len(handed.problems) - SHOWN} more" if len(handed.problems) > SHOWN else ""
            raise DataError(
                "; ".join(handed.problems[:SHOWN]) + more + ". Nothing was taken; --partial takes the regions in order"
            )
        if labels:
            _look_twice(data, labels, handed)
            handed.answer = rounds.answer(asked.number, labels, author="person", by=by, seconds=seconds)
        elif again and not handed.problems:
            handed.notes.append("these labels were handed in before; nothing was charged")
        handed.open_regions = len(rounds.open_regions(asked.number))
        return handed


def _manifest(folder: Path, data: Prepared, rounds: Rounds) -> dict[str, Any]:
    """Return the manifest of a bundle of this run. Of it, nothing but numbers and names is used: no paths."""
    path = folder / "manifest.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        schema, name, split, number = found["schema"], found["run"], found["split"], found["round"]
        done, mode = found["done"], found["mode"]
        contents = {row["case"]: row["image_sha256"] for row in found["cases"]}
    except FileNotFoundError:
        raise RunError(f"{folder}: there is no manifest.json; give the folder that `labeleff query` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: damaged ({type(error).__name__}: {error}); write the round again with `labeleff query`"
        ) from error
    if schema != SCHEMA:
        raise RunError(f"{path}: written by another version of labeleff (schema {schema}); write the round again")
    if (name, split) != (data.recipe.name, data.split.hash):
        raise RunError(f"{path}: this bundle is of the run {name!r} (split {split}), not of {data.recipe.name!r}")
    if number not in rounds.numbers():
        raise RunError(f"{path}: the run has no round {number}; it has {rounds.numbers()}")
    if mode not in ("blank", "correct") or not all(isinstance(n, int) for n in done):
        raise RunError(f"{path}: done is a list of numbers of regions, mode is blank or correct")
    return {"round": number, "done": set(done), "mode": mode, "contents": contents}


@dataclass(frozen=True)
class _Case:
    """The reader of one case's file."""

    data: Prepared
    rounds: Rounds
    asked: Asked
    manifest: Mapping[str, Any]
    folder: Path
    terms: Terms

    def read(self, regions: Sequence[Region], waiting: set[int], handed: Handed) -> dict[int, NDArray[np.uint8]]:
        """Return the labels of regions that are in order; what is wrong with the others is added to the problems.

        Raises:
            DataError: The whole file cannot be used.
        """
        case, names = regions[0].case, self.data.task.classes
        if self.manifest["contents"].get(case) != self.data.store.content(case):
            raise DataError(f"case {case!r}: the image that was labelled is not the image of this run")
        path, array, named = self._file(case, handed)
        ours, locked = self._handed_out(regions, waiting)
        ignore = len(names)
        if not named and (wrong := np.setdiff1d(np.unique(array), np.arange(ignore + 1))).size:
            raise DataError(f"{path}: holds the value {wrong[0]}; labels are 0 … {ignore - 1}, and {ignore} for ignore")
        self._check_outside(path, array, ours, locked, regions, named=named, handed=handed)
        labels = {}
        for region in regions:
            label = array[region.box].copy()
            if named and (self.terms.done or region.number in self.manifest["done"]):
                label[label == NOTHING] = 0
            label[(label == ignore) | (label == NOTHING)] = IGNORE
            problem = self._problem(region, label.astype(np.uint8)) if region.number in waiting else ""
            if problem:
                handed.problems.append(problem)
            elif region.number in waiting or (label != IGNORE).all() or self.terms.cannot_tell:
                labels[region.number] = label.astype(np.uint8)
        return labels

    def _file(self, case: str, handed: Handed) -> tuple[Path, NDArray[np.int64], bool]:
        """Return the label file of a case on the stored grid [*S], and whether its values went by names."""
        found = [p for s in (".nii.gz", ".nii") if (p := self.folder / f"{case}_edit{s}").is_file()]
        if len(found) != 1:
            what = "there is no" if not found else "there are two files"
            raise DataError(f"case {case!r}: {what} {case}_edit.nii.gz in {self.folder}; one is needed")
        path = found[0]
        shape, affine = grid_of(self.data, case)
        stored, theirs = read_labels(path)
        array, turned = onto(stored, theirs, shape, affine, str(path))
        if turned:
            handed.notes.append(f"{path.name}: its axes were flipped or permuted, and have been turned back")
        values = array.astype(np.int64)
        table = path.with_name(f"{case}_edit.json")
        if named := table.is_file():
            values = _by_name(values, table, self.data.task.classes)
        own = values if len(self.data.store.shape(case)) == 3 else values[..., 0]
        return path, own, named

    def _handed_out(self, regions: Sequence[Region], waiting: set[int]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the label map that was handed out, and what may not change: voxels that were labelled before."""
        mode: Mode = self.manifest["mode"]
        still = [region for region in regions if region.number in waiting] or list(regions)
        return expected(self.data, self.rounds, self.asked, still, mode)

    def _check_outside(
        self,
        path: Path,
        array: NDArray[np.int64],
        ours: NDArray[np.uint8],
        locked: NDArray[np.bool_],
        regions: Sequence[Region],
        *,
        named: bool,
        handed: Handed,
    ) -> None:
        """Check that nothing but the regions was changed.

        Raises:
            DataError: Earlier labels were, or (unless they are to be dropped) voxels that nobody asked about.
        """
        inside = np.zeros(array.shape, bool)
        for region in regions:
            inside[region.box] = True
        # what is not painted in a file of named segments says nothing
        differs = (array != ours) & ~inside & ~(named & (array == NOTHING))
        if (changed := int((differs & locked).sum())) > 0:
            raise DataError(
                f"{path}: {changed} voxels were changed that had been labelled before (see the locked file)"
            )
        if (strayed := int(differs.sum())) > 0:
            text = f"{path.name}: {strayed} voxels outside the regions were changed"
            if self.terms.outside == "reject":
                raise DataError(f"{text}; undo that, or let it be dropped with --outside drop")
            handed.notes.append(f"{text}; dropped")

    def _problem(self, region: Region, label: NDArray[np.uint8]) -> str:
        """Return why a region cannot be taken; empty where it can."""
        where = f"case {region.case!r}, region {region.number}"
        unknown = int((label == IGNORE).sum())
        if unknown and not self.terms.cannot_tell:
            return (
                f"{where}: {unknown} of {label.size} voxels are still unlabelled; finish it, or say that it cannot be told "
                "with --cannot-tell"
            )
        if self.manifest["mode"] == "correct" and not self.terms.confirm:
            seen = self.rounds.prediction(self.asked.number, region.case)
            if seen is not None and np.array_equal(seen[region.box], label):
                return (
                    f"{where}: the labels are the prediction, voxel by voxel; if that is right, say so with --confirm"
                )
        return ""


NOTHING = -1
"""Value of a voxel that no named segment covers."""


def _by_name(values: NDArray[np.int64], table: Path, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return values in our order of classes, from a table ``[{name, idx}]`` of the program that wrote them.

    Raises:
        DataError: The table cannot be read, or names something that is no class, or a value has no name.
    """
    try:
        rows = json.loads(table.read_text())
        rows = rows if isinstance(rows, list) else rows.get("segments", rows.get("label_info"))
        names = {int(row["idx"]): str(row["name"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{table}: not a list of {{"name": …, "idx": …}} ({type(error).__name__}: {error})') from error
    known = {name.lower().replace(" ", "_"): value for value, name in enumerate([*classes, "ignore"])}
    found = np.full(values.shape, NOTHING, np.int64)
    for index, name in names.items():
        value = known.get(name.lower().replace(" ", "_"))
        if value is None:
            raise DataError(f"{table}: the segment {name!r} is no class; classes are {', '.join(classes)}, and ignore")
        found[values == index] = value
    unnamed = np.setdiff1d(np.unique(values), [0, *names])
    if unnamed.size:
        raise DataError(f"{table}: the value {unnamed[0]} of the labels has no name in it")
    return found


def _handed_in_before(rounds: Rounds, asked: Asked, labels: Mapping[int, NDArray[np.uint8]], handed: Handed) -> bool:
    """Return whether regions are in the folder that were answered before; other labels for them are a problem."""
    earlier = {
        n: label for answer in rounds.answers(asked.number) for n, label in rounds.labels(asked.number, answer).items()
    }
    for number, label in labels.items():
        if not np.array_equal(earlier[number], label):
            handed.problems.append(
                f"region {number} was answered before with other labels; what was handed in once is not changed"
            )
    return bool(labels)


def _look_twice(data: Prepared, labels: Mapping[int, NDArray[np.uint8]], handed: Handed) -> None:
    """Note what is possible and yet unlikely."""
    values = _values(labels.values())
    for value, name in enumerate(data.task.classes):
        if value and value not in values:
            handed.notes.append(f"no voxel of these {len(labels)} regions is {name!r}")


def _values(labels: Iterable[NDArray[np.uint8]]) -> set[int]:
    return {int(v) for label in labels for v in np.unique(label)}

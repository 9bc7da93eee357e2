"""What a run changed about its labels, as a table in which every change of a voxel stands once."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.errors import RunError
from labeleff.files import write_csv

FILE = "corrections.csv"
COLUMNS = (
    "revision", "stage", "step", "by", "from", "to", "cases", "voxels", "given_foreground", "share", "confidence",
)  # fmt: skip
UNKNOWN = "unknown"


def correction_rows(
    history: Iterable[Mapping[str, Any]], classes: Sequence[str], given_foreground: int
) -> list[dict[str, Any]]:
    """Return one row per revision, author and kind of change, in the order in which they were made.

    A voxel that is changed twice stands in two rows: the voxels of a revision are those in which it differs from the one
    before. ``share`` is that of the given foreground, ``confidence`` the mean over voxels of what the edits say; None
    where they say nothing.

    Args:
        history: What ``AnnotationStore.history`` returns.
        classes: Names, background first; IGNORE is ``unknown``.
        given_foreground: Foreground voxels of the labels as given.
    """
    names = dict(enumerate(classes)) | {IGNORE: UNKNOWN}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in history:
        for pair, voxels in entry["voxels"].items():
            before, after = (names[int(value)] for value in pair.split("->"))
            key = (entry["revision"], entry["stage"], entry["step"], entry["by"], before, after)
            row = rows.setdefault(key, {"cases": set(), "voxels": 0, "sure": 0.0, "said": 0})
            row["cases"].add(entry["case"])
            row["voxels"] += voxels
            if entry["confidence"] is not None:
                row["sure"] += entry["confidence"] * voxels
                row["said"] += voxels
    return [
        dict(zip(COLUMNS[:6], key, strict=True))
        | {
            "cases": len(row["cases"]),
            "voxels": row["voxels"],
            "given_foreground": given_foreground,
            "share": row["voxels"] / given_foreground if given_foreground else None,
            "confidence": row["sure"] / row["said"] if row["said"] else None,
        }
        for key, row in rows.items()
    ]


def write_corrections(folder: Path, store: AnnotationStore, cases: Sequence[str], classes: Sequence[str]) -> None:
    """Write ``corrections.csv`` into a run directory whose labels were revised.

    Args:
        folder: The run directory.
        store: Its labels.
        cases: Cases whose labels were given.
        classes: Names, background first.
    """
    if not store.revision:
        return
    foreground = 0
    for case in cases:
        given = store.read_given(case)
        foreground += int(((given > 0) & (given != IGNORE)).sum())
    write_csv(folder / FILE, COLUMNS, correction_rows(store.history(), classes, foreground))


def read_corrections(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``corrections.csv``; none where there is no such file.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [
                row
                | {key: int(row[key]) for key in ("revision", "stage", "step", "cases", "voxels", "given_foreground")}
                | {key: float(row[key]) if row[key] else None for key in ("share", "confidence")}
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: damaged ({error}); remove it, and the report does without its corrections") from error

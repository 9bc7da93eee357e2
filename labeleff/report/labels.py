"""What happened to the labels of a sweep's runs: how they were learnt, corrected, and how near they came to clean ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from labeleff.report.corrections import read_corrections
from labeleff.sweep.collect import Record

Row = dict[str, Any]
DIAGNOSED = ("early_learning", "memorisation", "label_iou")


def told(record: Record, what: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's ``metrics.jsonl`` that have a key; none where the file is gone."""
    path = record.folder / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else ():
        if f'"{what}"' in text:  # most lines are losses, and there may be many
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # torn: the run would have cut it off
            if what in line:
                yield line


def training_iou_rows(record: Record, head: Mapping[str, Any]) -> Iterator[Row]:
    """Yield one row per stage and class with the curve as it was last told, its points separated by spaces."""
    last = {line["stage"]: line["annotator"] for line in told(record, "annotator")}
    for stage, described in last.items():
        for c, name in _foreground(record):
            if f"iou/{c}" in described:
                since = described[f"due_since/{c}"]
                curve = " ".join("-" if value is None else repr(value) for value in described[f"iou/{c}"])
                yield {
                    **head,
                    "stage": stage,
                    "class": name,
                    "due_since": int(since) if since >= 0 else None,
                    "skipped": int(described.get(f"skipped/{c}", 0)),
                    "curve": curve,
                }


def diagnostic_rows(record: Record, head: Mapping[str, Any]) -> Iterator[Row]:
    """Yield one row per time of looking and class, compared with clean labels that training never saw."""
    for line in told(record, "diagnostics"):
        for c, name in _foreground(record):
            values = {what: line["diagnostics"][f"{what}/{c}"] for what in DIAGNOSED}
            yield {**head, "stage": line["stage"], "step": line["step"], "class": name, **values}


def correction_rows(records: Iterable[Record], head: Mapping[str, Any]) -> Iterator[Row]:
    """Yield one row per kind of change, summed over the runs of a method at a budget that made it."""
    changes: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for record in records:
        for row in read_corrections(record.folder):
            changes.setdefault((row["from"], row["to"]), []).append((record.name, row))
    for (before, after), found in changes.items():
        voxels = sum(row["voxels"] for _, row in found)
        given = sum({name: row["given_foreground"] for name, row in found}.values())
        said = [row for _, row in found if row["confidence"] is not None]
        sure = sum(row["confidence"] * row["voxels"] for row in said)
        yield {
            **head,
            "from": before,
            "to": after,
            "runs": len({name for name, _ in found}),
            "voxels": voxels,
            "share": voxels / given if given else None,
            "confidence": sure / sum(row["voxels"] for row in said) if said else None,
            "first_step": min(row["step"] for _, row in found),
            "last_step": max(row["step"] for _, row in found),
        }


def points(curve: str) -> list[float]:
    """Return the points of a curve as :func:`training_iou_rows` writes it; NaN where there is none."""
    return [float("nan") if value == "-" else float(value) for value in curve.split()]


def _foreground(record: Record) -> Sequence[tuple[int, str]]:
    return list(enumerate(record.summary["classes"]))[1:]

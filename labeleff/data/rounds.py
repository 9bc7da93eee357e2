"""Rounds of questions and their answers: what was asked, by whom it was answered, and what that cost.

A round is written once and never changed; answers are added beside it, each whole or not at all. Training applies them to
the :class:`~labeleff.data.annotations.AnnotationStore`. A run that goes back to an earlier checkpoint comes to the same
round again and finds its answers there: nothing is asked, and nothing charged, twice.

    rounds/001/asked.json           regions, and what they were chosen by
    rounds/001/predictions/CASE.npz what the network said of the cases that are asked about
    rounds/001/answers/001.json     who answered what, and when; its labels are in 001.npz
    ledger.jsonl                    one line per answered region, each with the hash of the line before
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.edits import Edit
from labeleff.errors import StoreError
from labeleff.files import write_atomically, write_json

FOLDER = "rounds"
LEDGER = "ledger.jsonl"
Answerer = Literal["oracle", "person"]
Labels = Mapping[int, NDArray[np.uint8]]


@dataclass(frozen=True)
class Region:
    """One box that somebody is asked to label.

    Args:
        number: From 1, within the round, best first.
        case: Whose.
        origin: First voxel of the box, in the stored case.
        size: Voxels per axis; the box lies inside the case.
        score: What it was chosen by.
        note: In words.
    """

    number: int
    case: str
    origin: tuple[int, ...]
    size: tuple[int, ...]
    score: float = 0.0
    note: str = ""

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as slices."""
        return tuple(slice(o, o + n) for o, n in zip(self.origin, self.size, strict=True))

    @property
    def voxels(self) -> int:
        """Voxels of the box."""
        return int(np.prod(self.size))


@dataclass(frozen=True)
class Asked:
    """A round of questions.

    Args:
        number: From 1, within the run.
        stage: Where training stood.
        step: Where training stood.
        revision: Labels that the questions were asked of.
        annotator: Name and options of what chose the regions.
        weights: SHA-256 of the weights that predicted.
        regions: What is asked.
        noted: Numbers that the annotator says of this round, such as budgets.
    """

    number: int
    stage: int
    step: int
    revision: int
    annotator: Mapping[str, Any]
    weights: str
    regions: tuple[Region, ...]
    noted: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """Labels of some regions of a round, as they were handed in.

    Args:
        number: From 1, within the round.
        author: ``oracle`` or ``person``.
        by: Name of the person, as given.
        time: When, in ISO form.
        seconds: Time spent, as told; None where nobody said.
        regions: Numbers of the regions that are answered.
        sha256: Of the file of labels.
        note: In words.
    """

    number: int
    author: Answerer
    by: str
    time: str
    seconds: float | None
    regions: tuple[int, ...]
    sha256: str
    note: str = ""


class Rounds:
    """The rounds of a run.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self.ledger_path = run / LEDGER

    # -- questions ------------------------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Return the numbers of all rounds, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(p.name) for p in found if re.fullmatch(r"\d{3,}", p.name) and (p / "asked.json").exists())

    def ask(self, asked: Asked, predictions: Iterable[tuple[str, NDArray[np.uint8]]] = ()) -> None:
        """Write a round. Its description comes last: a round that lacks it was never asked.

        Raises:
            StoreError: The round exists, or regions overlap.
        """
        folder = self._round(asked.number)
        if (folder / "asked.json").exists():
            raise StoreError(f"{folder}: this round was asked before")
        _check_apart(asked.regions)
        for case, label in predictions:
            write_atomically(folder / "predictions" / f"{case}.npz", _packed({"prediction": label}))
        write_json(folder / "asked.json", asdict(asked))

    def get(self, number: int) -> Asked:
        """Return a round.

        Raises:
            StoreError: There is none, or its description is damaged.
        """
        path = self._round(number) / "asked.json"
        try:
            row = json.loads(path.read_text())
            regions = tuple(
                Region(r["number"], r["case"], tuple(r["origin"]), tuple(r["size"]), r["score"], r["note"])
                for r in row.pop("regions")
            )
            return Asked(regions=regions, **row)
        except FileNotFoundError:
            raise StoreError(
                f"{path.parent}: there is no round {number}; the run has {len(self.numbers())} of them"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: damaged ({type(error).__name__}: {error})") from error

    def at(self, stage: int, step: int) -> Asked | None:
        """Return the round that was asked at a step of a stage, if there was one."""
        return next((a for a in map(self.get, self.numbers()) if (a.stage, a.step) == (stage, step)), None)

    def prediction(self, number: int, case: str) -> NDArray[np.uint8] | None:
        """Return what the network said of a case [*S] when the round was asked; None where it was not kept."""
        path = self._round(number) / "predictions" / f"{case}.npz"
        return _unpacked(path)["prediction"] if path.exists() else None

    def asked_of(self, case: str, before: int | None = None) -> tuple[Region, ...]:
        """Return all regions of a case that rounds (those before a number) asked about."""
        rounds = (self.get(n) for n in self.numbers() if before is None or n < before)
        return tuple(region for asked in rounds for region in asked.regions if region.case == case)

    # -- answers --------------------------------------------------------------------------------------------------------

    def answers(self, number: int) -> list[Answer]:
        """Return what was handed in for a round, in order."""
        found = sorted((self._round(number) / "answers").glob("*.json"))
        answers = []
        for path in found:
            try:
                row = json.loads(path.read_text())
                row["regions"] = tuple(row["regions"])
                answers.append(Answer(**row))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}: damaged ({type(error).__name__}: {error})") from error
        return answers

    def labels(self, number: int, answer: Answer) -> dict[int, NDArray[np.uint8]]:
        """Return the labels [*size] of the regions of an answer; IGNORE where it could not be told.

        Raises:
            StoreError: The file is gone, or was changed after it was handed in.
        """
        path = self._round(number) / "answers" / f"{answer.number:03d}.npz"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: the labels of this answer cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != answer.sha256:
            raise StoreError(f"{path}: these labels were changed after they were handed in; restore the file")
        return {int(name): label for name, label in _unpacked(path).items()}

    def open_regions(self, number: int) -> tuple[Region, ...]:
        """Return the regions of a round that nobody has answered yet."""
        done = {region for answer in self.answers(number) for region in answer.regions}
        return tuple(region for region in self.get(number).regions if region.number not in done)

    def answer(
        self,
        number: int,
        labels: Labels,
        *,
        author: Answerer,
        by: str = "",
        seconds: float | None = None,
        note: str = "",
    ) -> Answer:
        """Take in labels of regions that are open, whole or not at all, and charge them to the ledger.

        Raises:
            StoreError: A region is not asked about or was answered before, or a label does not fit its region.
        """
        waiting = {region.number: region for region in self.open_regions(number)}
        for key, label in labels.items():
            if key not in waiting:
                raise StoreError(f"round {number}: region {key} is not open: it was not asked, or answered before")
            if label.shape != waiting[key].size or label.dtype != np.uint8:
                raise StoreError(
                    f"round {number}: the label of region {key} is {label.dtype} {label.shape}; "
                    f"uint8 {waiting[key].size} is needed"
                )
        content = _packed({str(key): labels[key] for key in sorted(labels)})
        folder = self._round(number) / "answers"
        answer = Answer(
            number=len(self.answers(number)) + 1,
            author=author,
            by=by,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds=seconds,
            regions=tuple(sorted(labels)),
            sha256=hashlib.sha256(content).hexdigest(),
            note=note,
        )
        write_atomically(folder / f"{answer.number:03d}.npz", content)
        write_json(folder / f"{answer.number:03d}.json", asdict(answer))
        self.reconcile()
        return answer

    def edits(self, number: int) -> Iterator[Edit]:
        """Yield the labels of a round as changes, region by region; what could not be told stays unknown."""
        asked = {region.number: region for region in self.get(number).regions}
        for answer in self.answers(number):
            for key, label in self.labels(number, answer).items():
                region = asked[key]
                yield Edit(
                    region.case,
                    label,
                    answer.author,
                    origin=region.origin,
                    mask=label != IGNORE,
                    note=f"round {number}, region {key}",
                )

    # -- ledger ---------------------------------------------------------------------------------------------------------

    def ledger(self) -> list[dict[str, Any]]:
        """Return the lines of the ledger, oldest first; a torn last line is left out."""
        lines = self.ledger_path.read_text().splitlines() if self.ledger_path.exists() else []
        found = []
        for position, text in enumerate(lines):
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError as error:
                if position + 1 < len(lines):
                    raise StoreError(f"{self.ledger_path}: line {position + 1} is damaged ({error})") from error
        return found

    def reconcile(self) -> None:
        """Add the lines of answers that were taken in but, the process having died, not charged."""
        lines = self.ledger()
        charged = {(line["round"], line["answer"]) for line in lines}
        new = []
        previous = _hash(lines[-1]) if lines else ""
        for number in self.numbers():
            for answer in self.answers(number):
                if (number, answer.number) not in charged:
                    for line in self._lines(number, answer):
                        new.append(line | {"previous": previous})
                        previous = _hash(new[-1])
        if new or (self.ledger_path.exists() and not self.ledger_path.read_bytes().endswith(b"\n")):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines + new)
            write_atomically(self.ledger_path, text)

    def verify(self) -> None:
        """Check the chain of the ledger, and that it tells of every answer as it lies there.

        Raises:
            StoreError: Something was changed, removed or added.
        """
        lines, previous = self.ledger(), ""
        for position, line in enumerate(lines):
            if line["previous"] != previous:
                raise StoreError(f"{self.ledger_path}: line {position + 1} does not follow the one before it")
            previous = _hash(line)
        wanted = [line for n in self.numbers() for answer in self.answers(n) for line in self._lines(n, answer)]
        told = [{k: v for k, v in line.items() if k != "previous"} for line in lines]
        # answers are charged as they come, which need not be the order of rounds
        if sorted(map(_hash, told)) != sorted(map(_hash, wanted)):
            raise StoreError(f"{self.ledger_path}: it does not tell of the answers under {self.folder} as they are")

    def _lines(self, number: int, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield what one answer is charged with, a line per region."""
        asked = self.get(number)
        regions = {region.number: region for region in asked.regions}
        labels = self.labels(number, answer)
        share = answer.seconds / len(labels) if answer.seconds is not None else None
        for key, label in labels.items():
            region = regions[key]
            values, counts = np.unique(label[label != IGNORE], return_counts=True)
            yield {
                "time": answer.time,
                "round": number,
                "stage": asked.stage,
                "step": asked.step,
                "answer": answer.number,
                "region": key,
                "case": region.case,
                "origin": list(region.origin),
                "size": list(region.size),
                "voxels": region.voxels,
                "labelled": int(counts.sum()),
                "unknown": region.voxels - int(counts.sum()),
                "foreground": int(counts[values > 0].sum()),
                "classes": {str(v): int(n) for v, n in zip(values, counts, strict=True)},
                "boundary": boundary_voxels(label),
                "author": answer.author,
                "by": answer.by,
                "seconds": share,
                "label_sha256": hashlib.sha256(label.tobytes()).hexdigest(),
                "annotator": asked.annotator["name"],
                "weights": asked.weights,
            }

    def _round(self, number: int) -> Path:
        return self.folder / f"{number:03d}"


def boundary_voxels(label: NDArray[np.uint8]) -> int:
    """Return how many known voxels [*S] have a face neighbour of another known class: what takes a person time."""
    at = np.zeros(label.shape, bool)
    for axis in range(label.ndim):
        one = tuple(slice(None, -1) if a == axis else slice(None) for a in range(label.ndim))
        two = tuple(slice(1, None) if a == axis else slice(None) for a in range(label.ndim))
        differ = (label[one] != label[two]) & (label[one] != IGNORE) & (label[two] != IGNORE)
        at[one] |= differ
        at[two] |= differ
    return int(at.sum())


def slices_touched(regions: Iterable[Region], axis: int) -> int:
    """Return in how many slices, counted per case, regions lie."""
    return len(
        {
            (region.case, position)
            for region in regions
            for position in range(region.origin[axis], region.origin[axis] + region.size[axis])
        }
    )


def _check_apart(regions: Sequence[Region]) -> None:
    by_case: dict[str, list[Region]] = {}
    for region in regions:
        by_case.setdefault(region.case, []).append(region)
    for own in by_case.values():
        origin, size = np.array([r.origin for r in own]), np.array([r.size for r in own])
        for i in range(len(own) - 1):
            both = (origin[i + 1 :] < origin[i] + size[i]) & (origin[i] < (origin + size)[i + 1 :])
            if (meet := np.flatnonzero(both.all(1))).size:
                one, two = own[i].number, own[i + 1 + int(meet[0])].number
                raise StoreError(f"case {own[i].case!r}: regions {one} and {two} of a round overlap")


def _packed(arrays: Mapping[str, NDArray[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _unpacked(path: Path) -> dict[str, NDArray[np.uint8]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path}: damaged ({error})") from error


def _hash(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

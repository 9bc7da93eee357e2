"""Questions of an annotator and who answers them: the hidden labels of training cases (``oracle``), or people."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from labeleff.data.annotations import AnnotationStore
from labeleff.data.rounds import Asked, Region, Rounds, slices_touched
from labeleff.edits import Edit, Question
from labeleff.errors import RecipeError
from labeleff.prepared import Prepared

T = TypeVar("T", Edit, Question)


def edits_or_questions(found: Iterable[Edit | Question], annotator: str) -> Iterator[Edit] | list[Question]:
    """Return what an annotator yields: its edits one by one, or all of its questions.

    Raises:
        RecipeError: It does both in one revision: the questions of a round would be answered without its edits.
    """
    stream = iter(found)
    first = next(stream, None)
    whole = itertools.chain(() if first is None else (first,), stream)
    if isinstance(first, Question):
        return [_as(Question, one, annotator) for one in whole]
    return (_as(Edit, one, annotator) for one in whole)


def _as(kind: type[T], one: Edit | Question, annotator: str) -> T:
    if not isinstance(one, kind):
        raise RecipeError(f"{annotator}: an annotator either asks or makes changes itself in a revision, not both")
    return one


def regions_of(questions: Iterable[Question], data: Prepared) -> tuple[Region, ...]:
    """Return the regions of a round: numbered from 1, clipped to their cases, empty ones left out."""
    regions: list[Region] = []
    for question in questions:
        shape = data.store.shape(question.case)
        start = [max(0, o) for o in question.origin]
        stop = [min(n, o + s) for n, o, s in zip(shape, question.origin, question.size, strict=True)]
        if all(b > a for a, b in zip(start, stop, strict=True)):
            size = tuple(b - a for a, b in zip(start, stop, strict=True))
            regions.append(
                Region(len(regions) + 1, question.case, tuple(start), size, float(question.score), question.note)
            )
    return tuple(regions)


def current_label(annotations: AnnotationStore, rounds: Rounds, case: str) -> NDArray[np.uint8]:
    """Return the label [*S] of a training case as it is known now: answers that training has not applied yet are in it."""
    label = annotations.read(case, revision=annotations.revision)
    for number in rounds.numbers():
        for edit in rounds.edits(number):
            if edit.case == case and edit.origin is not None and edit.mask is not None:
                box = tuple(slice(o, o + n) for o, n in zip(edit.origin, edit.label.shape, strict=True))
                label[box] = np.where(edit.mask, edit.label, label[box])
    return label


def answer_by_oracle(data: Prepared, rounds: Rounds, number: int) -> None:
    """Answer the open regions of a round from the labels that were kept from training. Test labels are never among them."""
    open_regions = rounds.open_regions(number)
    if not open_regions:
        return
    labels: dict[int, NDArray[np.uint8]] = {}
    for case, own in itertools.groupby(sorted(open_regions, key=lambda r: (r.case, r.number)), key=lambda r: r.case):
        truth = data.hidden_label(case)
        labels |= {region.number: np.ascontiguousarray(truth[region.box]) for region in own}
    rounds.answer(number, labels, author="oracle", by="oracle")


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers of a network."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_words(asked: Asked, data: Prepared) -> str:
    """Return what a round asks for."""
    cases = len({region.case for region in asked.regions})
    voxels = sum(region.voxels for region in asked.regions)
    text = f"{len(asked.regions)} regions ({voxels} voxels) in {cases} cases"
    if data.manifest.axes == 3:
        text += f", {slices_touched(asked.regions, data.manifest.slice_axis)} slices"
    return text


def still_open(rounds: Rounds, asked: Asked) -> str:
    """Return what is said where people have to answer before training can go on; empty where they have."""
    run, still = rounds.folder.parent, rounds.open_regions(asked.number)
    if not still:
        return ""
    return (
        f"round {asked.number} waits for labels of {len(still)} of {len(asked.regions)} regions: "
        f"`labeleff query {run}` writes them out for a person, `labeleff answer {run} FOLDER` reads them back; "
        "then run the same command again"
    )


def summary(rounds: Rounds, slice_axis: int | None) -> list[dict[str, Any]]:
    """Return per round what was asked and what came back, for the summary of a run."""
    rows = []
    charged = rounds.ledger()
    for number in rounds.numbers():
        asked = rounds.get(number)
        lines = [line for line in charged if line["round"] == number]
        told = [line["seconds"] for line in lines if line["seconds"] is not None]
        rows.append(
            {
                "round": number,
                "stage": asked.stage,
                "step": asked.step,
                "regions": len(asked.regions),
                "voxels": sum(region.voxels for region in asked.regions),
                "slices": None if slice_axis is None else slices_touched(asked.regions, slice_axis),
                "answered": len(lines),
                "labelled": sum(line["labelled"] for line in lines),
                "foreground": sum(line["foreground"] for line in lines),
                "boundary": sum(line["boundary"] for line in lines),
                "seconds": sum(told) if told else None,
                "authors": sorted({line["author"] for line in lines}),
            }
        )
    return rows

"""From several people's labels of a case to the one that is learnt from or measured against, and a record of how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest
from labeleff.errors import RecipeError
from labeleff.functional.raters import agreement, disagreement, majority, need_staple, staple

Fusion = Literal["majority", "staple", "random", "soft"]


def check_fusion(manifest: Manifest, how: Fusion) -> None:
    """Find out before anything is read whether several labels can be made one as asked.

    Raises:
        RecipeError: There is nothing to fuse.
        DataError: ``staple`` without SimpleITK.
    """
    if how != "majority" and not any(case.raters for case in manifest.cases):
        raise RecipeError(
            f"data.raters is {how}, but no case of {manifest.name} has several raters; leave it out, or name their labels "
            "in data.dataset"
        )
    if how == "staple":
        need_staple()


def check_alone(manifest: Manifest, where: str) -> None:
    """Refuse several raters where a clean label is to be made wrong: what they say would stay, and nothing of it is clean.

    Raises:
        RecipeError: A case has raters.
    """
    if any(case.raters for case in manifest.cases):
        raise RecipeError(
            f"{where}: cases of {manifest.name} have labels by several raters, who err by themselves; use the data set "
            "without its raters"
        )


def fuse(votes: NDArray[np.uint8], how: Fusion, *, case: str, draw: int) -> NDArray[np.uint8]:
    """Return the one label [*S] that a case is learnt from.

    Args:
        votes: [R, *S].
        how: ``majority`` or ``staple``, see ``functional.raters``; ``random``: the label of one rater, a function of the
            draw and the case; ``soft``: the majority, for everything that does not learn from all raters at once.
        case: Name of the case.
        draw: Which random draw.

    Raises:
        DataError: ``staple`` without SimpleITK.
    """
    if how == "random":
        chosen: NDArray[np.uint8] = votes[derive_seed("rater", draw, case) % len(votes)]
        return chosen
    return staple(votes) if how == "staple" else majority(votes)


def reference(dataset: DataSet, case: Case, how: Fusion) -> NDArray[np.uint8]:
    """Return the label [*S] that a case is measured against, on the grid the case came in.

    It is the publishers' consensus where there is one. Several raters are fused by STAPLE where training fuses them so, and
    by majority otherwise; never by chance.

    Args:
        dataset: Reads labels.
        case: An evaluation case.
        how: ``data.raters`` of the recipe.

    Raises:
        DataError: A label cannot be read.
    """
    if case.label is not None:
        return dataset.read_label(case)
    return fuse(dataset.read_votes(case), "staple" if how == "staple" else "majority", case=case.id, draw=0)


def record(votes: Iterable[tuple[str, NDArray[np.uint8]]], classes: Sequence[str], how: Fusion) -> dict[str, Any]:
    """Return how far the raters of some cases agree, as plain values for JSON; null where a class occurs nowhere.

    Per foreground class: mean and lowest Dice of two raters over all pairs of all cases, and how many pairs there were. Per
    case: the mean over its pairs, and ``disputed``: the mean of ``functional.raters.disagreement`` over the voxels that
    anybody calls foreground.

    Args:
        votes: Case and [R, *S], one case after the other; cases of one rater are left out.
        classes: Names, background first.
        how: ``data.raters`` of the recipe.
    """
    cases: list[dict[str, Any]] = []
    pairs: dict[str, list[float]] = {name: [] for name in classes[1:]}
    for case, own in votes:
        if len(own) < 2:
            continue
        table = agreement(own, len(classes))[np.triu_indices(len(own), 1)]  # [pairs, K]
        found = {name: _known(table[:, index]) for index, name in enumerate(classes) if index}
        for name, values in found.items():
            pairs[name] += values
        cases.append(
            {
                "case": case,
                "raters": len(own),
                "disputed": round(disputed(own, len(classes)), 6),
                "dice": {name: _mean(values) for name, values in found.items()},
            }
        )
    dice = {
        name: {"mean": _mean(values), "lowest": min(values, default=None), "pairs": len(values)}
        for name, values in pairs.items()
    }
    return {"fusion": how, "dice": dice, "cases": cases}


def in_words(found: Mapping[str, Any]) -> str:
    """Return a :func:`record` in one line."""
    dice = [f"{name} {values['mean']:.3f}" for name, values in found["dice"].items() if values["mean"] is not None]
    number, how = len(found["cases"]), found["fusion"]
    return f"{number} labelled cases have several raters ({how}); mean Dice between two: {', '.join(dice) or 'unknown'}"


def disputed(votes: NDArray[np.uint8], num_classes: int) -> float:
    """Return the mean disagreement, in [0, 1], over the voxels that anybody calls foreground; 0 where nobody does."""
    marked = ((votes > 0) & (votes < num_classes)).any(0)
    return float(disagreement(votes, num_classes)[marked].mean()) if marked.any() else 0.0


def _known(values: NDArray[np.float64]) -> list[float]:
    return [round(float(v), 6) for v in values if not math.isnan(v)]


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 6) if values else None

"""What is said of the data of a run: counts, and all that a reader must know beside its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labeleff import registry
from labeleff.data import raters
from labeleff.prepared import Prepared
from labeleff.recipe import Recipe
from labeleff.strategies.base import Strategy


def describe(prepared: Prepared) -> dict[str, Any]:
    """Return counts for the terminal and the summary."""
    split = prepared.split

    def patients(ids: tuple[str, ...]) -> int:
        return len({prepared.manifest.case(i).patient for i in ids})

    return {
        "dataset": prepared.manifest.name,
        "classes": list(prepared.task.classes),
        "split": split.hash,
        "labelled_patients": patients(split.labelled),
        "unlabelled_patients": patients(split.unlabelled),
        "validation_patients": patients(split.validation),
        "test_patients": patients(split.test),
        "evaluated_on": split.evaluate_on,
        "audit": prepared.audit.verdict,
        **({"left_out": {role: list(names) for role, names in prepared.left_out.items()}} if prepared.left_out else {}),
        "notes": [
            *_left_out_notes(prepared),
            *_window_notes(prepared),
            *split.notes,
            *([prepared.prior_mark] if prepared.prior_mark else []),
            *(start.note for start in prepared.starts if start.note),
            *_rater_notes(prepared),
            *_query_notes(prepared.recipe),
            *_partition_notes(prepared),
            *prepared.audit.warnings,
        ],
    }


def _left_out_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which cases the run does without; those of the test are missing from its result."""
    for role, names in prepared.left_out.items():
        every = len(names) + len(prepared.manifest.of_role(role))
        text = f"data.leave_out: {len(names)} of {every} {role} cases are left out ({', '.join(names)})"
        yield f"{text}: the result is of the others alone" if role == "test" else text


def _window_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which images a window leaves nothing of."""
    window, flat = prepared.recipe.data.window, prepared.store.constant()
    if window is not None and flat:
        more = ", …" if len(flat) > 5 else ""
        yield (
            f"data.window: {len(flat)} of {len(prepared.store.ids)} images are constant in [{window[0]:g}, {window[1]:g}] "
            f"({', '.join(flat[:5])}{more}): are they in other units?"
        )


def _query_notes(recipe: Recipe) -> Iterator[str]:
    """Yield what a reader must know of who was asked for labels."""
    for index, stage in enumerate(recipe.stages):
        if stage.annotator is None or stage.answers == "nobody":
            continue
        if registry.get("annotator", stage.annotator.name).oracle:  # type: ignore[attr-defined]  # a class of annotators
            yield f"stages.{index}: {stage.annotator.name} chose what to ask by the hidden labels: a bound, not a result"
        if stage.answers == "oracle":
            yield f"stages.{index}: questions were answered from hidden labels of training cases: a simulation of people"


def _partition_notes(prepared: Prepared) -> Iterator[str]:
    """Yield which cases a stage cannot cut into parts."""
    for index, stage in enumerate(prepared.recipe.stages):
        for parts, count in prepared.too_short(stage).items():
            yield f"stages.{index}: {count} cases have fewer than {parts} places along axis {prepared.through} and are left out"


def _rater_notes(prepared: Prepared) -> Iterator[str]:
    """Yield what a reader must know of cases with several raters."""
    how = prepared.recipe.data.raters
    if prepared.raters is not None:
        yield raters.in_words(prepared.raters)
    if how == "soft":
        for index, stage in enumerate(prepared.recipe.stages):
            strategy: Strategy = registry.made("strategy", stage.strategy)
            if not strategy.soft_labels:
                yield f"stages.{index}: {stage.strategy.name} as set does not learn from soft labels, but from the majority"
    if any(case.label is None for case in prepared.evaluation_cases("test")):
        yield f"evaluated against {'STAPLE' if how == 'staple' else 'the majority'} of the raters where there is no consensus"

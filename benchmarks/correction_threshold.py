"""How sure a prediction must be before ``label_correction`` writes it over a label: thresholds weighed on development patients.

Trains ADELE on wrong labels and on clean ones, on a population that no benchmark uses, and keeps what the network said of
the training cases whenever labels were revised. Afterwards the same revisions are made again from the given labels at every
threshold: how much of the foreground is changed, and how near labels come to the clean ones. Training itself saw the labels
that the default made. Writes ``results/correction_threshold.json``.

    python benchmarks/correction_threshold.py
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from common import provenance, write
from memorisation import dice_of, overlap
from numpy.typing import NDArray

from labeleff import registry
from labeleff.annotators.label_correction import LabelCorrection
from labeleff.batch import Progress
from labeleff.data.annotations import AnnotationStore
from labeleff.edits import Edit, Reviewed
from labeleff.labels import HIDDEN
from labeleff.process import set_up_process
from labeleff.recipe import Recipe
from labeleff.registry import Component, register
from labeleff.runner import run
from labeleff.sweep.benchmark import load_benchmark
from labeleff.sweep.grid import expand

BENCHMARK = "noise_phantom"
METHODS = {"adele": "wrong labels", "adele_clean_labels": "clean labels"}
THRESHOLDS = (0.7, 0.8, 0.9, 0.93, 0.95, 0.97, 0.99)
POPULATION = 777
DRAWS = (900, 901, 902, 903)
CLASSES = 4


@dataclass(frozen=True)
class Revision:
    """The classes that were due, and what the network said of each case: probabilities [K, *S] in half precision."""

    due: list[int]
    probs: dict[str, torch.Tensor]


@register("annotator", "remembered_label_correction")
class Remembered(LabelCorrection):
    """``label_correction`` that keeps what its decisions rest upon."""

    revisions: ClassVar[list[Revision]] = []
    given: ClassVar[dict[str, NDArray[np.uint8]]] = {}

    def _due(self, progress: Progress) -> list[int]:
        found = super()._due(progress)
        if found:
            self.revisions.append(Revision(found, {}))
        return found

    def _edits(self, case: Reviewed, due: list[int], note: str) -> Iterator[Edit]:
        self.given[case.case] = case.given
        self.revisions[-1].probs[case.case] = case.probs.mean(0).half()
        yield from super()._edits(case, due, note)


def replayed(options: dict[str, Any], threshold: float) -> dict[str, NDArray[np.uint8]]:
    """Return the labels that the remembered revisions lead to at a threshold."""
    annotator = registry.made("annotator", Component("label_correction", {**options, "threshold": threshold}))
    labels = dict(Remembered.given)
    for revision in Remembered.revisions:
        for case, probs in revision.probs.items():
            labels[case] = annotator._corrected(torch.from_numpy(labels[case]), probs.float(), revision.due)
    return labels


def dice(labels: NDArray[np.uint8], clean: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Dice of each class over all voxels of all cases."""
    return dice_of(overlap(labels, clean, np.ones(clean.shape, bool), CLASSES))


def measured(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Train, and return one row per threshold."""
    stage = recipe.stages[0]
    options = dict(stage.annotator.options)
    stage = replace(stage, annotator=Component("remembered_label_correction", options))
    data = replace(recipe.data, dataset=Component("phantom", {**recipe.data.dataset.options, "seed": POPULATION}))
    run(replace(recipe, data=data, stages=(stage,), evaluation=replace(recipe.evaluation, pictures=False)), folder)
    cases = list(Remembered.given)
    given = np.stack([Remembered.given[case] for case in cases])
    hidden = AnnotationStore.open(folder / HIDDEN) if (folder / HIDDEN).exists() else None
    clean = np.stack([hidden.read(case, revision=0) for case in cases]) if hidden else given
    before, rows = dice(given, clean), []
    for threshold in THRESHOLDS:
        found = replayed(options, threshold)
        labels = np.stack([found[case] for case in cases])
        changed = int((labels != given).sum()) / int((given > 0).sum())
        nearer = (dice(labels, clean) - before).tolist()
        rows.append({"threshold": threshold, "changed_share_of_foreground": changed, "nearer": nearer})
    return rows


def one(method: str, draw: int) -> list[dict[str, Any]]:
    """Return the rows of one run; a process of its own makes it, since what is remembered is the process's."""
    set_up_process(1)
    recipe = next(job.recipe for job in expand(load_benchmark(BENCHMARK)).jobs if job.method == method)
    recipe = replace(recipe, seed=draw, data=replace(recipe.data, draw=draw))
    with TemporaryDirectory() as folder:
        rows = measured(recipe, Path(folder))
    return [{"labels": METHODS[method], "draw": draw, **row} for row in rows]


def main() -> None:
    """Train every method and draw, weigh, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=len(DRAWS))
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with ProcessPoolExecutor(given.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        cells = [(method, draw) for draw in DRAWS[: given.draws] for method in METHODS]
        rows = [row for found in pool.map(one, *zip(*cells, strict=True)) for row in found]
    write("correction_threshold", {**provenance(), "benchmark": BENCHMARK, "population": POPULATION, "rows": rows})
    for labels, threshold in itertools.product(METHODS.values(), THRESHOLDS):
        own = [row for row in rows if (row["labels"], row["threshold"]) == (labels, threshold)]
        changed = [round(100 * row["changed_share_of_foreground"], 2) for row in own]
        nearer = np.mean([row["nearer"] for row in own], axis=0)
        print(
            f"{labels}, {threshold}: {changed} % changed; nearer to the clean ones by Dice {nearer.round(4).tolist()}"
        )


if __name__ == "__main__":
    main()

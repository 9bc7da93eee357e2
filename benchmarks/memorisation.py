"""Early learning and memorisation of wrong labels, seen against the clean ones that training never saw.

Trains the baseline (or another method) of a benchmark with label noise once per draw, keeps its weights on the way, and
afterwards measures at every snapshot: the test Dice and, where given and clean labels of the training cases differ, the IoU
per class of the predictions with the clean ones (early learning) and with the given ones (memorisation). From finished
runs of the sweep with an annotator it reads how near the corrected labels came to the clean ones. Writes
``results/NAME_memorisation.json`` and ``.png``.

    python benchmarks/memorisation.py noise_phantom --sweep runs/sweeps/noise_phantom
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, provenance, write
from scipy import stats

from labeleff import registry
from labeleff.data.annotations import AnnotationStore
from labeleff.evaluation.evaluate import evaluate
from labeleff.evaluation.inference import segment
from labeleff.labels import HIDDEN
from labeleff.prepare import prepare
from labeleff.process import set_up_process
from labeleff.recipe import Recipe
from labeleff.results import load_snapshot, snapshot_path
from labeleff.rundir import RunDirectory
from labeleff.runner import run
from labeleff.sweep.benchmark import load_benchmark
from labeleff.sweep.grid import expand


def overlap(one: np.ndarray, two: np.ndarray, where: np.ndarray, classes: int) -> np.ndarray:
    """Return voxels in common and in either [2, classes - 1] of two label maps."""
    both = [
        [((one == c) & (two == c) & where).sum(), (((one == c) | (two == c)) & where).sum()] for c in range(1, classes)
    ]
    return np.array(both).T


def dice_of(counts: np.ndarray) -> np.ndarray:
    """Return the Dice [classes - 1] of voxels in common and in either."""
    return 2 * counts[0] / np.maximum(counts[0] + counts[1], 1)


def followed(recipe: Recipe, folder: Path, cache: Path | None, every: int) -> list[dict[str, Any]]:
    """Train and return one row per snapshot."""
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, every=every, pictures=False))
    run(recipe, folder, cache=cache)
    data = prepare(recipe, folder, cache=cache)
    stage, hidden = recipe.stages[0], AnnotationStore.open(folder / HIDDEN)
    strategy = registry.made("strategy", stage.strategy)
    backbone = data.backbone(0)
    strategy.build(backbone, data.task)
    viewer, rows = data.viewer(backbone), []
    for step in range(every, stage.steps + 1, every):
        load_snapshot(snapshot_path(RunDirectory(folder), 0, step), backbone, strategy)
        tested = evaluate({"student": backbone}, data.evaluation_cases("test"), viewer, data.dataset.read_label)
        counts = np.zeros((2, 2, data.task.num_classes - 1))
        for case in data.split.labelled:
            predicted = segment(viewer.probabilities(backbone, case))
            given, clean = data.annotations.read_given(case), hidden.read(case, revision=0)
            for n, labels in enumerate((clean, given)):
                counts[n] += overlap(predicted, labels, given != clean, data.task.num_classes)
        early, memorised = (c[0] / np.maximum(c[1], 1) for c in counts)
        rows.append(
            {
                "draw": recipe.data.draw,
                "step": step,
                "dice": float(np.nanmean([row["dice"] for row in tested])),
                "early_learning": dict(zip(data.task.classes[1:], early.tolist(), strict=True)),
                "memorisation": dict(zip(data.task.classes[1:], memorised.tolist(), strict=True)),
            }
        )
        print(rows[-1]["draw"], step, round(rows[-1]["dice"], 3), early.round(2), memorised.round(2), flush=True)
    return rows


def corrected(folder: Path) -> dict[str, Any] | None:
    """Return how near the labels of a finished run came to the clean ones; None where nothing was corrected."""
    given = AnnotationStore.open(folder / "annotations")
    if not given.revision:
        return None
    summary, split = json.loads((folder / "summary.json").read_text()), json.loads((folder / "split.json").read_text())
    clean = AnnotationStore.open(folder / HIDDEN) if (folder / HIDDEN).exists() else given
    counts = np.zeros((2, 2, len(summary["classes"]) - 1))
    changed = foreground = 0
    for case in split["labelled"]:
        truth, before, after = (
            clean.read(case, revision=0),
            given.read_given(case),
            given.read(case, revision=given.revision),
        )
        for n, labels in enumerate((before, after)):
            counts[n] += overlap(labels, truth, np.ones(truth.shape, bool), len(summary["classes"]))
        changed, foreground = changed + int((before != after).sum()), foreground + int((before > 0).sum())
    dice = [dice_of(c) for c in counts]
    names = summary["classes"][1:]
    return {
        "run": folder.name,
        "dice_given": dict(zip(names, dice[0].tolist(), strict=True)),
        "dice_corrected": dict(zip(names, dice[1].tolist(), strict=True)),
        "changed_share_of_foreground": changed / max(foreground, 1),
    }


def draw(name: str, rows: list[dict[str, Any]]) -> None:
    """Draw test Dice, early learning and memorisation over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, key, title in zip(
        panels,
        ("dice", "early_learning", "memorisation"),
        ("test Dice", "wrong voxels: IoU with the clean labels", "wrong voxels: IoU with the given labels"),
        strict=True,
    ):
        for number in sorted({row["draw"] for row in rows}):
            own = [row for row in rows if row["draw"] == number]
            values = [row[key] if key == "dice" else float(np.mean(list(row[key].values()))) for row in own]
            axes.plot([row["step"] for row in own], values, color="0.35", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("steps of supervised training, one line per draw", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}_memorisation.png", metadata={"Software": None})


def main() -> None:
    """Follow, read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("--method", help="which method to follow, such as one with more steps; default: the baseline")
    parser.add_argument("--sweep", type=Path, help="folder of the finished sweep")
    parser.add_argument("--folder", type=Path, default=Path("runs/memorisation"))
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument(
        "--draws", type=int, default=6, help="how many are followed; 0: only read anew what became of the labels"
    )
    given = parser.parse_args()
    set_up_process(1)
    benchmark = load_benchmark(given.benchmark)
    method = given.method or benchmark.baseline
    jobs = [job for job in expand(benchmark).jobs if job.method == method][: given.draws]
    if given.draws and not jobs:
        parser.error(f"{given.benchmark} has no method {method!r}; it has {', '.join(benchmark.methods)}")
    rows = [row for job in jobs for row in followed(job.recipe, given.folder / job.name, None, given.every)]
    lost = []  # the peak is the best of many snapshots on the test cases: what is lost from it is never below 0
    for number in sorted({row["draw"] for row in rows}):
        own = [row["dice"] for row in rows if row["draw"] == number]
        lost.append(max(own) - own[-1])
    middle = None
    if len(lost) > 2:
        low, high = stats.t.interval(0.95, len(lost) - 1, np.mean(lost), stats.sem(lost))
        middle = {"mean": float(np.mean(lost)), "low": float(low), "high": float(high)}
    labels: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((given.sweep / "runs").iterdir()) if given.sweep else ():
        found = corrected(folder) if (folder / "summary.json").exists() and (folder / "annotations").exists() else None
        if found is not None:
            labels.setdefault(folder.name.split("-n")[0], []).append(found)
    result = {
        **provenance(),
        "benchmark": given.benchmark,
        "method": method,
        "rows": rows,
        "lost_from_peak": lost,
        "interval": middle,
    }
    file = f"{given.benchmark}_memorisation"
    if not given.draws and (RESULTS / f"{file}.json").exists():
        result = json.loads((RESULTS / f"{file}.json").read_text())
    write(file, {**result, "corrected": labels, "corrected_by": provenance()["commit"]})
    if rows:
        draw(given.benchmark, rows)
        print("lost from the peak:", [round(v, 3) for v in lost], middle)
    for name, found in labels.items():
        nearer = {c: [run["dice_corrected"][c] - run["dice_given"][c] for run in found] for c in found[0]["dice_given"]}
        changed = [run["changed_share_of_foreground"] for run in found]
        print(
            name,
            {c: np.round(values, 3).tolist() for c, values in nearer.items()},
            "changed:",
            np.round(changed, 4).tolist(),
        )


if __name__ == "__main__":
    main()

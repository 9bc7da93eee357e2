"""Does ``voco`` learn where crops come from? Predicted and true overlaps on patients it has not seen.

Pretrains the first stage of ``phantom/voco_3d`` (the default form) once per seed, and correlates predicted with true overlaps
of crops and cells of held-out patients, two windows at a time as in training, not augmented. Twice: with the cells of the
crop's own volume, and with those of another patient's, whose voxels no crop shares, so that nothing but anatomy can tell.

Controls: networks as drawn, and pretraining and patients of a phantom whose blocks are in another order in every patient,
where position says nothing. Intervals are over seeds and patients. Writes ``results/voco_position.json`` and ``.png``.

    python benchmarks/voco_position.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, provenance, write
from numpy.typing import NDArray
from torch import Tensor

from labeleff.batch import IGNORE, Batch, Progress, derive_seed
from labeleff.data.formats.phantom import Phantom
from labeleff.data.manifest import Case
from labeleff.evaluation.inference import evaluating
from labeleff.evaluation.statistics import interval
from labeleff.functional.voco import cosines, draw_boxes, grid_boxes, overlap_labels
from labeleff.recipe import Recipe
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.registry import register
from labeleff.rundir import RunDirectory
from labeleff.runner import Run, resolve, train
from labeleff.strategies.base import Strategy
from labeleff.strategies.voco import Voco
from labeleff.testing import toy_geometry

RECIPE, TEST, ASKED = "phantom/voco_3d", 60, 0.4
BLOCK = 14
"""Voxels along y and x of the blocks that are put in another order; along z, which has no cells, blocks are whole."""
ROUNDS = 4
"""Times that every patient is looked at, two new crops and another one beside each time."""
DRAWN = 2
"""Times as many networks as drawn as are trained: they cost nothing, and differ."""
ARMS = {
    "pretrained": "pretrained",
    "untrained": "as drawn, untrained",
    "shuffled": "pretrained and measured where blocks are in another order in everybody",
}
TENTHS = 10
CELLS = {"own": "its own volume", "other": "another patient"}

LINES = {
    "pretrained, own": ("pretrained, cells of its own volume", "tab:blue"),
    "pretrained, other": ("pretrained, cells of another patient", "tab:green"),
    "untrained, own": ("untrained, its own volume", "0.5"),
    "shuffled, own": ("anatomy shuffled, its own volume", "tab:pink"),
    "shuffled, other": ("anatomy shuffled, another patient", "tab:red"),
}


@register("dataset", "shuffled_phantom")
class ShuffledPhantom(Phantom):
    """Generated patients in whom nothing has a place: blocks in the plane are in an order that is drawn for every patient.

    What is cut is shifted before and after by numbers of voxels that are drawn, too, around the edges: seams tell no place.
    """

    def _generate(self, case: Case) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        image, label = super()._generate(case)
        return shuffled(image, case.id), shuffled(label, case.id)

    def fingerprint(self, case: Case) -> str:
        """Return everything the case is a function of."""
        return f"shuffled|{BLOCK}|{super().fingerprint(case)}"


def shuffled(volume: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Return a volume [z, y, x] whose blocks in the plane are in another order."""
    drawn = np.random.default_rng(derive_seed("shuffled", name))
    before, after = drawn.integers(volume.shape[1:]), drawn.integers(volume.shape[1:])
    depth, rows, columns = volume.shape[0], *(n // BLOCK for n in volume.shape[1:])
    cut = np.roll(volume, before, (1, 2)).reshape(depth, rows, BLOCK, columns, BLOCK).transpose(1, 3, 0, 2, 4)
    mixed = drawn.permutation(cut.reshape(rows * columns, depth, BLOCK, BLOCK)).reshape(cut.shape)
    return np.roll(mixed.transpose(2, 0, 3, 1, 4).reshape(volume.shape), after, (1, 2))


@dataclass
class Seen:
    """What is predicted of crops of held-out patients.

    Args:
        true: [patients, crops, K] overlaps.
        predicted: As many for each of CELLS.
        windows: [patients, *window] images.
        boxes: [patients, crops, 2, 3] where crops lie in the window, voxels.
        cells: [K, 2, 3] where cells lie.
    """

    true: NDArray[np.float32]
    predicted: dict[str, NDArray[np.float32]]
    windows: NDArray[np.float32]
    boxes: NDArray[np.int64]
    cells: NDArray[np.int64]


def look(run: Run, strategy: Strategy) -> Seen:
    """Show the networks of a run its test patients through the steps of its own strategy, and keep what these predict."""
    assert isinstance(strategy, Voco)  # noqa: S101
    strategy.flip = strategy.rot90 = strategy.offset_probability = 0.0
    windows = torch.stack(
        [middle(run.data.store.read(case.id), strategy.window) for case in run.data.evaluation_cases("test")]
    )
    cells = grid_boxes(windows.shape[2:], strategy.grid)
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in windows] for name in ("true", "boxes", *CELLS)}
    rows: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda *seen, who=who: rows.update({who: seen[-1]}))
        for who, part in (("student", strategy.projector), ("teacher", strategy.teacher_projector))
    ]
    with evaluating(run.backbone), evaluating(strategy), torch.no_grad():
        for number in range(ROUNDS):
            order = np.random.default_rng(number).permutation(len(windows))
            for pair in order.reshape(-1, 2):
                # of a later micro-batch: teachers stand still
                progress = Progress(number, ROUNDS, seed=int(pair[0]), micro=1)
                images = batch_of(windows[pair])
                notes = strategy.step(run.backbone, {"images": images}, progress).notes
                generators = progress.generators("crops", images.geometry.sample)
                boxes = torch.stack([draw_boxes(cells, strategy.crops, generator=own) for own in generators])
                true = overlap_labels(boxes, cells)
                own, other = predictions(rows, strategy.crops)
                same = float(np.corrcoef(own.flatten(), true.flatten())[0, 1])
                if abs(same - float(notes["correlation"])) > 1e-4:
                    raise RuntimeError(f"measured {same}, but the strategy notes {float(notes['correlation'])}")
                for name, values in {"true": true, "boxes": boxes, "own": own, "other": other}.items():
                    for patient, value in zip(pair, values, strict=True):
                        found[name][patient].append(value)
    for hook in hooks:
        hook.remove()
    kept = {name: torch.stack([torch.cat(own) for own in values]).numpy() for name, values in found.items()}
    return Seen(kept["true"], {name: kept[name] for name in CELLS}, windows[:, 0].numpy(), kept["boxes"], cells.numpy())


def middle(image: NDArray[np.float32], size: tuple[int, ...]) -> Tensor:
    """Return the middle of an image [C, *S]."""
    starts = [(n - own) // 2 for n, own in zip(image.shape[1:], size, strict=True)]
    return torch.from_numpy(image[(slice(None), *(slice(a, a + n) for a, n in zip(starts, size, strict=True)))].copy())


def batch_of(windows: Tensor) -> Batch:
    """Return windows [B, 1, *S] as a batch without labels."""
    label = torch.full((len(windows), *windows.shape[2:]), IGNORE)
    whole = torch.ones_like(windows, dtype=torch.bool)
    return Batch(windows, label, label, whole, toy_geometry(len(windows), tuple(windows.shape[2:])))


def predictions(rows: dict[str, Tensor], crops: int) -> tuple[Tensor, Tensor]:
    """Return what v1 predicts of the crops of two windows [2, n, K]: by the cells of their own, and of the other one."""
    parts = {who: values.view(2, -1, values.shape[1]) for who, values in rows.items()}
    x, q = ({who: values[:, part] for who, values in parts.items()} for part in (slice(crops), slice(crops, None)))

    def by(turn: int) -> Tensor:
        ways = [(x["student"], q["teacher"]), (x["teacher"], q["student"])]
        return torch.stack([cosines(crop, cell.roll(turn, 0)).relu() for crop, cell in ways]).mean(0)

    return by(0), by(1)


def pretraining(arm: str, seed: int, changes: list[str]) -> Recipe:
    """Return the pretraining of an arm: the recipe's first stage."""
    recipe = load_recipe(RECIPE, [f"data.dataset.test={TEST}", "trainer.threads=1", *changes])
    stage = replace(recipe.stages[0], steps=0) if arm == "untrained" else recipe.stages[0]
    dataset = replace(recipe.data.dataset, name="shuffled_phantom") if arm == "shuffled" else recipe.data.dataset
    return replace(
        recipe, name=f"voco-{arm}", seed=seed, data=replace(recipe.data, dataset=dataset), stages=(stage,), baseline=()
    )


def correlations(true: NDArray[np.float32], predicted: NDArray[np.float32]) -> list[float]:
    """Return the correlation of every patient over its crops and cells; 0 where all predictions are the same."""
    flat = [(t.ravel(), p.ravel()) for t, p in zip(true, predicted, strict=True)]
    return [float(np.corrcoef(t, p)[0, 1]) if p.std() > 0 else 0.0 for t, p in flat]


def measured(seen: Seen) -> dict[str, Any]:
    """Return correlations by patient and over all, and how often the cell that a crop overlaps most is told."""
    found: dict[str, Any] = {}
    for name, predicted in seen.predicted.items():
        hits = predicted.argmax(2) == seen.true.argmax(2)
        found[name] = {
            "patients": correlations(seen.true, predicted),
            "pooled": correlations(seen.true[None], predicted[None])[0],
            "nearest": float(hits.mean()),
        }
    return found


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean correlation of every arm, with its 95 % interval over pretraining seeds and patients."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        for name in CELLS:
            own = [row["measured"][name] for row in rows if row["arm"] == arm]
            middle_ = interval([one["patients"] for one in own])
            found[f"{arm}, {name}"] = {
                "correlation": middle_.value,
                "low": middle_.low,
                "high": middle_.high,
                "seeds": [float(np.mean(one["patients"])) for one in own],
                "nearest": float(np.mean([one["nearest"] for one in own])),
            }
    return found


def curve(seen: Seen, name: str) -> list[dict[str, float]]:
    """Return mean and quartiles of what is predicted where the true overlap is 0, and in tenths above."""
    true, predicted = seen.true.ravel(), seen.predicted[name].ravel()
    part = np.ceil(true * TENTHS).astype(int)
    rows = []
    for number in np.unique(part):
        low, middle_, high = np.quantile(predicted[part == number], [0.25, 0.5, 0.75])
        own = {
            "true": true[part == number].mean(),
            "mean": predicted[part == number].mean(),
            "count": (part == number).sum(),
        }
        rows.append({key: float(value) for key, value in {**own, "low": low, "median": middle_, "high": high}.items()})
    return rows


def draw(found: dict[str, Any], curves: dict[str, list[dict[str, float]]], seen: Seen) -> None:
    """Draw predicted against true overlaps of one seed, and some crops in their patients with the weights of the cells."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    left, right = parts
    axes = left.subplots()
    for (title, colour), (key, rows) in zip(LINES.values(), curves.items(), strict=True):
        x = [row["true"] for row in rows]
        label = f"{title}: r = {found[key]['correlation']:.2f} [{found[key]['low']:.2f}, {found[key]['high']:.2f}]"
        axes.plot(x, [row["mean"] for row in rows], color=colour, marker="o", markersize=3, label=label)
        if key == "pretrained, own":
            band = [row["low"] for row in rows], [row["high"] for row in rows]
            axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0, label="middle half of these")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--", label="perfect")
    axes.set_xlabel("true overlap of crop and cell (share of the crop)")
    axes.set_ylabel("predicted overlap, mean")
    axes.set_title("Held-out patients: first seed; correlation r over all seeds [95 %]", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(-0.02, 1.45)
    for patient, place in enumerate(right.subplots(2, 2).flat):
        draw_crop(place, seen, patient)
    right.suptitle(
        "First crop (blue) of four held-out patients, first seed:\npredicted (true) overlap with each cell", fontsize=10
    )
    figure.savefig(RESULTS / "voco_position.png", metadata={"Software": None})


def draw_crop(axes: Any, seen: Seen, patient: int) -> None:
    """Draw the middle slice of a patient, the cells with what is predicted and true of them, and the crop."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    window, box = seen.windows[patient], seen.boxes[patient, 0]
    axes.imshow(window[len(window) // 2], cmap="gray", interpolation="nearest")
    for cell, true, predicted in zip(seen.cells, seen.true[patient, 0], seen.predicted["own"][patient, 0], strict=True):
        corner, sides = cell[0, :0:-1] - 0.5, (cell[1] - cell[0])[:0:-1]
        colour = ("tab:orange", 0.6 * float(predicted))
        axes.add_patch(Rectangle(tuple(corner), *sides, facecolor=colour, edgecolor="white", linewidth=0.8))
        outline = [withStroke(linewidth=2, foreground="black")]  # legible on any grey
        how = {"color": "white", "fontsize": 7, "ha": "center", "va": "center", "path_effects": outline}
        axes.text(*(corner + sides / 2), f"{predicted:.2f}\n({true:.2f})", **how)
    corner, sides = box[0, :0:-1] - 0.5, (box[1] - box[0])[:0:-1]
    axes.add_patch(Rectangle(tuple(corner), *sides, fill=False, edgecolor="tab:cyan", linewidth=2))
    axes.set_axis_off()


def followed(arm: str, seed: int, folder: Path, changes: list[str]) -> tuple[dict[str, Any], Seen]:
    """Pretrain, go on with, or do neither, and return the row of a run and what it predicts."""
    recipe, own, cache = pretraining(arm, seed, changes), folder / f"{arm}-{seed}", folder / "cache"
    train(recipe, own, cache=cache)
    run = Run(resolve(recipe), RunDirectory(own), cache)
    seen = look(run, run.train())  # goes on from the last step, of which there is none left
    row: dict[str, Any] = {"arm": arm, "seed": seed, "seconds": run.seconds, "measured": measured(seen)}
    print(arm, seed, {name: round(found["pooled"], 3) for name, found in row["measured"].items()}, flush=True)
    return row, seen


def finish(rows: list[dict[str, Any]], first: dict[str, Seen], recipe: Recipe) -> None:
    """Write, draw and tell what all runs have in common."""
    found = summarised(rows)
    curves = {key: curve(first[key.split(", ")[0]], key.split(", ")[1]) for key in LINES}
    terms = {"recipe": to_mapping(recipe), "arms": ARMS, "cells": len(first["pretrained"].cells), "block": BLOCK}
    write("voco_position", {**provenance(), **terms, "asked": ASKED, "summary": found, "curves": curves, "runs": rows})
    draw(found, curves, first["pretrained"])
    for key, row in found.items():
        print(
            f"{key:20s} {row['correlation']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], nearest {row['nearest']:.2f}"
        )


def main() -> None:
    """Pretrain, look, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/voco_position"), help="of runs, which are resumed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe, to look at others"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--dry", action="store_true", help="write nothing, as with fewer arms")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    first: dict[str, Seen] = {}
    for arm in given.arms:
        for seed in range(given.seeds * (DRAWN if arm == "untrained" else 1)):
            row, seen = followed(arm, seed, given.folder, given.set)
            rows.append(row)
            first.setdefault(arm, seen)
    if not given.dry and len(first) == len(ARMS):
        finish(rows, first, pretraining("pretrained", 0, given.set))


if __name__ == "__main__":
    main()

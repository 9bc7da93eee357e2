"""Does ``voco`` learn where crops come from? Predicted and true overlaps on patients it has not seen.

Pretrains the first stage of ``phantom/voco_3d`` (the default form) once per seed, and correlates predicted with true overlaps
of crops and cells of held-out patients, two windows at a time as in training, not augmented. Twice: with the cells of the
crop's own volume, and with those of another patient's, whose voxels no crop shares, so that nothing but anatomy can tell.

Controls: the same networks as drawn, and pretraining and patients of a phantom whose blocks are in another order in every
patient, where position says nothing. Writes ``results/voco_position.json`` and ``.png``.

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

RECIPE, TEST, ASKED = "phantom/voco_3d", 20, 0.4
BLOCK = 14
"""Voxels along y and x of the blocks that are put in another order; along z, which has no cells, blocks are whole."""
ROUNDS = 8
"""Times that every patient is looked at, beside another one each time."""
ARMS = {
    "pretrained": "the same anatomy in everybody",
    "untrained": "networks as drawn",
    "shuffled": "blocks in another order in everybody",
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
                progress = Progress(
                    number, ROUNDS, seed=int(pair[0]), micro=1
                )  # of a later micro-batch: teachers stand still
                notes = strategy.step(run.backbone, {"images": batch_of(windows[pair])}, progress).notes
                generator = progress.generator("crops")
                boxes = torch.stack([draw_boxes(cells, strategy.crops, generator=generator) for _ in pair])
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
    """Draw predicted against true overlaps of one seed, and one crop in its patient with the weights of the cells."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for (title, colour), (key, rows) in zip(LINES.values(), curves.items(), strict=True):
        x = [row["true"] for row in rows]
        label = f"{title}: r = {found[key]['correlation']:.2f} [{found[key]['low']:.2f}, {found[key]['high']:.2f}]"
        left.plot(x, [row["mean"] for row in rows], color=colour, marker="o", markersize=3, label=label)
        left.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.12, linewidth=0)
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--", label="perfect")
    left.set_xlabel("true overlap of crop and cell (share of the crop)")
    left.set_ylabel("predicted overlap: mean, and middle half")
    left.set_title("Held-out patients, first seed (r over all seeds, 95 %)", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="upper left")
    left.spines[["top", "right"]].set_visible(False)
    left.set_ylim(-0.02, 1.25)
    window = seen.windows[0]
    right.imshow(window[len(window) // 2], cmap="gray", interpolation="nearest")
    for cell, true, predicted in zip(seen.cells, seen.true[0, 0], seen.predicted["own"][0, 0], strict=True):
        place, sides = cell[0, :0:-1] - 0.5, (cell[1] - cell[0])[:0:-1]
        fill = Rectangle(
            tuple(place), *sides, facecolor=("tab:orange", 0.6 * float(predicted)), edgecolor="white", linewidth=0.8
        )
        right.add_patch(fill)
        text = f"{predicted:.2f}\n({true:.2f})"
        right.text(
            *(place + sides / 2), text, color="white", fontsize=9, ha="center", va="center", path_effects=outlined()
        )
    box = seen.boxes[0, 0]
    right.add_patch(
        Rectangle(tuple(box[0, :0:-1] - 0.5), *(box[1] - box[0])[:0:-1], fill=False, edgecolor="tab:cyan", linewidth=2)
    )
    right.set_title(
        "One crop (blue) in its patient: predicted (true)\noverlap with every cell of the grid", fontsize=10
    )
    right.set_axis_off()
    figure.savefig(RESULTS / "voco_position.png", metadata={"Software": None})


def outlined() -> list[Any]:
    """Return what makes white letters legible on any grey."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="black")]


def main() -> None:
    """Pretrain, look, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/voco_position"), help="of runs, which are resumed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe, to look at others"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    kept: dict[str, Seen] = {}
    for seed in range(given.seeds):
        for arm in given.arms:
            recipe, folder = pretraining(arm, seed, given.set), given.folder / f"{arm}-{seed}"
            train(recipe, folder, cache=given.folder / "cache")
            run = Run(resolve(recipe), RunDirectory(folder), given.folder / "cache")
            seen = look(run, run.train())  # goes on from the last step, of which there is none left
            rows.append({"arm": arm, "seed": seed, "seconds": run.seconds, "measured": measured(seen)})
            kept.setdefault(arm, seen)
            pooled = {name: round(own["pooled"], 3) for name, own in rows[-1]["measured"].items()}
            print(arm, seed, f"{run.seconds:.0f} s", pooled, flush=True)
    if given.dry or len(given.arms) < len(ARMS):
        return
    found = summarised(rows)
    curves = {key: curve(kept[key.split(", ")[0]], key.split(", ")[1]) for key in LINES}
    recipe = to_mapping(pretraining("pretrained", 0, given.set))
    result = {"recipe": recipe, "block": BLOCK, "asked": ASKED, "summary": found, "curves": curves, "runs": rows}
    write("voco_position", {**provenance(), **result})
    draw(found, curves, kept["pretrained"])
    for key, row in found.items():
        print(
            f"{key:20s} {row['correlation']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], nearest cell {row['nearest']:.2f}"
        )


if __name__ == "__main__":
    main()

"""How nearly label-noise models hit a target Dice on every class of real training labels, and what that costs.

Every model is applied twice to every training case; the two maps must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from common import RESULTS, provenance, write

from labeleff import registry
from labeleff.data.manifest import Manifest

TARGETS = (0.9, 0.8, 0.7)
SETS: dict[str, dict[str, Any]] = {"left_atrium_half": {}, "acdc_128": {"in_plane": True}}


def measure(
    name: str, manifest: Manifest, labels: dict[str, np.ndarray], target: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what one model reached per class over the training list."""
    model = registry.build("noise", name, target_dice=target, **options)
    reached: dict[int, list[float]] = {}
    seconds, equal = 0.0, True
    for case in manifest.of_role("train"):
        how = {"case": case.id, "names": manifest.classes, "spacing": case.spacing, "slice_axis": manifest.slice_axis}
        began = time.perf_counter()
        found = model.corrupt(labels[case.id], **how)
        seconds += time.perf_counter() - began
        equal &= bool((model.corrupt(labels[case.id], **how).label == found.label).all())
        for c, value in found.dice.items():
            reached.setdefault(c, []).append(value)
    return {
        "model": name,
        "target": target,
        "classes": {
            manifest.classes[c]: {"mean": float(np.mean(v)), "low": min(v), "high": max(v), "cases": len(v)}
            for c, v in sorted(reached.items())
        },
        "seconds_per_case": seconds / len(manifest.of_role("train")),
        "bit_equal": equal,
    }


def main() -> None:
    """Measure models on both sets and write the result; models that are not measured keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=registry.names("noise"))
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    chosen = given.models
    before = (
        json.loads((RESULTS / "label_noise.json").read_text())["sets"]
        if len(chosen) < len(registry.names("noise"))
        else {}
    )
    if "LABELEFF_DATA" not in os.environ:
        sys.exit("set LABELEFF_DATA to the folder with left_atrium_half and acdc_128")
    result: dict[str, Any] = {**provenance(), "sets": {}}
    for folder, options in SETS.items():
        dataset = registry.build("dataset", "compact", path=folder)
        manifest = dataset.manifest()
        labels = {case.id: dataset.read_label(case) for case in manifest.of_role("train")}
        jobs = [(name, manifest, labels, target, options) for name in chosen for target in TARGETS]
        with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
            rows = list(pool.map(measure, *zip(*jobs, strict=True)))
        rows += [row for row in before.get(folder, {"rows": []})["rows"] if row["model"] not in chosen]
        rows.sort(key=lambda row: (row["model"], -row["target"]))
        for row in rows:
            print(
                folder,
                row["model"],
                row["target"],
                {k: round(v["mean"], 3) for k, v in row["classes"].items()},
                flush=True,
            )
        worst = max(abs(v["mean"] - row["target"]) for row in rows for v in row["classes"].values())
        result["sets"][folder] = {"worst_distance": worst, "rows": rows}
        print(folder, "worst distance of a mean from its target:", round(worst, 4), flush=True)
    write("label_noise", result)


if __name__ == "__main__":
    main()

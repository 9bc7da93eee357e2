"""What adaptation costs beside its network passes: ``python benchmarks/step_cost_sfda.py``.

CPU time, one thread, MONAI's U-Net with 16 base channels, the two-site phantom, of which RIPU's target has labelled boxes:
the median step (losses, joint backward, optimiser) of ``sfda``, of ``ripu`` and of its source-free form over the median of
its bare passes, which are a forward of every stream and one backward through all of them; alternating in one process.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CPU, WARM_UP, augmented, built, in_turn, provenance, whole, write
from step_cost import CHANNELS, SHAPES

from labeleff.batch import Batch
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.recipe_io import load_recipe

ROUNDS = 30
SUBJECTS: dict[str, dict[str, Any]] = {
    "sfda": {"strategy": "sfda"},
    "ripu": {"strategy": "ripu"},
    "ripu, source-free": {"strategy": "ripu", "streams": {"labelled": {"batch": 0}}},
}


def prepared(
    folder: Path, stage: dict[str, Any], *, ndim: int, size: list[int], batch: int, channels: Sequence[int] = CHANNELS
) -> Prepared:
    """Return the data of a recipe on two sites."""
    values = {
        "name": "step-cost-sfda",
        "data": {
            "dataset": {"name": "phantom_sites", "patients": 12, "test": 1, "ndim": ndim, "size": size},
            "source": ["source"],
            "target": ["target"],
            "labelled": 4,
            "patch": size,
            "prior": {"name": "source_mean"},
        },
        "backbone": {"name": "unet", "channels": list(channels)},
        "stages": [stage | {"steps": 1000, "batch": batch}],
    }
    return prepare(load_recipe(values), folder / "run", cache=folder.parent / "cache")


def measure(data: Prepared, rounds: int = ROUNDS, device: torch.device = CPU) -> dict[str, float]:
    """Return medians of a step and of its bare passes, taken in turn."""
    stage = data.recipe.stages[0]
    strategy, backbone, optimiser = built(data, device)

    def bare(batch: dict[str, Batch]) -> None:
        total = sum(backbone(share.image).sum() for share in batch.values())
        backbone.zero_grad()
        total.backward()

    times: dict[str, list[float]] = {}
    for number, read in enumerate(data.loader(stage, 0, strategy, first=0, last=WARM_UP + rounds, revision=0)):
        batch = augmented(read, device)
        target = batch["unlabelled"]
        if stage.strategy.name == "ripu":  # as after a round of questions
            label = target.label.clone()
            label[(slice(None), *[slice(4, 20)] * data.task.ndim)] = 1
            batch["unlabelled"] = target._replace(label=label)
        step = partial(whole, strategy, backbone, optimiser, batch)
        in_turn([("step", step), ("bare", partial(bare, batch))], times, number, device)
    taken, passes = (statistics.median(times[name]) for name in ("step", "bare"))
    return {"step_seconds": taken, "bare_seconds": passes, "ratio": taken / passes}


def main() -> None:
    """Measure and write ``results/step_cost_sfda.json``."""
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            for subject, stage in SUBJECTS.items():
                data = prepared(Path(folder) / f"{name}-{subject}", stage, **shape)
                found = result["ratios"][f"{subject}, {name}"] = measure(data)
                print(f"{subject}, {name}", {key: round(value, 4) for key, value in found.items()}, flush=True)
    write("step_cost_sfda", result)


if __name__ == "__main__":
    main()

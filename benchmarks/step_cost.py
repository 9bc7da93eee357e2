"""What a step costs beside its network passes: ``python benchmarks/step_cost.py``.

One thread, MONAI's U-Net with 16 base channels, phantom batches. Three questions:

* the median BCP step (loss, largest components, optimiser, moving average; augmentation apart) over the median of its bare
  passes (the same student forwards with ``logits.sum().backward()``, the same teacher forwards), alternating in one process
  after 200 steps, since pseudo-labels of an untrained network are thousands of specks, which no recipe meets;
* the share of a training step that is spent waiting for data;
* anonymous memory after 300 steps of reading, with 20 and with 2,000 generated cases.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import CPU, augmented, now, provenance, write

from labeleff.batch import Batch
from labeleff.learner import Learner, make_optimiser
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.recipe_io import load_recipe
from labeleff.strategies.bcp import Bcp

ROUNDS, WARM_UP, STEPS = 80, 200, 40
CHANNELS = (16, 32, 64, 128)
SHAPES = {"2-D": {"ndim": 2, "size": [96, 96], "batch": 16}, "3-D": {"ndim": 3, "size": [40, 48, 48], "batch": 4}}


def prepared(
    folder: Path,
    *,
    ndim: int,
    size: list[int],
    batch: int,
    pairing: str = "paper",
    patients: int = 20,
    channels: Sequence[int] = CHANNELS,
) -> Prepared:
    """Return the data of a BCP recipe on phantoms."""
    augmented = {"rotate": 20.0, "scale": 0.15, "shift": 0.1, "gain": 0.2, "offset": 0.2}
    stage = {"strategy": {"name": "bcp", "pairing": pairing}, "steps": 1000, "batch": batch, "augment": augmented}
    values = {
        "name": "step-cost",
        "data": {
            "dataset": {"name": "phantom", "patients": patients, "test": 1, "ndim": ndim, "size": size, "slices": 1},
            "labelled": 4,
        },
        "backbone": {"name": "unet", "channels": list(channels)},
        "stages": [stage],
        "trainer": {"workers": 1},
    }
    values["data"]["patch"] = size
    return prepare(load_recipe(values), folder / "run", cache=folder.parent / "cache")


class Steps:
    """A BCP step, the same step through the whole Learner, and its bare passes, on one network."""

    def __init__(self, data: Prepared, device: torch.device = CPU) -> None:
        stage = data.recipe.stages[0]
        self.strategy = Bcp(**stage.strategy.options)
        self.backbone = data.backbone(0)
        self.strategy.build(self.backbone, data.task)
        self.learner = Learner(self.backbone, self.strategy, stage).to(device)
        self.optimiser = make_optimiser(stage.optimiser, self.strategy.parameter_groups(self.backbone))
        self.count = 0

    def whole(self, batch: dict[str, Batch]) -> None:
        """Take a step: modes, losses, backward, optimiser, moving average."""
        progress = self.learner.progress(self.count)
        self.strategy.set_modes(self.backbone)
        losses = self.strategy.step(self.backbone, batch, progress).losses
        self.optimiser.zero_grad()
        sum(losses.values()).backward()
        self.optimiser.step()
        self.strategy.after_step(self.backbone, progress)
        self.count += 1

    def bare(self, batch: dict[str, Batch]) -> None:
        """Only the passes that the step needs."""
        labelled, unlabelled = batch["labelled"].image, batch["unlabelled"].image
        both = self.strategy.pairing == "both"
        half = len(labelled) if both else len(labelled) // 2
        with torch.no_grad():
            for part in (unlabelled,) if both else unlabelled.tensor_split(2):
                self.strategy.teacher(part)
        total = self.backbone(labelled[:half]).sum() + self.backbone(unlabelled[:half]).sum()
        self.backbone.zero_grad()
        total.backward()


def seconds(function: Callable[..., None], *arguments: Any, device: torch.device = CPU) -> float:
    """Return how long one call takes, and what it asks of a GPU."""
    began = now(device)
    function(*arguments)
    return now(device) - began


def step_ratio(
    data: Prepared, device: torch.device = CPU, warm_up: int = WARM_UP, rounds: int = ROUNDS
) -> dict[str, float]:
    """Return medians of a step and of its bare passes, taken in turn, after the network has learnt a little."""
    steps = Steps(data, device)
    stage = data.recipe.stages[0]
    loader = data.loader(stage, 0, steps.strategy, first=0, last=warm_up + rounds, revision=0)
    whole, bare = [], []
    for number, batch in enumerate(loader):
        seen = augmented(batch, device)
        if number < warm_up:
            steps.whole(seen)
            continue
        # whichever comes first finds the caches full of augmentation
        for kind, times in ((steps.whole, whole), (steps.bare, bare))[:: 1 if number % 2 else -1]:
            times.append(seconds(kind, seen, device=device))
    found = {"step_seconds": statistics.median(whole), "bare_seconds": statistics.median(bare)}
    return found | {"ratio": found["step_seconds"] / found["bare_seconds"]}


def data_wait(data: Prepared) -> dict[str, float]:
    """Return the share of a step, augmentation included, that is spent waiting for the next batch."""
    steps = Steps(data)
    loader = iter(data.loader(data.recipe.stages[0], 0, steps.strategy, first=0, last=STEPS, revision=0))
    waits, works = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - began)
        works.append(seconds(lambda b=batch: steps.whole(augmented(b))))
    wait, work = statistics.median(waits[5:]), statistics.median(works[5:])
    return {"wait_seconds": wait, "step_seconds": work, "share": wait / (wait + work)}


def anonymous_megabytes() -> float:
    """Return the anonymous resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def read_cases(patients: int) -> float:
    """Prepare phantoms, read 300 steps, and return the anonymous memory at the end."""
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder), ndim=2, size=[96, 96], batch=16, patients=patients)
        loader = data.loader(data.recipe.stages[0], 0, Bcp(), first=0, last=300, revision=0)
        for index in range(300):
            loader.dataset[index]
        return anonymous_megabytes()


def main() -> None:
    """Measure and write ``results/step_cost.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, help="only read this many cases and print the megabytes")
    arguments = parser.parse_args()
    set_up_process(1)
    if arguments.memory:
        print(read_cases(arguments.memory))
        return
    result: dict[str, Any] = {**provenance(), "ratios": {}, "data_wait": {}, "anonymous_megabytes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            for pairing in ("paper", "both"):
                found = step_ratio(prepared(Path(folder) / name / pairing, pairing=pairing, **shape))
                result["ratios"][f"{name} {pairing}"] = found
                print(name, pairing, {key: round(value, 4) for key, value in found.items()})
            result["data_wait"][name] = data_wait(prepared(Path(folder) / name / "wait", **shape))
            print(name, "data", {key: round(value, 4) for key, value in result["data_wait"][name].items()})
    for patients in (20, 2000):
        command = [sys.executable, __file__, "--memory", str(patients)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result["anonymous_megabytes"][str(patients)] = float(printed)
        print(patients, "cases", printed.strip(), "MB")
    write("step_cost", result)


if __name__ == "__main__":
    main()

"""What co-training costs beside its network passes: ``python benchmarks/step_cost_umct.py``.

CPU time, one thread, MONAI's U-Net, phantom batches; alternating in one process:

* the median step of ``umct`` (targets, losses, backward, optimiser) over the median of its bare passes: of every view a
  forward of both streams and one backward, and of the unlabelled ones the prediction and the samples;
* K = 8 samples over what they must cost: one full forward and 7 times what comes after the first active dropout, with dropout
  in every block of the decoder and before the head alone. What comes after is timed as a second pass over what was recorded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CPU, WARM_UP, augmented, built, in_turn, phantoms, provenance, whole, write
from step_cost import SHAPES
from torch import Tensor, nn

from labeleff import registry
from labeleff.backbones.mc_dropout import dropouts, predict_and_sample, prediction_modes, sample, with_dropout
from labeleff.backbones.replay import Replay
from labeleff.batch import Batch, Task
from labeleff.prepared import Prepared
from labeleff.process import set_up_process

ROUNDS, SAMPLES = 30, 8
SUBJECTS: dict[str, dict[str, Any]] = {
    "3 views": {"views": 3},
    "3 views, equal": {"views": 3, "weighting": "equal"},
    "2 views": {"views": 2},
}
PLACES = ("decoder", "head")


def step_ratio(data: Prepared, rounds: int, device: torch.device = CPU) -> dict[str, float]:
    """Return medians of a step and of its bare passes."""
    stage = data.recipe.stages[0]
    strategy, backbone, optimiser = built(data, device)
    members = strategy.members(backbone)

    def bare(batch: dict[str, Batch]) -> None:
        unlabelled = batch["unlabelled"].image
        for member in members:
            if strategy.draws:
                predict_and_sample(member, unlabelled, strategy.samples)
            else:
                with torch.no_grad(), prediction_modes(member):
                    member(unlabelled)
        images = torch.cat([batch["labelled"].image, unlabelled])
        total = sum(member(images).sum() for member in members)
        optimiser.zero_grad()
        total.backward()

    times: dict[str, list[float]] = {}
    for number, read in enumerate(data.loader(stage, 0, strategy, first=0, last=WARM_UP + rounds, revision=0)):
        batch = augmented(read, device)
        step = partial(whole, strategy, backbone, optimiser, batch)
        in_turn([("step", step), ("bare", partial(bare, batch))], times, number, device)
    taken, passes = (statistics.median(times[name]) for name in ("step", "bare"))
    return {"step_seconds": taken, "bare_seconds": passes, "ratio": taken / passes}


def network(task: Task, place: str, channels: list[int]) -> nn.Module:
    """Return a U-Net with dropout in every block of its decoder, or before its head."""
    torch.manual_seed(0)
    if place == "head":
        return with_dropout(registry.get("backbone", "unet")(task, channels=tuple(channels)), task)
    made: nn.Module = registry.get("backbone", "unet")(task, channels=tuple(channels), dropout=0.5)
    level, inside = made.model, []  # each level is what goes down, the levels below, what comes up
    while isinstance(level, nn.Sequential):
        inside.append(level[0])
        level = level[1].submodule
    for module in (m for part in [*inside, level] for m in part.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return made


def sampling_ratio(task: Task, place: str, channels: list[int], image: Tensor, rounds: int) -> dict[str, float]:
    """Return medians of K samples, of a full forward and of what comes after the first dropout."""
    subject = network(task, place, channels)
    random = dropouts(subject)
    times: dict[str, list[float]] = {}

    def full() -> None:
        with torch.no_grad(), prediction_modes(subject, dropout=True):
            subject(image)

    with Replay(subject, random) as replay, torch.no_grad(), prediction_modes(subject, dropout=True):
        replay(image)  # the first pass is recorded
        for number in range(WARM_UP + rounds):
            in_turn([("after", lambda: replay(image))], times, number)
    for number in range(WARM_UP + rounds):
        in_turn([("samples", lambda: sample(subject, image, SAMPLES)), ("full", full)], times, number)
    drawn, once, rest = (statistics.median(found) for found in (times["samples"], times["full"], times["after"]))
    needed = once + (SAMPLES - 1) * rest
    return {"samples_seconds": drawn, "full_seconds": once, "after_seconds": rest, "ratio": drawn / needed}


def main() -> None:
    """Measure and write ``results/step_cost_umct.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes and batches, to see whether it runs")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "ratios": {}, "sampling": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, usual in SHAPES.items():
            size = [max(16, n // arguments.shrink // 8 * 8) for n in usual["size"]]
            shape = {"ndim": usual["ndim"], "size": size, "batch": max(2, usual["batch"] // arguments.shrink)}
            for subject, options in SUBJECTS.items():
                data = phantoms(
                    Path(folder) / f"{name}-{subject}", {"name": "umct", **options}, arguments.channels, **shape
                )
                found = result["ratios"][f"{subject}, {name}"] = step_ratio(data, arguments.rounds)
                print(f"{subject}, {name}", {key: round(value, 4) for key, value in found.items()}, flush=True)
            for place in PLACES:
                image = torch.randn(shape["batch"], 1, *size)
                task = Task(("background", "one"), shape["ndim"])
                found = sampling_ratio(task, place, arguments.channels, image, arguments.rounds)
                result["sampling"][f"dropout in {place}, {name}"] = found
                print(f"dropout in {place}, {name}", {k: round(v, 4) for k, v in found.items()}, flush=True)
    if not arguments.dry:
        write("step_cost_umct", result)


if __name__ == "__main__":
    main()

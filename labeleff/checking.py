"""``labeleff check``: everything constructed, the data audited, time and memory estimated from a few timed steps."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor

from labeleff import registry
from labeleff.batch import derive_seed
from labeleff.describing import describe
from labeleff.learner import Learner, make_optimiser
from labeleff.machine import in_bytes
from labeleff.prepare import prepare
from labeleff.prepared import Prepared, device_of
from labeleff.process import set_up_process
from labeleff.recipe import Recipe, Stage
from labeleff.runlog import console
from labeleff.runner import resolve
from labeleff.strategies.base import Strategy

TIMED_STEPS = 4


def check(recipe: Recipe, *, cache: Path | None = None) -> dict[str, Any]:
    """Check a recipe against its data and this machine; print and return what a run would cost.

    Raises:
        LabeleffError: The run could not start.
    """
    result = estimate(recipe, cache=cache)
    _print(recipe, result)
    return result


def estimate(recipe: Recipe, *, cache: Path | None = None) -> dict[str, Any]:
    """Return what a run would cost, from a few timed steps of every stage.

    The steps are timed on the CPU or on the GPU that the recipe asks for. Test labels are not opened.

    Raises:
        LabeleffError: The run could not start.
    """
    recipe = resolve(recipe)
    set_up_process(recipe.trainer.threads)
    with tempfile.TemporaryDirectory(prefix="labeleff-check-") as folder:
        data = prepare(recipe, Path(folder), cache=cache)
        stages = [("baseline", i, s) for i, s in enumerate(recipe.baseline)]
        stages += [("stages", i, s) for i, s in enumerate(recipe.stages)]
        device = device_of(recipe)
        seconds = {
            f"{part}.{i} {s.strategy.name}": (_step_seconds(data, s, i, device), s.steps) for part, i, s in stages
        }
        evaluation = _case_seconds(data, data.split.test[:1]) * len(data.split.test) * (2 if recipe.baseline else 1)
    total = sum(one * steps for one, steps in seconds.values()) + evaluation
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **describe(data),
        "seconds_per_step": {name: one for name, (one, _) in seconds.items()},
        "steps": {name: steps for name, (_, steps) in seconds.items()},
        "evaluation_seconds": evaluation,
        "total_seconds": total,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device": str(device),
    }


def _step_seconds(data: Prepared, stage: Stage, index: int, device: torch.device) -> float:
    """Return the median time of a step, data included, of a stage that starts from a fresh network."""
    if not stage.steps:
        return 0.0
    strategy: Strategy = registry.made("strategy", stage.strategy)
    backbone = data.backbone(derive_seed(data.recipe.seed, "init")).to(device)
    strategy.build(backbone, data.task)
    learner = Learner(backbone, strategy.to(device), stage, index=index, regions=data.task.regions)
    optimiser = make_optimiser(stage.optimiser, strategy.parameter_groups(backbone))
    loader = data.loader(stage, index, strategy, first=0, last=TIMED_STEPS, revision=0)
    times = []
    began = time.perf_counter()
    for number, batch in enumerate(loader):
        progress = learner.progress(number)
        moved = learner.transfer_batch_to_device(batch, device, 0)
        losses = [loss for loss in learner.compute(moved, progress).losses.values() if loss.requires_grad]
        if losses:
            optimiser.zero_grad()
            torch.autograd.backward(cast(Tensor, sum(losses)))
            optimiser.step()
        strategy.after_step(backbone, progress)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return statistics.median(times[1:]) if len(times) > 1 else times[0]


def _case_seconds(data: Prepared, cases: Sequence[str]) -> float:
    """Return the time that predictions of some cases take; of none where nothing is evaluated."""
    network = data.backbone(0)
    viewer = data.viewer(network)
    began = time.perf_counter()
    for case in cases:
        viewer.probabilities(network, case)
    return time.perf_counter() - began


def _print(recipe: Recipe, result: dict[str, Any]) -> None:
    out = console()
    out.print(
        f"[bold]{recipe.name}[/]: {result['dataset']}, classes {', '.join(result['classes'])}, split {result['split']}"
    )
    out.print(
        f"patients: {result['labelled_patients']} labelled, {result['unlabelled_patients']} unlabelled, "
        f"{result['validation_patients']} validation, {result['test_patients']} evaluated on ({result['evaluated_on']})"
    )
    table = Table("stage", "steps", "s / step", "minutes", box=None, pad_edge=False)
    for name, one in result["seconds_per_step"].items():
        steps = result["steps"][name]
        table.add_row(name, str(steps), f"{one:.3f}", f"{one * steps / 60:.1f}")
    table.add_row("evaluation", "", "", f"{result['evaluation_seconds'] / 60:.1f}")
    out.print(table)
    out.print(
        f"estimate on {result['device']}: {result['total_seconds'] / 60:.1f} minutes, "
        f"{in_bytes(result['peak_memory_bytes'])} of memory at the most seen here"
    )
    for note in result["notes"]:
        out.print(f"note: {note}")

"""What benchmarks share: what is written beside numbers, and how costs are compared in one process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import nn

from labeleff import registry
from labeleff.batch import Batch, Progress, StepOutput
from labeleff.data import augment, phantom
from labeleff.learner import make_optimiser
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.recipe_io import load_recipe
from labeleff.rundir import environment
from labeleff.strategies.base import Strategy

CPU = torch.device("cpu")
WARM_UP = 5
RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Return commit, versions, machine, and the hash of the phantom generator."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    source = Path(phantom.__file__).read_bytes()
    return {"commit": commit, "generator_sha256": hashlib.sha256(source).hexdigest(), "environment": environment()}


def write(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def phantoms(
    folder: Path,
    strategy: dict[str, Any],
    channels: list[int],
    *,
    ndim: int,
    size: list[int],
    batch: int,
    deeper: int = 0,
) -> Prepared:
    """Return the data of a recipe of one stage on generated patients.

    With ``deeper`` these are volumes: of so many slices for a 2-D network, so much longer than the patch for a 3-D one.
    """
    shape = [size[0] + deeper, *size[1:]] if ndim == 3 else [deeper, *size] if deeper else size
    dataset = {"name": "phantom", "patients": 12, "test": 1, "ndim": len(shape), "size": shape, "slices": 1}
    values = {
        "name": f"step-cost-{strategy['name']}",
        "data": {"dataset": dataset, "labelled": 4, "patch": size, "dimensions": ndim},
        "backbone": {"name": "unet", "channels": channels},
        "stages": [{"strategy": strategy, "steps": 1000, "batch": batch}],
    }
    return prepare(load_recipe(values), folder / "run", cache=folder.parent / "cache")


def built(data: Prepared, device: torch.device = CPU) -> tuple[Strategy, nn.Module, torch.optim.Optimizer]:
    """Return the first stage's strategy, its network and their optimiser, on a device."""
    stage = data.recipe.stages[0]
    strategy: Strategy = registry.made("strategy", stage.strategy)
    backbone = data.backbone(0)
    strategy.build(backbone, data.task)
    strategy.to(device), backbone.to(device)
    return strategy, backbone, make_optimiser(stage.optimiser, strategy.parameter_groups(backbone))


def now(device: torch.device = CPU) -> float:
    """Return the time by the clock when a GPU has done all it was asked to."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device: torch.device) -> float:
    """Return the CPU seconds of this process, or what :func:`now` returns for a GPU."""
    return time.process_time() if device.type == "cpu" else now(device)


def in_turn(
    calls: Sequence[tuple[str, Callable[[], Any]]],
    times: dict[str, list[float]],
    number: int,
    device: torch.device = CPU,
) -> None:
    """Call functions one after the other, in the other order every second time, and note the time each took.

    Nothing is noted of the first ``WARM_UP`` numbers.
    """
    for name, function in calls[:: 1 if number % 2 else -1]:
        began = clock(device)
        function()
        took = clock(device) - began
        if number >= WARM_UP:
            times.setdefault(name, []).append(took)


def augmented(batch: dict[str, Batch], device: torch.device = CPU) -> dict[str, Batch]:
    """Return a batch as a strategy sees it, on a device."""
    return {name: augment.apply(share) for name, share in move_data_to_device(batch, device).items()}


def whole(
    strategy: Strategy, backbone: nn.Module, optimiser: torch.optim.Optimizer, batch: dict[str, Batch]
) -> StepOutput:
    """Take a whole step (modes, losses, one backward, optimiser) as the Learner does, and return what it gave."""
    strategy.set_modes(backbone)
    output = strategy.step(backbone, batch, Progress(0, 1000))
    optimiser.zero_grad()
    sum(output.losses.values()).backward()
    optimiser.step()
    return output

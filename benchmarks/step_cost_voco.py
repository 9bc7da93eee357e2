"""What learning before labels costs beside its passes of the network: ``python benchmarks/step_cost_voco.py``.

CPU time, one thread, MONAI's U-Net, phantom batches; alternating in one process, for each form of ``voco``, for ``glcl_global``,
``glcl_local`` and ``masked_autoencoder``:

* the median step (views or crops, heads, losses, backward, teachers, optimiser) over the median of its bare passes: of all that
  the step shows the network a forward and a backward that go as far as the step's own, through what it trains, and for v1 of
  ``voco`` one more forward without gradients;
* such a forward over a forward of the whole network, without gradients; for ``voco`` and ``glcl_global`` it ends with the encoder.
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

from labeleff.backbones.taps import encode
from labeleff.batch import Batch, Progress
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.strategies.base import Strategy

ROUNDS = 30
DEEPER = 16
"""Slices, or voxels beyond the patch, of the volumes whose partitions are told apart."""
METHODS: dict[str, dict[str, Any]] = {
    "voco v0": {"name": "voco", "form": "v0"},
    "voco v1": {"name": "voco", "form": "v1"},
    "voco v2": {"name": "voco", "form": "v2"},
    "glcl_global gd": {"name": "glcl_global"},
    "glcl_local lr": {"name": "glcl_local"},
    "masked_autoencoder": {"name": "masked_autoencoder"},
}
FEWEST = {"glcl_global": 8}
"""Images per step that a method needs: of two volumes, four partitions each."""


def patients(folder: Path, method: dict[str, Any], channels: list[int], shape: dict[str, Any]) -> Prepared:
    """Return the data of a method: of as many images a step as it needs, and longer where partitions are told apart."""
    batch = max(shape["batch"], FEWEST.get(method["name"], 0))
    deeper = DEEPER if method["name"] == "glcl_global" else 0
    return phantoms(folder, method, channels, **{**shape, "batch": batch, "deeper": deeper})


def shown(strategy: Strategy, backbone: nn.Module, batch: dict[str, Batch]) -> Tensor:
    """Return what a step shows the network, from a step that is not timed."""
    seen: list[Tensor] = []
    hook = backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    strategy.set_modes(backbone)
    strategy.step(backbone, batch, Progress(0, 1000))
    hook.remove()
    (rows,) = seen  # more would be passes that the bare ones lack
    return rows


def measured(data: Prepared, rounds: int, device: torch.device = CPU) -> dict[str, float]:
    """Return medians of a step, of its bare passes, and of a forward as far as the step's and of the whole network."""
    stage = data.recipe.stages[0]
    strategy, backbone, optimiser = built(data, device)
    taps = getattr(strategy, "taps", None) or [strategy.tap]
    teacher = getattr(strategy, "teacher", None)
    rows = torch.empty(0)

    def bare() -> None:
        if teacher is not None:
            with torch.no_grad():
                encode(teacher, rows, taps)
        total = sum(features.sum() for features in encode(backbone, rows, taps))
        optimiser.zero_grad()
        total.backward()

    @torch.no_grad()
    def part() -> None:
        encode(backbone, rows, taps)

    @torch.no_grad()
    def network() -> None:
        backbone(rows)

    times: dict[str, list[float]] = {}
    for number, read in enumerate(data.loader(stage, 0, strategy, first=0, last=WARM_UP + rounds, revision=0)):
        batch = augmented(read, device)
        rows = shown(strategy, backbone, batch)
        calls = [("bare", bare), ("part", part), ("network", network)]
        in_turn([("step", partial(whole, strategy, backbone, optimiser, batch)), *calls], times, number, device)
    found = {f"{name}_seconds": statistics.median(taken) for name, taken in times.items()}
    found["ratio"] = found["step_seconds"] / found["bare_seconds"]
    return {**found, "share_of_network": found["part_seconds"] / found["network_seconds"]}


def main() -> None:
    """Measure and write ``results/step_cost_voco.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods that are measured")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes and batches, to see whether it runs")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, usual in SHAPES.items():
            size = [max(40, n // arguments.shrink // 8 * 8) for n in usual["size"]]
            for title in arguments.only:
                shape = {"ndim": usual["ndim"], "size": size, "batch": max(2, usual["batch"] // arguments.shrink)}
                data = patients(Path(folder) / f"{name}-{title}", METHODS[title], arguments.channels, shape)
                found = result["ratios"][f"{title}, {name}"] = measured(data, arguments.rounds)
                print(f"{title}, {name}", {key: round(value, 4) for key, value in found.items()}, flush=True)
    if not arguments.dry:
        write("step_cost_voco", result)


if __name__ == "__main__":
    main()

"""What volume contrast costs beside its passes of the encoder: ``python benchmarks/step_cost_voco.py``.

CPU time, one thread, MONAI's U-Net, phantom batches; alternating in one process, for each form:

* the median step of ``voco`` (crops, projectors, losses, backward, teachers, optimiser) over the median of its bare passes: of all
  crops and cells a forward and a backward of the encoder, and for v1 one more forward without gradients;
* such a forward of the encoder over a forward of the whole network, without gradients.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import WARM_UP, in_turn, phantoms, provenance, whole, write
from step_cost import SHAPES

from labeleff.backbones.taps import encode
from labeleff.data import augment
from labeleff.learner import make_optimiser
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.strategies.voco import Voco

ROUNDS, FORMS = 30, ("v0", "v1", "v2")


def measured(data: Prepared, rounds: int) -> dict[str, float]:
    """Return medians of a step, of its bare passes, and of a forward of the encoder and of the network."""
    stage = data.recipe.stages[0]
    strategy, backbone = Voco(**stage.strategy.options), data.backbone(0)
    strategy.build(backbone, data.task)
    optimiser = make_optimiser(stage.optimiser, strategy.parameter_groups(backbone))
    rows = torch.empty(0)

    def bare() -> None:
        if strategy.form == "v1":
            with torch.no_grad():
                encode(strategy.teacher, rows, strategy.taps)
        total = sum(features.sum() for features in encode(backbone, rows, strategy.taps))
        optimiser.zero_grad()
        total.backward()

    @torch.no_grad()
    def encoder() -> None:
        encode(backbone, rows, strategy.taps)

    @torch.no_grad()
    def network() -> None:
        backbone(rows)

    times: dict[str, list[float]] = {}
    for number, read in enumerate(data.loader(stage, 0, strategy, first=0, last=WARM_UP + rounds, revision=0)):
        batch = {name: augment.apply(share) for name, share in read.items()}
        crops = strategy._cut(batch["images"], torch.Generator().manual_seed(number))[0]
        rows = strategy._as_seen(backbone, crops.flatten(0, 1))
        calls = [("bare", bare), ("encoder", encoder), ("network", network)]
        in_turn([("step", partial(whole, strategy, backbone, optimiser, batch)), *calls], times, number)
    found = {f"{name}_seconds": statistics.median(taken) for name, taken in times.items()}
    found["ratio"] = found["step_seconds"] / found["bare_seconds"]
    return {**found, "encoder_share": found["encoder_seconds"] / found["network_seconds"]}


def main() -> None:
    """Measure and write ``results/step_cost_voco.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes and batches, to see whether it runs")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, usual in SHAPES.items():
            size = [max(40, n // arguments.shrink // 8 * 8) for n in usual["size"]]
            shape = {"ndim": usual["ndim"], "size": size, "batch": max(2, usual["batch"] // arguments.shrink)}
            for form in FORMS:
                data = phantoms(
                    Path(folder) / f"{name}-{form}", {"name": "voco", "form": form}, arguments.channels, **shape
                )
                found = result["ratios"][f"{form}, {name}"] = measured(data, arguments.rounds)
                print(f"{form}, {name}", {key: round(value, 4) for key, value in found.items()}, flush=True)
    if not arguments.dry:
        write("step_cost_voco", result)


if __name__ == "__main__":
    main()

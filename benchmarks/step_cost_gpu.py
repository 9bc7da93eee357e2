"""What the steps of the methods cost beside their network passes on a GPU: ``python benchmarks/step_cost_gpu.py``.

The measurements of ``step_cost.py`` and of ``step_cost_umct.py``, ``step_cost_sfda.py``, ``step_cost_adele.py`` and
``step_cost_voco.py``, with wall time between synchronisations in place of CPU time, and with networks and patches of the size
that people train: 32 base channels, 256 x 256 and 96 x 96 x 96.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import step_cost
import step_cost_adele
import step_cost_sfda
import step_cost_umct
import step_cost_voco
import torch
from common import phantoms, provenance, write

from labeleff.process import set_up_process

CHANNELS = [32, 64, 128, 256]
SHAPES = {"2-D": {"ndim": 2, "size": [256, 256], "batch": 16}, "3-D": {"ndim": 3, "size": [96, 96, 96], "batch": 4}}
SMALL = {"2-D": {"ndim": 2, "size": [48, 48], "batch": 8}, "3-D": {"ndim": 3, "size": [40, 40, 40], "batch": 2}}


def subjects(
    folder: Path, shape: dict[str, Any], device: torch.device, warm_up: int, rounds: int
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Yield each method with what measures it."""
    for pairing in ("paper", "both"):
        data = step_cost.prepared(folder / pairing, pairing=pairing, channels=CHANNELS, **shape)
        yield f"bcp, {pairing}", lambda data=data: step_cost.step_ratio(data, device, warm_up, rounds)
    for name, options in step_cost_umct.SUBJECTS.items():
        data = phantoms(folder / f"umct-{name}", {"name": "umct", **options}, CHANNELS, **shape)
        yield f"umct, {name}", lambda data=data: step_cost_umct.step_ratio(data, rounds, device)
    for name, stage in step_cost_sfda.SUBJECTS.items():
        data = step_cost_sfda.prepared(folder / f"sfda-{name}", stage, channels=CHANNELS, **shape)
        yield name, lambda data=data: step_cost_sfda.measure(data, rounds, device)
    data = step_cost_adele.prepared(folder / "adele", channels=CHANNELS, **shape)
    yield "adele", lambda: step_cost_adele.measure(data, rounds, device)
    for name, method in step_cost_voco.METHODS.items():
        data = step_cost_voco.patients(folder / name, method, CHANNELS, shape)
        yield name, lambda data=data: step_cost_voco.measured(data, rounds, device)


def main() -> None:
    """Measure and write ``results/step_cost_gpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU, to see whether it runs; write nothing")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=30, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=100, help="steps of bcp before")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.cpu else "cuda")
    set_up_process(1)
    steps = {"warm_up": arguments.warm_up, "rounds": arguments.rounds}
    result: dict[str, Any] = {**provenance(), **steps, "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind, shape in (SMALL if arguments.cpu else SHAPES).items():
            if kind not in arguments.only:
                continue
            for name, measure in subjects(Path(folder) / kind, shape, device, **steps):
                found = result["ratios"][f"{name}, {kind}"] = measure()
                print(f"{name}, {kind}", {key: round(value, 4) for key, value in found.items()}, flush=True)
                if not arguments.cpu:
                    write("step_cost_gpu", result)


if __name__ == "__main__":
    main()

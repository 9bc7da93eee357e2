"""Sampling from 160,000 volumes on many processes, simulated: ``python benchmarks/sampler_at_scale.py``.

No image is read. Shapes are drawn in the range of body CT; a sample is a window of 192 x 192 x 64 voxels, of which every process
draws its share by itself. Measured: how long the sampler takes to start and a process to find its spots (also at the step where
an epoch ends), how much memory that needs, whether one epoch shows every volume once, whether 64 processes see together what one
would, and which share of what is unpacked from chunks of 32 voxels a window uses.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import provenance, write

from labeleff.data.manifest import Case, Manifest, Source
from labeleff.data.sampling import Key, Sampler, Spot, StreamPlan, _permutation
from labeleff.data.split import make_split
from labeleff.data.store import CHUNK

VOLUMES, PROCESSES, PER_PROCESS = 160_167, 64, 4
WINDOW = (192, 192, 64)


def spots(sampler: Sampler, step: int, rank: int, world: int) -> list[Spot]:
    """Return where the samples of one process lie in a step."""
    share = sampler.plan.batch // world
    keys = (Key(7, 0, step, "unlabelled", i) for i in range(rank * share, (rank + 1) * share))
    return [sampler.spot(key, lambda _: ()) for key in keys]


def touched(spot: Spot, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return voxels of the window that lie in the volume, and voxels of the chunks that hold them."""
    inside = unpacked = 1
    for origin, size, length in zip(spot.origin, spot.size, shape, strict=True):
        first, last = max(origin, 0), min(origin + size, length)
        inside *= last - first
        unpacked *= min(length, math.ceil(last / CHUNK) * CHUNK) - first // CHUNK * CHUNK
    return inside, unpacked


def bound(count: int) -> Sampler:
    """Return a sampler of so many generated cases, from the manifest on, that has drawn its first step."""
    cases = tuple(Case(f"c{i:06d}", f"p{i:06d}", (Source(Path(f"images/c{i:06d}.nii.gz")),)) for i in range(count))
    split = make_split(Manifest("generated", cases, ("background", "organ"), 3), labelled="none", evaluate_on="none")
    sampler = Sampler(StreamPlan(split.unlabelled, PER_PROCESS), [(300, 300, 200)] * count, WINDOW, None)
    spots(sampler, 0, 0, 1)
    return sampler


def index_of(count: int) -> dict[str, float]:
    """Return seconds until the first step of so many cases is drawn, megabytes at most until then, and milliseconds per draw."""
    began = time.process_time()
    sampler = bound(count)
    start = time.process_time() - began
    began = time.process_time()
    for step in range(1, 21):
        spots(sampler, step, 0, 1)
    draw = (time.process_time() - began) / (20 * PER_PROCESS)
    tracemalloc.start()
    bound(count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"start_seconds": start, "megabytes": peak / 2**20, "draw_milliseconds": 1000 * draw}


def main() -> None:
    """Simulate and write ``results/sampler_at_scale.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=VOLUMES)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    drawn = np.stack(
        [generator.integers(low, high, arguments.volumes) for low, high in ((200, 400), (200, 400), (60, 500))]
    )
    shapes = [tuple(map(int, shape)) for shape in drawn.T]
    cases = tuple(f"volume_{number:06d}" for number in range(arguments.volumes))
    world, batch = PROCESSES, PROCESSES * PER_PROCESS

    tracemalloc.start()
    began = time.process_time()
    sampler = Sampler(StreamPlan(cases, batch), shapes, WINDOW, None)
    start_seconds = time.process_time() - began
    steps_per_epoch = arguments.volumes // batch
    times, worst = [], 0.0
    for step in (*range(50), steps_per_epoch, *range(steps_per_epoch + 1, steps_per_epoch + 50)):
        began = time.process_time()
        spots(sampler, step, 3, world)
        times.append(time.process_time() - began)
        worst = max(worst, times[-1])
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    seen: Counter[str] = Counter()
    inside = unpacked = 0
    index = {case: number for number, case in enumerate(cases)}
    for step in range(steps_per_epoch):
        own = spots(sampler, step, 0, 1)
        seen.update(spot.case for spot in own)
        if step < 200:
            parts = [touched(spot, shapes[index[spot.case]]) for spot in own]
            inside, unpacked = inside + sum(a for a, _ in parts), unpacked + sum(b for _, b in parts)
    resumed = Sampler(StreamPlan(cases, batch), shapes, WINDOW, None)
    middle = steps_per_epoch // 2
    shared = [spot for rank in range(world) for spot in spots(sampler, 17, rank, world)]
    result: dict[str, Any] = {
        **provenance(),
        "volumes": arguments.volumes,
        "processes": world,
        "samples_per_process": PER_PROCESS,
        "start_seconds": start_seconds,
        "step_milliseconds": 1000 * statistics.median(times),
        "slowest_step_milliseconds": 1000 * worst,
        "peak_megabytes_of_the_sampler": memory / 2**20,
        "order_megabytes": _permutation(7, 0, "unlabelled", 0, arguments.volumes).nbytes / 2**20,
        "samples_in_an_epoch": steps_per_epoch * batch,
        "volumes_seen_once": sum(count == 1 for count in seen.values()),
        "volumes_seen_again": sum(count > 1 for count in seen.values()),
        "made_anew_in_the_middle_goes_on": spots(resumed, middle, 5, world) == spots(sampler, middle, 5, world),
        "processes_together_are_one": shared == spots(sampler, 17, 0, 1),
        "share_of_unpacked_voxels_used": inside / unpacked,
        "index": {str(count): index_of(count) for count in (100, 100_000)},
    }
    for key, value in result.items():
        if key not in ("environment", "commit", "generator_sha256"):
            print(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}")
    if not arguments.dry:
        write("sampler_at_scale", result)


if __name__ == "__main__":
    main()

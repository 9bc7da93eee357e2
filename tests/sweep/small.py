"""A sweep of runs that take a second each."""

import yaml

from labeleff.sweep.benchmark import load_benchmark

from ..conftest import tiny


def small_benchmark(folder, overrides=(), **changes):
    """Write a benchmark of tiny runs and its base recipe into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny()))
    values = {
        "name": "small",
        "base": str(folder / "base.yaml"),
        "methods": ["supervised", "mean_teacher"],
        "labelled": [2],
        "draws": 2,
        "steps": 4,
        "set": ["stages.0.batch=4"],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(values | changes))
    return load_benchmark(folder / "small.yaml", overrides)

"""What a plan says before anything is run."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from labeleff.evaluation.statistics import spread
from labeleff.report.cells import PRIMARY
from labeleff.sweep.plan import TYPICAL, plan, power

from .small import small_benchmark

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def test_the_plan_counts_and_estimates_and_runs_nothing(tmp_path, cache, capsys):
    benchmark = small_benchmark(tmp_path, draws=8)
    found = plan(benchmark, tmp_path / "out", workers=2, cache=cache)
    assert (found["runs"], found["missing"], found["workers"]) == (16, 16, 2)
    assert found["hours"] == pytest.approx(sum(found["seconds_per_run"].values()) * 8 / 3600 / 2)
    assert not (tmp_path / "out" / "runs").exists()
    said = capsys.readouterr().out
    assert "16 of 16 runs to do" in said
    assert "smallest difference" in said


def test_first_stages_in_common_are_counted_once(tmp_path, monkeypatch):
    """Two draws of three methods, two of which begin alike, at 10 s, 20 s and 40 s a step, and a second for evaluation."""
    from labeleff.sweep import plan as module

    def estimate(recipe, cache=None):
        names = [f"stages.{i} {stage.strategy.name}" for i, stage in enumerate(recipe.stages)]
        one = {"supervised": 10.0, "mean_teacher": 20.0, "adele": 40.0}
        seconds = {name: one[name.split()[1]] for name in names}
        steps = {name: stage.steps for name, stage in zip(names, recipe.stages, strict=True)}
        total = sum(seconds[name] * steps[name] for name in names) + 1
        return {"seconds_per_step": seconds, "steps": steps, "total_seconds": total, "test_patients": 3}

    monkeypatch.setattr(module, "estimate", estimate)
    first = {"strategy": "supervised", "steps": 4, "batch": 4}
    stages = {
        "one": [first],
        "two": [first, {"strategy": "mean_teacher", "steps": 3, "batch": 4}],
        "three": [first, {"strategy": "adele", "steps": 2, "batch": 4}],
    }
    (tmp_path / "methods").mkdir()
    for name, own in stages.items():
        (tmp_path / "methods" / f"{name}.yaml").write_text(yaml.safe_dump({"stages": own}))
    changes = {"methods": list(stages), "baseline": "one", "steps": None, "allow": ["steps"], "set": []}
    found = plan(small_benchmark(tmp_path, **changes), tmp_path / "out", workers=1)
    assert found["seconds_per_run"] == {"one": 41, "two": 101, "three": 121}
    assert found["hours"] * 3600 == pytest.approx(2 * (41 + 101 + 121 - 40))


def test_few_draws_get_no_promise_of_a_test():
    assert power(1, 1, 20) == {"detectable_difference": None, "half_width": None}
    few, many = power(5, 1, 20), power(20, 1, 20)
    assert few["detectable_difference"] is None
    assert many["detectable_difference"] > 0
    assert many["half_width"] < few["half_width"]


def test_the_typical_spread_is_that_of_the_committed_results():
    tables = json.loads((RESULTS / "left_atrium.json").read_text())["tables"]
    runs = {(row["method"], row["labelled"], row["draw"]): row["patients"] for row in tables["scores"]}
    found = {}
    for method, labelled in {key[:2] for key in runs if key[0] != "supervised"}:
        draws = sorted(key[2] for key in runs if key[:2] == (method, labelled))
        cells = [
            [ours - runs["supervised", labelled, d][p] for p, ours in sorted(runs[method, labelled, d].items())]
            for d in draws
        ]
        for name, value in spread(np.array(cells)).components.items():
            found.setdefault(name, []).append(value)
    assert PRIMARY == ("mean", "dice")
    assert {name: np.mean(values) for name, values in found.items()} == pytest.approx(dict(TYPICAL), rel=0.01)

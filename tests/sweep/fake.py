"""A sweep's folder as a finished sweep leaves it, with simulated scores: nothing is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from labeleff.evaluation.tables import write_cases_csv
from labeleff.files import append_line, file_digest, write_atomically, write_json
from labeleff.recipe_io import load_recipe, to_yaml
from labeleff.sweep.benchmark import parse_benchmark
from labeleff.sweep.collect import run_folder
from labeleff.sweep.grid import Grid, Job, result_key
from labeleff.sweep.orchestrate import write_plan

BASE = "phantom/supervised"
ALL = 64


def fake_sweep(
    folder,
    *,
    methods=("supervised", "mean_teacher", "bcp"),
    budgets=(2, 4, 8),
    draws=3,
    seeds=1,
    patients=12,
    gain=None,
    classes=("large", "small"),
    datasets=("phantom",),
    noise=0.03,
    deviations=(),
    base=BASE,
    left_out=(),
    pictures=False,
    seed=0,
    **benchmark,
) -> Path:
    """Write a sweep and return its folder.

    Args:
        folder: Where to.
        methods: Their names; the first is the baseline.
        budgets: Labelled patients, or ``all`` (64).
        draws: Number of label draws.
        seeds: Training seeds per draw.
        patients: Test patients.
        gain: Dice that a method adds to the baseline at every budget, by name.
        classes: Without background.
        datasets: Their names.
        noise: Standard deviation of draws, of patients, and of what remains.
        deviations: As the plan says them.
        base: Recipe of all runs.
        left_out: Names of runs (or parts of names) that are planned and have not been run.
        pictures: Write pictures of three cases per run.
        seed: Of the simulation.
        **benchmark: Further keys of the benchmark.
    """
    gain = gain or {}
    recipe_of_all = load_recipe(base)
    jobs = []
    for number, (dataset, method) in enumerate((d, m) for d in datasets for m in methods):
        for budget in budgets:
            for draw in range(draws):
                for training in range(seeds):
                    # another seed for every method makes its runs differ from the others' in what the key is made of
                    recipe = replace(
                        recipe_of_all,
                        seed=10_000 * number + 1000 * training + draw,
                        data=replace(recipe_of_all.data, labelled=budget, draw=draw),
                    )
                    key = result_key(recipe)
                    name = f"{dataset}-{method}-n{budget}-d{draw}-s{training}-{key}"
                    jobs.append(
                        Job(
                            name,
                            key,
                            dataset,
                            method,
                            str(budget),
                            draw,
                            training,
                            None,
                            {},
                            replace(recipe, name=name),
                        )
                    )
    plain = {
        "name": "fake",
        "base": base,
        "baseline": methods[0],
        "methods": {name: {"stages": "methods/supervised"} for name in methods},
        "datasets": {name: {} for name in datasets},
        "labelled": list(budgets),
        "draws": draws,
        "seeds": seeds,
        **benchmark,
    }
    write_plan(parse_benchmark(plain), folder, Grid(tuple(jobs), tuple(deviations)), {})
    effects = _Effects(draws, patients, noise, seed)
    for job in jobs:
        if not any(part in job.name for part in left_out):
            cost = 1 + list(methods).index(job.method)
            _write_run(run_folder(folder, job.name), job, effects, gain.get(job.method, 0.0), classes, cost, pictures)
    return folder


class _Effects:
    """What runs share: good and bad draws, easy and hard patients."""

    def __init__(self, draws, patients, noise, seed):
        self.noise, self.generator = noise, np.random.default_rng(seed)
        self.draws = self.generator.normal(0, noise, draws)
        self.patients = self.generator.normal(0, 2 * noise, patients)

    def scores(self, draw, mean, classes):
        """Return Dice [patient, class]."""
        own = self.generator.normal(0, self.noise, (len(self.patients), classes))
        return np.clip(mean + self.draws[draw] + self.patients[:, None] + own, 0.02, 0.98)


def _write_run(folder, job, effects, gain, classes, cost, pictures):
    labels = ALL if job.labelled == "all" else int(job.labelled)
    dice = effects.scores(job.draw, 0.9 - 0.35 / np.sqrt(labels) + gain, len(classes))
    rows = [
        {
            "case": f"case{p:02d}", "patient": f"patient{p:02d}", "domain": "", "predictor": "student", "selection": "last",
            "class": name, "dice": float(value), "iou": float(value / (2 - value)), "hd95": float(40 * (1 - value)),
            "assd": float(12 * (1 - value)), "unit": "mm", "missed": False, "spurious": False, "absent": False,
            "reference_voxels": 100, "predicted_voxels": 100,
        }
        for p, values in enumerate(dice)
        for name, value in zip(classes, values, strict=True)
    ]  # fmt: skip
    write_cases_csv(folder / "cases.csv", rows)
    write_atomically(folder / "recipe.yaml", to_yaml(job.recipe))
    append_line(folder / "test_openings.jsonl", {"dataset": job.dataset, "evaluated_on": "test"})
    if pictures:
        _write_pictures(folder / "pictures")
    summary = {
        "name": job.name,
        "dataset": job.dataset,
        "classes": ["background", *classes],
        "split": f"{labels:08x}{job.draw:08x}",
        "labelled_patients": labels,
        "unlabelled_patients": ALL - labels,
        "validation_patients": 0,
        "test_patients": len(dice),
        "evaluated_on": "test",
        "notes": [],
        "selection": "last",
        "predictor": "student",
        "steps": [100],
        "results": [_entry([r for r in rows if name in (r["class"], "mean")], name) for name in (*classes, "mean")],
        "training_seconds": 10.0 * cost + job.draw,
        "images_per_step": [{"with_gradient": 4 * cost, "without": 4 * (cost - 1)}],
        "parameters": 1000,
        "cases_sha256": file_digest(folder / "cases.csv"),
    }
    write_json(folder / "summary.json", summary)


def _entry(rows, name):
    """Return what a summary says of a class, without the interval, which takes long and which no report reads."""
    means = {metric: float(np.mean([row[metric] for row in rows])) for metric in ("dice", "iou", "hd95", "assd")}
    counts = {"missed": 0, "spurious": 0, "absent": 0}
    return {"selection": "last", "predictor": "student", "class": name, **means, "unit": "mm", **counts}


def _write_pictures(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for rank in ("best", "median", "worst"):
        Image.fromarray(generator.integers(0, 255, (300, 860, 3), np.uint8)).save(folder / f"{rank}-case-{rank}.png")

"""First stages that runs have in common are trained once, and no result differs from that of a run by hand."""

import json
from pathlib import Path

import pytest
import yaml

from labeleff.recipe_io import load_recipe
from labeleff.runner import run, train
from labeleff.sweep.collect import collect, run_folder
from labeleff.sweep.grid import Job, expand
from labeleff.sweep.local import Local
from labeleff.sweep.orchestrate import sweep
from labeleff.sweep.starts import in_order, shared_starts

from ..conftest import tiny
from ..test_resume import outcome
from .small import small_benchmark

GUESSED = {
    "strategy": "supervised",
    "steps": 6,
    "batch": 4,
    "annotator": {"name": "pseudo_labels", "threshold": 0.4},
    "revise_every": 3,
    "revise_at_start": True,
}
PLAIN = {"strategy": "supervised", "steps": 4, "batch": 4}
MEAN = {"strategy": "mean_teacher", "steps": 4, "batch": 4}
METHODS = {
    "one": [PLAIN],
    "two": [PLAIN, GUESSED, MEAN],
    "other_end": [PLAIN, GUESSED, {**MEAN, "strategy": {"name": "mean_teacher", "decay": 0.9}}],
    "shorter": [PLAIN, {**MEAN, "steps": 5}],
    "moments": [PLAIN, {**PLAIN, "optimiser_state": "previous"}],
    "nothing_more": [PLAIN, {**MEAN, "steps": 0}],
    "alone": [{**PLAIN, "steps": 3}, MEAN],
}


def benchmark_of(folder: Path, methods=METHODS, **changes):
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    for name, stages in methods.items():
        (folder / "methods" / f"{name}.yaml").write_text(yaml.safe_dump({"stages": stages}))
    values = {"methods": list(methods), "baseline": "one", "draws": 1, "steps": None, "allow": ["steps"], "set": []}
    return small_benchmark(folder, **(values | changes))


class Watched:
    """An engine that remembers what it was given."""

    def __init__(self, shared=True):
        self.engine, self.tasks, self.shared = Local(2), [], shared

    def run(self, tasks):
        self.tasks += tasks
        yield from self.engine.run(tasks)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache):
    place, engine = tmp_path_factory.mktemp("starts"), Watched()
    grid = sweep(benchmark_of(place), place / "out", engine, cache=cache)
    return place / "out", grid, engine.tasks


def test_the_longest_stages_in_common_are_found(tmp_path):
    grid = expand(benchmark_of(tmp_path))
    starts = shared_starts(grid.jobs, tmp_path)
    method = {job.name: job.method for job in grid.jobs}
    lengths = {method[name]: len(start.recipe.stages) for name, start in starts.items()}
    assert lengths == {"two": 2, "other_end": 2, "shorter": 1, "moments": 1, "nothing_more": 1}
    first, second = in_order(starts)
    assert [len(group) for group in (first, second)] == [1, 1]
    assert second[0].after is first[0]


def test_stages_that_few_have_in_common_are_not_kept_beside_longer_ones(tmp_path):
    grid = expand(benchmark_of(tmp_path, {name: METHODS[name] for name in ("one", "two", "other_end")}))
    groups = in_order(shared_starts(grid.jobs, tmp_path))
    assert [[len(start.recipe.stages) for start in group] for group in groups] == [[2]]


def jobs_of(*recipes: dict, change: str = "") -> list[Job]:
    """Return a job per list of stages; a setting changes the last one."""
    jobs = []
    for number, stages in enumerate(recipes):
        settings = [change] if change and number == len(recipes) - 1 else []
        recipe = load_recipe(tiny(stages=stages), settings)
        jobs.append(Job(f"job{number}", str(number), "", f"job{number}", "2", 0, 0, None, {}, recipe))
    return jobs


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("seed=5", False),
        ("data.labelled=3", False),
        ("data.draw=1", False),
        ("data.unlabelled=1", False),
        ("backbone.norm=instance", False),
        ("stages.0.steps=5", False),
        ("stages.0.optimiser.lr=0.1", False),
        ("trainer.threads=2", False),
        ("evaluation.every=2", False),
        ("stages.1.steps=7", True),
        ("evaluation.rounds=true", True),
        ("trainer.checkpoint_every=3", True),
        ("name=other", True),
    ],
)
def test_what_matters_to_the_first_stages_tells_them_apart(tmp_path, change, same):
    assert bool(shared_starts(jobs_of([PLAIN, MEAN], [PLAIN, MEAN], change=change), tmp_path)) == same


def test_expected_sizes_matter_only_where_unlabelled_images_are_seen(tmp_path):
    prior = "data.prior={name: constant, sizes: {disc: 0.1}}"
    for first, same in ((PLAIN, True), (MEAN, False), ({**PLAIN, "streams": {"labelled": {"role": "all"}}}, False)):
        assert bool(shared_starts(jobs_of([first, MEAN], [first, MEAN], change=prior), tmp_path)) == same


def test_stages_with_folds_are_trained_by_every_run(tmp_path):
    folded = {**PLAIN, "start": "fresh", "folds": 2, "annotator": "confident_learning"}
    assert not shared_starts(jobs_of([folded, MEAN], [folded, MEAN]), tmp_path)


def test_every_run_equals_one_by_hand_bit_for_bit(swept, tmp_path, cache):
    folder, grid, tasks = swept
    assert len(tasks) == len(grid.jobs) + 2
    assert sum(task.start is not None for task in tasks) == 6  # five runs, and the longer start
    for job in grid.jobs:
        run(job.recipe, tmp_path / job.name, cache=cache)
        assert outcome(run_folder(folder, job.name)) == outcome(tmp_path / job.name), job.method
    assert len(collect(folder).records) == len(grid.jobs)
    logs = {job.method: (folder / "logs" / f"{job.name}.log").read_text() for job in grid.jobs}
    assert "at stage 1, step 6" in logs["two"]
    assert "resuming" not in logs["alone"]


def test_first_stages_open_no_test_label_and_count_in_no_report(swept):
    folder, grid, _ = swept
    assert not list((folder / "starts").glob("*/test_openings.jsonl"))
    assert not list((folder / "starts").glob("*/summary.json"))
    found = collect(folder)
    assert found.openings == {"phantom (test)": len(grid.jobs)}
    assert not found.left_out


def test_the_time_of_first_stages_is_part_of_every_run(swept):
    folder, grid, _ = swept
    seconds = {
        job.method: json.loads((run_folder(folder, job.name) / "summary.json").read_text())["training_seconds"]
        for job in grid.jobs
    }
    assert seconds["nothing_more"] > 0


def test_runs_that_read_no_folder_of_others_train_by_themselves(tmp_path, cache):
    engine = Watched(shared=False)
    methods = {name: METHODS[name] for name in ("one", "shorter", "moments")}
    grid = sweep(benchmark_of(tmp_path, methods), tmp_path / "out", engine, cache=cache)
    assert len(engine.tasks) == len(grid.jobs)
    assert not any(task.start for task in engine.tasks)


def test_later_runs_take_over_what_an_earlier_sweep_left(swept, cache):
    folder, _, _ = swept
    engine = Watched()
    late = {**METHODS, "late": [PLAIN, {**MEAN, "batch": 5}]}
    terms = ["steps", "labelled images per step"]
    sweep(benchmark_of(folder.parent, late, allow=terms), folder, engine, cache=cache)
    (task,) = engine.tasks
    assert task.start is not None


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_runs_to_themselves(tmp_path, cache):
    methods = {name: METHODS[name] for name in ("one", "shorter", "moments")}
    made = benchmark_of(tmp_path, methods)
    grid = expand(made)
    (start,) = in_order(shared_starts(grid.jobs, tmp_path / "out"))[0]
    place = start.folder(tmp_path / "out")
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text("{")
    sweep(made, tmp_path / "out", Watched(), cache=cache)
    assert len(collect(tmp_path / "out").records) == 3


def test_a_run_that_was_killed_while_it_took_over_takes_over_again(swept, tmp_path, cache):
    folder, grid, _ = swept
    job = next(job for job in grid.jobs if job.method == "two")
    start = shared_starts(grid.jobs, folder)[job.name].folder(folder)
    place = tmp_path / "run"
    (place / "annotations").mkdir(parents=True)
    (place / "metrics.jsonl").write_text('{"torn')
    run(job.recipe, place, cache=cache, start=start)
    assert outcome(place) == outcome(run_folder(folder, job.name))


def test_a_run_that_has_begun_keeps_its_own(tmp_path, cache, swept):
    folder, grid, _ = swept
    job = next(job for job in grid.jobs if job.method == "two")
    start = shared_starts(grid.jobs, folder)[job.name]
    train(start.recipe, tmp_path / "again", cache=cache)
    before = sorted((tmp_path / "again").rglob("*.ckpt"))
    stamp = before[-1].stat().st_mtime_ns
    train(start.recipe, tmp_path / "again", cache=cache, start=start.folder(folder))
    assert before[-1].stat().st_mtime_ns == stamp


BLIND = {"strategy": "masked_autoencoder", "steps": 4, "batch": 4}


@pytest.mark.parametrize(
    ("first", "changes", "same"),
    [
        (BLIND, ["data.labelled=3"], True),
        (BLIND, ["data.draw=1"], True),
        (BLIND, ["seed=1"], False),
        (BLIND, ["data.labelled=3", "data.unlabelled=2"], False),
        (BLIND, ["data.labelled=3", "data.unlabelled_from=[site0]"], False),
        (BLIND, ["data.labelled=3", "evaluation.probe=2"], False),
        ({**BLIND, "streams": {"images": {"role": "unlabelled"}}}, ["data.labelled=3"], False),
        ({**PLAIN, "streams": {"labelled": {"role": "all"}}}, ["data.labelled=3"], False),
    ],
)
def test_stages_that_see_no_label_are_the_same_for_every_budget(tmp_path, first, changes, same):
    common = [change for change in changes if change.startswith(("data.unlabelled", "evaluation"))]
    recipes = [load_recipe(tiny(stages=[first, PLAIN]), settings) for settings in (common, changes)]
    jobs = [Job(f"job{n}", str(n), "", f"job{n}", "2", 0, 0, None, {}, one) for n, one in enumerate(recipes)]
    assert bool(shared_starts(jobs, tmp_path)) == same


def test_pretraining_is_done_once_for_all_budgets_bit_for_bit(tmp_path, cache):
    engine = Watched()
    made = benchmark_of(tmp_path, {"one": [BLIND, PLAIN]}, labelled=[2, 3])
    grid = sweep(made, tmp_path / "out", engine, cache=cache)
    assert len(engine.tasks) == 3
    for job in grid.jobs:
        run(job.recipe, tmp_path / job.name, cache=cache)
        assert outcome(run_folder(tmp_path / "out", job.name)) == outcome(tmp_path / job.name), job.labelled

"""Sweeps that really run: what is missing is done, what fails hurts nothing else, what does not count is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from labeleff.errors import RunError
from labeleff.plugins import load_plugins
from labeleff.report.analysis import analyse
from labeleff.runner import run
from labeleff.sweep.collect import collect, newest_sweep, run_folder
from labeleff.sweep.local import Local
from labeleff.sweep.orchestrate import make_engine, sweep

from .small import small_benchmark

HERE = Path(__file__).parent.parent.parent
LONG = {"steps": 160, "draws": 1, "set": ["stages.0.batch=4", "trainer.checkpoint_every=10"]}
"""Runs that are stopped: of far more steps than it takes until both have begun."""


class Watched:
    """An engine that remembers what it was given."""

    def __init__(self, engine):
        self.engine, self.tasks, self.shared = engine, [], engine.shared

    def run(self, tasks):
        self.tasks += tasks
        yield from self.engine.run(tasks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    place = tmp_path_factory.mktemp("sweep")
    grid = sweep(small_benchmark(place), place / "out", Local(2), cache=cache)
    return place, grid


@pytest.fixture
def copied(finished, tmp_path):
    """A finished sweep that a test may spoil."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy" / "out", finished[1]


def test_every_run_has_its_result_and_equals_a_run_by_hand(finished, tmp_path, cache):
    place, grid = finished
    found = collect(place / "out")
    assert {record.name for record in found.records} == {job.name for job in grid.jobs}
    assert not found.left_out
    assert found.openings == {"phantom (test)": 4}
    assert found.openings_so_far["phantom (test)"] >= 4
    job = grid.jobs[1]
    run(job.recipe, tmp_path, cache=cache)
    ours, theirs = (load_file(f / "predictor.safetensors") for f in (tmp_path, run_folder(place / "out", job.name)))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert (tmp_path / "cases.csv").read_bytes() == (run_folder(place / "out", job.name) / "cases.csv").read_bytes()


def test_only_what_is_missing_is_run(copied, tmp_path, cache):
    folder, grid = copied
    engine = Watched(Local(1))
    sweep(small_benchmark(folder.parent), folder, engine, cache=cache)
    assert not engine.tasks
    (run_folder(folder, grid.jobs[0].name) / "summary.json").unlink()
    (run_folder(folder, grid.jobs[1].name) / "cases.csv").write_text("torn")
    more = sweep(small_benchmark(folder.parent, ["draws=3"]), folder, engine, cache=cache)
    new = {job.name for job in more.jobs} - {job.name for job in grid.jobs}
    assert {task.name for task in engine.tasks} == new | {grid.jobs[0].name, grid.jobs[1].name}
    assert len(collect(folder).records) == 6


def test_runs_made_under_another_default_are_refused(copied, cache):
    folder, grid = copied
    place = run_folder(folder, next(job.name for job in grid.jobs if job.method == "mean_teacher"))
    recipe, plan = place / "recipe.yaml", (folder / "plan.json").read_bytes()
    assert "decay: 0.99" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("decay: 0.99", "decay: 0.5"))
    engine = Watched(Local(1))
    with pytest.raises(RunError, match=rf"(?s){place.name}: 1 of 4 runs.*decay: 0\.5 -> 0\.99") as caught:
        sweep(small_benchmark(folder.parent, ["draws=2"]), folder, engine, cache=cache)
    assert "remove" in str(caught.value)
    assert not engine.tasks
    assert (folder / "plan.json").read_bytes() == plan
    assert {entry.name for entry in collect(folder).left_out} == {place.name}


def test_a_crash_hurts_no_other_run_and_is_named(tmp_path, cache, own_registry):
    (tmp_path / "crashing.py").write_text(
        "import os, signal\n"
        "from labeleff.registry import register\n"
        "from labeleff.strategies.supervised import Supervised\n"
        "@register('strategy', 'crashing')\n"
        "class Crashing(Supervised):\n"
        '    """Dies."""\n'
        "    def step(self, backbone, batch, progress):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "@register('strategy', 'raising')\n"
        "class Raising(Supervised):\n"
        '    """Raises."""\n'
        "    def step(self, backbone, batch, progress):\n"
        "        raise ZeroDivisionError('one of those days')\n"
    )
    (tmp_path / "methods").mkdir()
    for name in ("crashing", "raising"):
        (tmp_path / "methods" / f"{name}.yaml").write_text(f"stages: [{{strategy: {name}, steps: 4}}]")
    plugins = [tmp_path / "crashing.py"]
    load_plugins(plugins)
    methods = ["supervised", "crashing", "raising"]
    benchmark = small_benchmark(tmp_path, methods=methods, draws=1, allow=["augmentation"])
    with pytest.raises(RunError, match="2 of 3 runs failed") as caught:
        sweep(benchmark, tmp_path / "out", Local(2), cache=cache, plugins=plugins)
    assert "killed by signal 9" in str(caught.value)
    assert "ZeroDivisionError: one of those days" in str(caught.value)
    left = {entry.name.split("-")[0]: entry.reason for entry in collect(tmp_path / "out").left_out}
    assert set(left) == {"crashing", "raising"}
    assert "one of those days" in left["raising"]
    assert "half-finished" in left["crashing"]


def test_runs_that_do_not_count_are_named_and_never_averaged(copied):
    folder, grid = copied
    names = [job.name for job in grid.jobs]
    before = {row["run"]: row["dice"] for row in analyse(collect(folder)).tables["runs"]}
    runs = folder / "runs"
    shutil.copytree(runs / names[0], runs / "copy-of-it")
    (runs / names[1] / "summary.json").unlink()
    text = (runs / names[2] / "cases.csv").read_text()
    (runs / names[2] / "cases.csv").write_text(text.replace("0.", "1.", 1))
    shutil.rmtree(runs / names[3])
    (runs / "notes").mkdir()
    found = collect(folder)
    reasons = {entry.name: entry.reason for entry in found.left_out}
    assert set(reasons) == {*names[1:], "copy-of-it", "notes"}
    assert "duplicate" in reasons["copy-of-it"]
    assert "half-finished" in reasons[names[1]]
    assert "corrupt" in reasons[names[2]]
    assert "missing" in reasons[names[3]]
    assert "not in the plan" in reasons["notes"]
    analysis = analyse(found)
    assert {row["run"]: row["dice"] for row in analysis.tables["runs"]} == {names[0]: before[names[0]]}
    assert [row["run"] for row in analysis.tables["left_out"]] == [entry.name for entry in found.left_out]


def test_a_run_under_a_wrong_name_does_not_count(copied):
    folder, grid = copied
    one, two = (run_folder(folder, job.name) for job in grid.jobs[:2])
    shutil.rmtree(two)
    shutil.copytree(one, two)
    reasons = {entry.name: entry.reason for entry in collect(folder).left_out}
    assert reasons == {two.name: "its recipe is not the planned one"}
    (one / "recipe.yaml").write_text("{")
    assert "not readable" in {entry.name: entry.reason for entry in collect(folder).left_out}[one.name]


def test_a_folder_without_a_sweep_is_said_to_be(tmp_path):
    with pytest.raises(RunError, match="no readable plan"):
        collect(tmp_path)
    with pytest.raises(RunError, match="no sweep is here"):
        newest_sweep(tmp_path)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="threads are counted in /proc")
def test_the_server_that_runs_are_forked_from_has_imported_everything_and_has_one_thread():
    code = (
        "import multiprocessing\n"
        "from labeleff.sweep.local import PRELOADED, _single_threaded\n"
        "from tests.sweep.threads import count\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('forkserver')\n"
        "    context.set_forkserver_preload(list(PRELOADED))\n"
        "    receiver, sender = context.Pipe(duplex=False)\n"
        "    with _single_threaded(): context.Process(target=count, args=(sender,)).start()\n"
        "    print(receiver.recv())\n"
    )
    environment = {k: v for k, v in os.environ.items() if "THREADS" not in k} | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "(1, True)"


def test_a_stopped_sweep_leaves_checkpoints_and_goes_on(tmp_path, cache):
    small_benchmark(tmp_path, **LONG)
    command = [
        sys.executable,
        "-m",
        "labeleff",
        "sweep",
        str(tmp_path / "small.yaml"),
        "--folder",
        str(tmp_path / "out"),
    ]
    command += ["--cache", str(cache), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE)
    end = time.monotonic() + 300
    begun: set[str] = set()  # one fast run may write two checkpoints before the other writes its first
    while time.monotonic() < end and len(begun) < 2:
        time.sleep(0.05)
        begun = {path.parents[1].name for path in tmp_path.glob("out/runs/*/checkpoints/*.ckpt")}
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 75, said
    left = collect(tmp_path / "out").left_out
    assert {entry.reason.split(":")[0] for entry in left} == {"half-finished"}
    sweep(small_benchmark(tmp_path, **LONG), tmp_path / "out", Local(2), cache=cache)
    assert len(collect(tmp_path / "out").records) == 2
    resumed = [path for path in (tmp_path / "out" / "logs").glob("*.log") if "resuming" in path.read_text()]
    assert len(resumed) == len(left)


def test_wrong_engines_are_refused():
    for name, workers in (("slurm", 1), ("local", 0)):
        with pytest.raises(RunError, match=r"no such engine|at least one"):
            make_engine(name, workers, address="auto", shared=True, gpus=0)


def test_two_sweeps_do_not_share_a_folder(copied, cache):
    import fcntl

    folder, _ = copied
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another sweep"):
            sweep(small_benchmark(folder.parent), folder, Local(1), cache=cache)


def test_tuning_gives_every_method_its_trials_on_development_patients_only(tmp_path, cache):
    tuning = {
        "trials": 2,
        "labelled": 2,
        "development": 3,
        "space": {
            "supervised": {"stages.0.optimiser.lr": [1e-3, 3e-3]},
            "mean_teacher": {"stages.0.strategy.decay": [0.9]},
        },
    }
    place = tmp_path / "out"
    grid = sweep(small_benchmark(tmp_path, tuning=tuning, draws=1), place, Local(2), cache=cache)
    log = json.loads((place / "tuning.json").read_text())
    assert {key: len(entry["trials"]) for key, entry in log.items()} == {"/supervised": 2, "/mean_teacher": 2}
    for entry in log.values():
        assert entry["trials"][0]["settings"] == []
        best = max(trial["dice"] for trial in entry["trials"])
        assert entry["trials"][entry["chosen"]]["dice"] == best
        for trial in entry["trials"]:
            split = json.loads((place / "tuning" / "runs" / trial["run"] / "split.json").read_text())
            assert split["evaluate_on"] == "development"
            assert split["test"] == entry["development"]["cases"]
    hashes = {entry["development"]["hash"] for entry in log.values()}
    assert len(hashes) == 1
    plan = json.loads((place / "plan.json").read_text())
    assert plan["tuned"]["/supervised"] == log["/supervised"]["trials"][log["/supervised"]["chosen"]]["settings"]
    assert all(job.recipe.data.evaluate_on == "test" for job in grid.jobs)

"""A Ray cluster of several nodes on this machine: its runs are those of the local engine, also when a node is lost."""

import builtins
import json
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from labeleff.errors import RecipeError, RunError
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.runner import run
from labeleff.sweep.cluster import Cluster
from labeleff.sweep.local import ONE_THREAD, Local
from labeleff.sweep.worker import Task

from ..conftest import tiny
from ..test_resume import AUGMENT, outcome

ray = pytest.importorskip("ray")


def recipe(seed: int, steps: int, strategy: str = "supervised") -> dict:
    values = tiny(seed=seed, stages=[{"strategy": strategy, "steps": steps, "batch": 4, "augment": AUGMENT}])
    return values | {"trainer": {"checkpoint_every": 10, "log_every": 1, "accelerator": "cpu"}}


def make_tasks(folder: Path, recipes: dict[str, dict], cache: Path, plugins=()) -> list[Task]:
    return [
        Task(
            name,
            to_mapping(load_recipe(values)),
            folder / "runs" / name,
            folder / "logs" / f"{name}.log",
            cache,
            tuple(plugins),
        )
        for name, values in recipes.items()
    ]


@pytest.fixture
def cluster(monkeypatch):
    """Start a cluster with a head on which nothing runs but drivers and keepers."""
    from ray.cluster_utils import Cluster as Nodes

    for name in ONE_THREAD:  # as on a cluster on which nobody has thought of it
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    place = tempfile.mkdtemp(prefix="ray-")  # sockets need short paths
    Path("/tmp/ray").mkdir(exist_ok=True)  # ray notes an address there whatever temp_dir is
    small = {"object_store_memory": 80 * 2**20}
    nodes = Nodes()
    nodes.add_node(num_cpus=0, include_dashboard=False, temp_dir=place, **small)
    nodes.small = small
    yield nodes
    nodes.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def wait_until(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def at_work(task: Task) -> bool:
    """Return whether a run has a checkpoint to resume from, and far to go."""
    return any(task.folder.glob("checkpoints/*.ckpt")) and not (task.folder / "predictor.safetensors").exists()


def processes(name: str) -> list[str]:
    """Return the processes that Ray runs a task of that name in."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::{name}".encode()):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def log_of(task: Task) -> str:
    return task.log.read_text()


def check_equal(tasks: list[Task], reference: list[Task]) -> None:
    for task, same in zip(tasks, reference, strict=True):
        assert outcome(task.folder) == outcome(same.folder), task.name
        assert len((task.folder / "test_openings.jsonl").read_text().splitlines()) >= 1
        assert not list(task.folder.glob(".incoming"))


def test_one_node_without_a_shared_folder(cluster, tmp_path, cache):
    """Two runs are those of this process; a third is left early, with a checkpoint in the sweep's folder."""
    cluster.add_node(num_cpus=2, **cluster.small)
    plugin = tmp_path / "plugin.py"
    plugin.write_text("print('the plugin is here')\n")
    recipes = {"a": recipe(0, 8), "long": recipe(1, 3000), "b": recipe(2, 8, "mean_teacher")}
    tasks = make_tasks(tmp_path / "cluster", recipes, cache, [plugin])
    local = make_tasks(tmp_path / "local", recipes, cache)
    for same in (local[0], local[2]):
        run(load_recipe(same.recipe), same.folder, cache=cache)
    handler = signal.getsignal(signal.SIGTERM)
    engine = Cluster(cluster.address, shared=False, sync_every=0.1)
    running = engine.run(tasks)
    first = next(running)
    plugin.unlink()  # its content has travelled
    second = next(running)
    assert {first.name, second.name} == {"a", "b"}
    assert not first.error, log_of(tasks[0])
    assert not second.error, log_of(tasks[2])
    assert signal.getsignal(signal.SIGTERM) is handler
    wait_until(lambda: at_work(tasks[1]))
    assert len(processes("long")) == 1
    running.close()
    assert not processes("long")
    assert not ray.is_initialized()
    assert at_work(tasks[1])
    assert "the plugin is here" in log_of(tasks[0])
    assert "everything is in" in log_of(tasks[0])
    check_equal([tasks[0], tasks[2]], [local[0], local[2]])


LONG = ("run-2", "run-3")  # some are done before them, others wait; every run is a process that imports everything
RECIPES = {
    f"run-{i}": recipe(i, *((500, "supervised") if f"run-{i}" in LONG else (12, ("bcp", "supervised")[i % 2])))
    for i in range(6)
}


@pytest.fixture(scope="module")
def local(tmp_path_factory, cache):
    """The runs of the local engine."""
    tasks = make_tasks(tmp_path_factory.mktemp("local"), RECIPES, cache)
    assert not [found.error for found in Local(2).run(tasks) if found.error]
    return tasks


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_a_node_is_lost_in_the_middle(shared, local, cluster, tmp_path, cache):
    nodes = [cluster.add_node(num_cpus=1, **cluster.small) for _ in range(2)]
    tasks = make_tasks(tmp_path, RECIPES, cache)
    by_name = {task.name: task for task in tasks}
    killed = []

    def kill():
        wait_until(lambda: all(at_work(by_name[name]) for name in LONG), 600)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.extend(name for name in LONG if at_work(by_name[name]))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = []
    for one in Cluster(cluster.address, shared=shared, sync_every=0.2).run(tasks):
        found.append(one)
        if killed and len(cluster.worker_nodes) < 2:  # one that joins late
            cluster.add_node(num_cpus=1, **cluster.small)
    killer.join()
    assert not [one for one in found if one.error]
    assert sorted(one.name for one in found) == sorted(RECIPES)
    assert len(killed) == 2
    resumed = [name for name in RECIPES if "resuming" in log_of(by_name[name])]
    assert len(resumed) == 1
    assert resumed[0] in LONG
    check_equal(tasks, local)


@pytest.mark.slow
def test_errors_are_outcomes_and_are_left_where_reports_look(cluster, tmp_path, cache):
    """Those of a run, and the end of a process that has no retry left."""
    cluster.add_node(num_cpus=1, **cluster.small)
    values = recipe(0, 2)
    values["backbone"] = {"name": "unet", "channels": [4, 8, 16], "dropout": 2.0}
    tasks = make_tasks(tmp_path, {"wrong": values}, cache)
    (found,) = Cluster(cluster.address, shared=False).run(tasks)
    assert "dropout" in found.error
    assert json.loads((tmp_path / "logs" / "wrong.error.json").read_text())["error"] == found.error
    plugin = tmp_path / "deadly.py"
    plugin.write_text("import os\nprint('dying', flush=True)\nos.kill(os.getpid(), 9)\n")
    tasks = make_tasks(tmp_path, {"dead": recipe(0, 2)}, cache, [plugin])
    (found,) = Cluster(cluster.address, shared=True, retries=1).run(tasks)
    assert "given up by Ray: WorkerCrashedError" in found.error
    assert not found.interrupted
    assert log_of(tasks[0]).count("dying") == 2
    assert json.loads((tmp_path / "logs" / "dead.error.json").read_text())["error"] == found.error


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **options):
        if name == "ray":
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match=r"pip install 'labeleff\[ray\]'"):
        list(Cluster("auto", shared=True).run([]))


def test_without_a_cluster_the_error_says_where_it_was_looked_for():
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9: no Ray cluster can be reached there") as caught:
        list(Cluster("127.0.0.1:9", shared=True).run([]))
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()


def test_a_missing_plugin_is_named(tmp_path):
    from labeleff.sweep.cluster import _plugins

    (task,) = make_tasks(tmp_path, {"a": recipe(0, 2)}, tmp_path, [tmp_path / "none.py"])
    with pytest.raises(RecipeError, match=r"none\.py: no such Python file"):
        _plugins(task)

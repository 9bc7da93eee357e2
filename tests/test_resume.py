"""Killed anywhere, a run ends bit for bit like an undisturbed one."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from labeleff import registry
from labeleff.batch import derive_seed
from labeleff.data.rounds import Rounds
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.rundir import RunDirectory
from labeleff.runner import run

from .conftest import tiny

AUGMENT = {"rotate": 20.0, "noise": 0.1, "flip": [0]}
RECIPES = {
    "supervised": tiny(
        stages=[
            {"strategy": "supervised", "steps": 5, "batch": 4, "augment": AUGMENT, "optimiser": {"name": "sgd"}},
            {
                "strategy": "supervised",
                "steps": 7,
                "batch": 4,
                "schedule": {"name": "poly"},
                "optimiser_state": "previous",
                "optimiser": {"name": "sgd"},
                "augment": AUGMENT,
            },
        ]
    ),
    "bcp": tiny(evaluation={"every": 3, "pictures": False}, data=tiny()["data"] | {"labelled": 3, "validation": 1}),
    "pseudo_labels": tiny(
        stages=[
            {"strategy": "mean_teacher", "steps": 4, "batch": 4, "augment": AUGMENT},
            {
                "strategy": "supervised",
                "steps": 8,
                "batch": 4,
                "annotator": {"name": "pseudo_labels", "threshold": 0.4},
                "revise_every": 3,
                "revise_at_start": True,
                "streams": {"labelled": {"role": "all"}},
            },
        ]
    ),
    "label_correction": tiny(
        stages=[
            {
                "strategy": "adele",
                "steps": 10,
                "batch": 4,
                "augment": AUGMENT,
                "annotator": {
                    "name": "label_correction",
                    "windows": 5,
                    "patches": 1,
                    "start": "none",
                    "points": 2,
                    "r": 0.01,
                }
                | {"threshold": 0.3, "agreement": 0.0, "least": 0.0},
                "revise_every": 3,
            }
        ],
        data=tiny()["data"] | {"noise": {"name": "distance", "target_dice": 0.7}},
        evaluation={"pictures": False, "diagnose": 4, "diagnose_cases": 1},
    ),
    "folds": tiny(
        data=tiny()["data"] | {"labelled": 4},
        stages=[
            {
                "strategy": "supervised",
                "steps": 4,
                "batch": 4,
                "augment": AUGMENT,
                "annotator": "confident_learning",
                "folds": 2,
                "start": "fresh",
            },
            {"strategy": "supervised", "steps": 3, "batch": 4, "augment": AUGMENT, "start": "fresh"},
        ],
    ),
    "soft": tiny(
        data=tiny()["data"] | {"dataset": tiny()["data"]["dataset"] | {"raters": 3}, "raters": "soft"},
        stages=[
            {
                "strategy": "supervised",
                "steps": 8,
                "batch": 4,
                "augment": AUGMENT,
                "annotator": {"name": "pseudo_labels", "threshold": 0.4},
                "revise_every": 4,
                "streams": {"labelled": {"role": "all"}},
            },
        ],
    ),
}
RECIPES["queries"] = tiny(
    data=tiny()["data"]
    | {
        "dataset": {"name": "phantom_sites", "patients": 3, "test": 2, "size": [32, 32], "slices": 2},
        "source": ["source"],
        "target": ["target"],
    },
    stages=[
        {
            "strategy": "ripu",
            "steps": 9,
            "batch": 4,
            "augment": AUGMENT,
            "streams": {"unlabelled": {"known": 0.5}},
            "annotator": {"name": "region_query", "rounds": 3, "budget": 0.1},
            "answers": "oracle",
            "revise_every": 3,
            "revise_at_start": True,
        },
    ],
)
RECIPES["four_stages"] = to_mapping(  # the shipped one, of another size
    load_recipe(
        "phantom/four_stages",
        [
            "data.dataset.patients=4",
            "data.dataset.test=1",
            "data.dataset.slices=2",
            "data.dataset.size=[32, 32]",
            "data.labelled=2",
            "data.patch=[32, 32]",
            "backbone.channels=[4, 8, 16]",
            *(f"stages.{index}.steps=3" for index in range(3)),
            *(f"stages.{index}.batch=4" for index in range(4)),
            "stages.3.steps=5",
            "stages.3.revise_every=2",
            "stages.3.annotator.radius=[1]",
            "stages.3.annotator.budget=0.1",
            "trainer.checkpoint_every=2",
            "trainer.log_every=1",
            "evaluation.pictures=false",
        ],
    )
)
POINTS = {  # some of every kind: inside a step, while a checkpoint is written, at a stage's edge, inside a revision
    "supervised": ["write:9", "step:4", "rename:9", "edge:2", "step:1"],
    "bcp": ["step:2", "write:14", "edge:2", "rename:8", "step:1"],
    "pseudo_labels": ["step:5", "revise:2", "edge:1", "write:12", "revise:3", "step:1"],
    "label_correction": ["step:5", "revise:1", "edge:1", "step:2"],
    "folds": ["step:3", "edge:2", "revise:1", "step:1"],
    "soft": ["rename:10", "revise:1", "step:1"],  # the first while raters' labels are copied
    "four_stages": ["ask:2"],  # between question and answer, with the end of the third stage to go back to
    "queries": ["ask:1", "ask:2", "charge:1", "step:2", "revise:3", "ask:2", "charge:1", "edge:2", "step:1"],
}


IN_FOUR_STAGES = {
    "in pretraining, before any checkpoint": "step:1",
    "in pretraining, after one": "step:3",
    "between pretraining and semi-supervision": "edge:2",
    "in semi-supervision": "step:5",
    "between semi-supervision and adaptation": "edge:4",
    "in adaptation": "step:8",
    "between adaptation and the first question": "edge:6",
    "before the first question is published": "ask:1",
    "between question and answer": "ask:2",
    "between answer and ledger": "charge:1",
    "while answers become labels": "revise:3",
    "between two rounds, before any checkpoint": "step:10",
    "between question and answer of the second round": "ask:4",
    "between two rounds, after a checkpoint": "step:12",
    "in the last round": "step:14",
    "after the last step": "edge:9",
}


def outcome(folder: Path) -> dict[str, str]:
    """Digests of everything that must be equal; times and host names are elsewhere."""
    names = ["predictor.safetensors", "cases.csv", "metrics.jsonl", "split.json"]
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = json.dumps({k: v for k, v in summary.items() if k != "training_seconds"})
    found["ledger"] = json.dumps(
        [{k: v for k, v in line.items() if k not in ("time", "previous")} for line in Rounds(folder).ledger()]
    )
    Rounds(folder).verify()
    for path in sorted((folder / "annotations" / "revisions").glob("*.json")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, cache):
    """Runs a recipe in processes that are killed, and returns how many were; one server has imported everything for all."""
    said = tmp_path_factory.mktemp("killed") / "said"
    command = [sys.executable, str(Path(__file__).with_name("kill.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        said.open("wb") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as server,
    ):

        def ask(recipe: dict, folder: Path, points: list[str]) -> int:
            server.stdin.write(json.dumps([recipe, str(folder), str(cache), points]) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer.strip().isdigit(), answer + said.read_text()[-2000:]
            return int(answer)

        yield ask


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed(name, tmp_path, cache, killed_run):
    run(load_recipe(RECIPES[name]), tmp_path / "whole", cache=cache)
    killed = killed_run(RECIPES[name], tmp_path / "killed", POINTS[name])
    assert killed == len(POINTS[name])
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def longer(recipe: dict, factor: int) -> dict:
    """Return a recipe with longer stages, so that many kills find it at work."""
    return recipe | {"stages": [stage | {"steps": stage["steps"] * factor} for stage in recipe["stages"]]}


AT_CHOSEN_POINTS = ("supervised", "folds", "soft")  # as above; at twenty drawn ones before a release alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in AT_CHOSEN_POINTS else name for name in RECIPES]
)
def test_killed_twenty_times(name, tmp_path, cache, killed_run):
    recipe = longer(RECIPES[name], 8)
    run(load_recipe(recipe), tmp_path / "whole", cache=cache)
    generator = random.Random(name)
    kinds = ["step", "write", "rename", "edge"] + (["revise"] if name in ("pseudo_labels", "label_correction") else [])
    points = [f"{generator.choice(kinds)}:{generator.randint(1, 4)}" for _ in range(20)]
    assert killed_run(recipe, tmp_path / "killed", points) == 20
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_four_stages_killed_once_anywhere_and_everywhere(tmp_path, cache, killed_run):
    recipe = RECIPES["four_stages"]
    run(load_recipe(recipe), tmp_path / "whole", cache=cache)
    whole = outcome(tmp_path / "whole")
    for place, point in IN_FOUR_STAGES.items():
        assert killed_run(recipe, tmp_path / place, [point]) == 1, place
        assert outcome(tmp_path / place) == whole, place
    # each process now goes on from where the one before it died: edge after edge, and a step into every stage
    points = ["step:2", "edge:2", "step:1", "edge:2", "step:1", "edge:2", "ask:1", "ask:2", "charge:1", "step:1"]
    points += ["edge:1", "step:1", "ask:1", "ask:2", "revise:1", "step:1"]
    assert killed_run(recipe, tmp_path / "all", points) == len(points)
    assert outcome(tmp_path / "all") == whole


@pytest.mark.parametrize("workers", [2])
def test_another_number_of_workers_changes_nothing(workers, tmp_path, cache):
    run(load_recipe(RECIPES["bcp"]), tmp_path / "one", cache=cache)
    run(load_recipe(RECIPES["bcp"], [f"trainer.workers={workers}"]), tmp_path / "two", cache=cache)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    one.pop("predictor.safetensors"), two.pop("predictor.safetensors")  # its header holds the recipe
    assert one == two


OPTIONS = {"glcl_global": {"scheme": "gr"}}  # the others are for volumes


@pytest.mark.parametrize("name", registry.names("strategy"))
def test_abandoned_at_a_step_drawn_from_its_name(name, tmp_path, cache, monkeypatch):
    """Every strategy: given up in process at some step, reloaded from disk."""
    data = tiny()["data"] | {"prior": {"name": "source_mean"}}
    before = [other for other in registry.get("strategy", name).follows if other != name]  # what it goes on from
    strategies = [*before[:1], {"name": name, **OPTIONS.get(name, {})}]
    stages = [{"strategy": one, "steps": 9, "batch": 4, "augment": AUGMENT} for one in strategies]
    recipe = load_recipe(tiny(data=data, stages=stages))
    run(recipe, tmp_path / "whole", cache=cache)
    stop = 9 * len(before[:1]) + 1 + derive_seed(name) % 8

    class AbandonedError(Exception):
        pass

    from labeleff.learner import Learner

    plain = Learner.optimizer_step
    count = [0]

    def optimizer_step(self, *args, **options):
        plain(self, *args, **options)
        count[0] += 1
        if count[0] == stop:
            raise AbandonedError

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "optimizer_step", optimizer_step)
        with pytest.raises(AbandonedError):
            run(recipe, tmp_path / "again", cache=cache)
    run(recipe, tmp_path / "again", cache=cache)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")


def test_a_torn_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    import torch

    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.save_checkpoint({"stage": 0, "step": step, "value": torch.tensor(step)})
    assert len(list(directory.checkpoints.glob("*.ckpt"))) == 2
    newest = max(directory.checkpoints.glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-10])
    state, notes = directory.load_checkpoint()
    assert state["step"] == 2
    assert len(notes) == 1
    assert "00000003" in notes[0]
    assert "going on from the one before" in notes[0]


def test_a_checkpoint_cannot_run_code(tmp_path):
    import pickle

    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir(parents=True)

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    content = pickle.dumps(Hostile())
    path = directory.checkpoints / "stage-00-step-00000001.ckpt"
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    state, notes = directory.load_checkpoint()
    assert state is None
    assert len(notes) == 1
    assert not (tmp_path / "owned").exists()


def test_sigterm_between_fits_stops_at_once(tmp_path, cache, monkeypatch):
    from labeleff import results
    from labeleff.errors import Interrupted

    recipe = load_recipe(tiny(stages=[{"strategy": "supervised", "steps": 2, "batch": 4}]))
    before = signal.getsignal(signal.SIGTERM)  # another test's library may have put its own in place
    with monkeypatch.context() as patch:
        patch.setattr(results, "evaluate", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM: stopped between two steps"):
            run(recipe, tmp_path, cache=cache)
    assert signal.getsignal(signal.SIGTERM) == before
    assert run(recipe, tmp_path, cache=cache)["steps"] == [2]


def test_sigterm_writes_a_checkpoint_and_exits_with_its_own_code(tmp_path, cache):
    recipe = tmp_path / "tiny.yaml"
    values = tiny(stages=[{"strategy": "supervised", "steps": 100000, "batch": 4}])
    values["trainer"]["checkpoint_every"] = 100000
    recipe.write_text(json.dumps(values))
    command = [
        sys.executable,
        "-m",
        "labeleff",
        "run",
        str(recipe),
        "--folder",
        str(tmp_path / "run"),
        "--cache",
        str(cache),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "tensorboard"
    import time

    for _ in range(3000):
        if metrics.exists():
            break
        time.sleep(0.1)
    time.sleep(1.5)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "run the same command again to go on" in " ".join(errors.split())
    state, _ = RunDirectory(tmp_path / "run").load_checkpoint()
    assert state["step"] > 0

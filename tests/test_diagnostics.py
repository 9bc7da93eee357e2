"""Early learning and memorisation, counted by hand; looking changes nothing about a run."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from labeleff.batch import IGNORE, Task
from labeleff.data.annotations import AnnotationStore
from labeleff.diagnostics import NoiseDiagnostics
from labeleff.edits import Edit
from labeleff.evaluation.inference import segment
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.runner import run
from labeleff.sweep.grid import result_key

from .conftest import tiny

TASK = Task(("background", "heart", "lung"), 2)
CLEAN = {"a": [[1, 1, 1, 0], [2, 2, 0, IGNORE]], "b": [[0, 1, 0, 0], [0, 0, 0, 0]], "c": [[2, 2, 0, 0], [0, 0, 0, 0]]}
GIVEN = {"a": [[1, 0, 2, 1], [2, 0, IGNORE, 0]], "b": [[0, 1, 0, 0], [0, 0, 0, 0]], "c": [[2, 0, 1, 0], [0, 0, 0, 0]]}
FOUND = {"a": [[0, 1, 2, 1], [0, 0, 1, 1]], "c": [[2, 2, 1, 0], [0, 0, 0, 0]]}


def store(folder, labels):
    given = [(case, np.array(label, np.uint8)) for case, label in labels.items()]
    return AnnotationStore.create(folder, {case: label.shape for case, label in given}, given)


def test_values_counted_by_hand(tmp_path):
    clean, given = store(tmp_path / "clean", CLEAN), store(tmp_path / "given", GIVEN)
    asked = []

    def predict(case):
        asked.append(case)
        return np.array(FOUND[case], np.uint8)

    seen = NoiseDiagnostics(clean, given, TASK)
    values = seen.measure("abc", predict, revision=0, most=5)
    assert asked == ["a", "c"], "no label of b is wrong"
    # wrong where both know: a: clean 1 1 0 2, given 0 2 1 0, found 1 2 1 0; c: clean 2 0, given 0 1, found 2 1
    assert values == {
        "early_learning/1": 1 / 4,
        "early_learning/2": 1 / 3,
        "memorisation/1": 2 / 3,
        "memorisation/2": 1 / 2,
        # labels everywhere but the two voxels of a that one side does not know
        "label_iou/1": 2 / 6,
        "label_iou/2": 2 / 5,
    }
    given.apply([Edit("a", np.array([[1, 1]], np.uint8), "corrected", (0, 1))], step=1, stage=0, author="x")
    later = seen.measure("abc", predict, revision=1, most=1)
    assert later["label_iou/1"] == 4 / 6
    assert later["label_iou/2"] == 2 / 4
    assert asked[2:] == ["c"]
    assert (later["early_learning/1"], later["memorisation/1"]) == (0.0, 1.0), "given labels stay those of the start"
    assert seen.measure("b", predict, revision=0, most=1)["early_learning/1"] is None


def noisy(**evaluation):
    stage = {"strategy": "supervised", "steps": 5, "batch": 2, "augment": {"rotate": 20.0}}
    data = tiny()["data"] | {"noise": {"name": "distance", "target_dice": 0.7}}
    return load_recipe(tiny(stages=[stage], data=data, evaluation=evaluation))


def test_looking_changes_nothing_and_is_written_down(tmp_path, cache):
    looked, plain = noisy(diagnose=2), noisy(pictures=False)
    run(looked, tmp_path / "looked", cache=cache)
    run(plain, tmp_path / "plain", cache=cache)
    lines = {}
    for name in ("looked", "plain"):
        read = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines[name] = [json.loads(line) for line in read]
    told = [line for line in lines["looked"] if "diagnostics" in line]
    assert [line["step"] for line in told] == [2, 4, 5]
    assert [line for line in lines["looked"] if "diagnostics" not in line] == lines["plain"], "losses"
    cases = [hashlib.sha256((tmp_path / n / "cases.csv").read_bytes()).hexdigest() for n in lines]
    assert cases[0] == cases[1]
    assert (tmp_path / "looked" / "pictures" / "diagnostics_stage_0.png").exists()
    assert result_key(looked) == result_key(plain)
    # the last line, by the weights that were handed on
    data = prepare(looked, tmp_path / "looked", cache=cache)
    network = data.backbone(0)
    network.load_state_dict(load_file(tmp_path / "looked" / "predictor.safetensors"))
    labelled, viewer = data.split.labelled, data.viewer(network)
    found = np.stack([segment(viewer.probabilities(network, case)) for case in labelled])
    truth = np.stack([data.dataset.read_label(data.manifest.case(case)) for case in labelled])
    given = np.stack([data.annotations.read_given(case) for case in labelled])
    for c in (1, 2, 3):
        for what, label in (("early_learning", truth), ("memorisation", given)):
            one, two = (found == c)[truth != given], (label == c)[truth != given]
            assert told[-1]["diagnostics"][f"{what}/{c}"] == pytest.approx((one & two).sum() / (one | two).sum())
        one, two = given == c, truth == c
        assert told[-1]["diagnostics"][f"label_iou/{c}"] == pytest.approx((one & two).sum() / (one | two).sum())


def test_without_noise_there_is_nothing_to_see(tmp_path, cache):
    stage = {"strategy": "supervised", "steps": 2, "batch": 2}
    run(load_recipe(tiny(stages=[stage], evaluation={"pictures": False, "diagnose": 1})), tmp_path, cache=cache)
    assert "diagnostics" not in (tmp_path / "metrics.jsonl").read_text()

"""Wrong labels come out on top."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.corruption import corrupt, open_data
from labeleff.recipe_io import load_component
from labeleff.suspects import measured, outliers, ranked, recipe_for
from tests.conftest import tiny

CLI = CliRunner()
ORGANS = ("large", "paired", "small")


def test_outliers_by_hand():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [4.0, 5.0], [9.0, 8.0]])
    # first class: median 3, absolute deviations 2 1 0 1 6, their median 1; second: median 5, mean deviation 0.6
    expected = [2 / 1.4826, 1 / 1.4826, 0, 1 / 1.4826, max(6 / 1.4826, 3 / 0.6)]
    assert outliers(values).tolist() == pytest.approx(expected)
    assert outliers(np.ones((3, 2))).tolist() == [0, 0, 0]


def test_ranks_by_hand():
    row = {"flagged": 0.0, "quality": 1.0, "volume": 0.0, "parts": 0.0}
    rows = [
        {"case": "a", "loss": 0.1, "dice": 0.9, **row},
        {"case": "b", "loss": 0.5, "dice": None, **row},
        {"case": "c", "loss": 0.3, "dice": 0.2, **row},
    ]
    found = ranked(rows)
    # places in loss: 0, 1, 0.5; in Dice: 0, unknown, 1; in the four equal ones 0.5 each
    scores = {"a": (0 + 0 + 2) / 6, "b": (1 + 0.5 + 2) / 6, "c": (0.5 + 1 + 2) / 6}
    assert [r["case"] for r in found] == ["b", "c", "a"]
    assert [r["rank"] for r in found] == [1, 2, 3]
    assert {r["case"]: r["score"] for r in found} == pytest.approx(scores)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A manifest of 12 generated patients, two of whose labels are wrong: names exchanged, a structure drawn elsewhere."""
    folder = tmp_path_factory.mktemp("damaged")
    recipe = tiny()
    recipe["data"] |= {"dataset": {"name": "phantom", "patients": 12, "test": 1, "size": [48, 48], "slices": 1}}
    recipe["data"]["patch"] = [48, 48]
    (folder / "clean.yaml").write_text(json.dumps(recipe))
    corrupt(str(folder / "clean.yaml"), load_component("noise", "distance", ["share=0.0"]), folder / "set")
    manifest = open_data(str(folder / "set" / "manifest.json")).manifest()
    wrong = [manifest.cases[3], manifest.cases[8]]
    for case, how in zip(wrong, (lambda y: np.where(y > 0, 4 - y, 0), lambda y: np.roll(y, 16, axis=1)), strict=True):
        with np.load(case.label.path) as content:
            label = content["label"]
        np.savez_compressed(case.label.path, label=how(label).astype(np.uint8))
    return folder / "set" / "manifest.json", {case.id for case in wrong}


def test_wrong_labels_come_out_on_top(damaged, tmp_path, cache):
    manifest, wrong = damaged
    command = [
        "suspects",
        str(manifest),
        "--folder",
        str(tmp_path),
        "--steps",
        "60",
        "--folds",
        "2",
        "--top",
        "4",
        "--cache",
        str(cache),
    ]
    done = CLI.invoke(app, command)
    assert done.exit_code == 0, done.output
    with (tmp_path / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12  # training cases only
    assert wrong <= {row["case"] for row in rows[:3]}
    for row in rows:
        assert float(row["dice"]) == pytest.approx(np.mean([float(row[f"dice:{c}"]) for c in ORGANS]))
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 4 == len(list((tmp_path / "pictures").iterdir()))
    assert "http" not in page.replace("http-equiv", "")
    assert not (tmp_path / "run" / "test_openings.jsonl").exists()
    again = CLI.invoke(app, command)  # nothing is trained twice
    assert again.exit_code == 0
    assert "complete" in again.output


def test_equal_scores_go_by_name():
    """Cases z and a have the places 0 1 1 4 5 5 of six, in another order: the last bits of their sums differ."""
    places = [[5, 4, 0, 2, 1, 6, 3], [1, 5, 3, 4, 6, 0, 2], [0, 5, 4, 3, 6, 2, 1], [1, 0, 2, 5, 6, 4, 3],
              [4, 1, 3, 0, 6, 5, 2], [5, 1, 4, 2, 3, 6, 0]]  # fmt: skip
    signs = {"loss": 1, "flagged": 1, "quality": -1, "dice": -1, "volume": 1, "parts": 1}
    rows = [
        {"case": case} | {name: sign * own[i] for own, (name, sign) in zip(places, signs.items(), strict=True)}
        for i, case in enumerate("zabcdef")
    ]
    found = {row["case"]: row for row in ranked(rows)}
    assert found["z"]["score"] == found["a"]["score"] == pytest.approx(16 / 36)
    assert found["a"]["rank"] < found["z"]["rank"]


def test_volumes_are_compared_in_one_unit(tmp_path):
    """Where the spacing of one case is unknown, all are in voxels: else that case would stand out by its unit."""

    class Label:
        def read_given(self, case):
            return np.ones((4, 5), np.uint8)

    class Store:
        def spacing(self, case):
            return (float("nan"),) * 2 if case == "b" else (2.0, 2.0)

    cases = ("a", "b", "c")
    manifest = SimpleNamespace(case=lambda name: SimpleNamespace(patient=name))
    task = SimpleNamespace(classes=("background", "organ"))
    split = SimpleNamespace(labelled=cases)
    (tmp_path / "metrics.jsonl").write_text("")
    rows = measured(
        SimpleNamespace(split=split, annotations=Label(), store=Store(), manifest=manifest, task=task), tmp_path
    )
    assert [(row["unit"], row["volume:organ"], row["volume"]) for row in rows] == [("voxel", 20.0, 0.0)] * 3


def test_a_recipe_lends_its_network_and_data():
    found = recipe_for("acdc/supervised", steps=10, folds=2)
    assert found.backbone.options["channels"] == (8, 16, 32, 64)
    assert (found.data.labelled, found.data.evaluate_on) == ("all", "none")
    assert found.stages[0].folds == 2

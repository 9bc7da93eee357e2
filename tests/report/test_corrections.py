"""Every change of a label is in the table, with numbers counted by hand and against the label maps themselves."""

import csv

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.edits import Edit
from labeleff.recipe_io import load_recipe
from labeleff.report.corrections import COLUMNS, correction_rows, read_corrections, write_corrections
from labeleff.report.curves import corrected_windows
from labeleff.runner import run

from ..conftest import tiny
from ..test_resume import RECIPES

CLASSES = ("background", "heart", "lung")


def test_rows_are_summed_over_cases_and_confidence_over_voxels(tmp_path):
    given = np.array([[0, 1, 1, 1], [2, 2, IGNORE, 0]], np.uint8)  # 5 voxels of foreground in each case
    store = AnnotationStore.create(tmp_path / "annotations", dict.fromkeys("ab", (2, 4)), [("a", given), ("b", given)])
    store.apply(
        [
            Edit("a", np.zeros((1, 2), np.uint8), "corrected", (0, 1), None, 0.9),  # two voxels 1 -> 0
            Edit("b", np.zeros((1, 4), np.uint8), "corrected", (0, 0), None, 0.6),  # three voxels 1 -> 0
            Edit("b", np.full((1, 1), 1, np.uint8), "pseudo", (1, 2)),  # one voxel unknown -> 1
        ],
        step=10,
        stage=0,
        author="someone",
    )
    store.apply([Edit("a", np.full((1, 1), IGNORE, np.uint8), "corrected", (1, 0))], step=20, stage=1, author="other")
    write_corrections(tmp_path, store, "ab", CLASSES)
    with (tmp_path / "corrections.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    rows = [tuple(row.values()) for row in read_corrections(tmp_path)]
    assert [row[:10] for row in rows] == [
        (1, 0, 10, "someone", "heart", "background", 2, 5, 10, 0.5),
        (1, 0, 10, "someone", "unknown", "heart", 1, 1, 10, 0.1),
        (2, 1, 20, "other", "lung", "unknown", 1, 1, 10, 0.1),
    ]
    assert rows[0][10] == pytest.approx((2 * 0.9 + 3 * 0.6) / 5)
    assert (rows[1][10], rows[2][10]) == (None, None)
    assert correction_rows([], CLASSES, 0) == []


def test_labels_that_were_never_revised_have_no_table(tmp_path):
    store = AnnotationStore.create(tmp_path / "annotations", {"a": (2,)}, [("a", np.zeros(2, np.uint8))])
    write_corrections(tmp_path, store, "a", CLASSES)
    assert read_corrections(tmp_path) == []
    assert not (tmp_path / "corrections.csv").exists()


def test_windows_of_corrections():
    history = [{"step": 7, "voxels": {"1->0": 3}}, {"step": 20, "voxels": {"1->2": 1, "0->1": 2}}]
    assert corrected_windows(history, {"windows": 10.0}, steps=40) == {0: [1, 5], 1: [1, 5], 2: [5]}


def test_a_run_accounts_for_every_changed_voxel(tmp_path, cache):
    recipe = tiny(stages=RECIPES["label_correction"]["stages"], evaluation={})  # pictures by default
    run(load_recipe(recipe), tmp_path, cache=cache)
    store, rows = AnnotationStore.open(tmp_path / "annotations"), read_corrections(tmp_path)
    names = {"background": 0, "unknown": IGNORE}
    assert rows
    for revision in range(1, store.revision + 1):
        found = {}
        for case in store._record(revision)["files"]:
            old, new = store.read(case, revision=revision - 1), store.read(case, revision=revision)
            for pair in zip(old[old != new].tolist(), new[old != new].tolist(), strict=True):
                found[pair] = found.get(pair, 0) + 1
        own = [row for row in rows if row["revision"] == revision]
        assert sum(row["voxels"] for row in own) == sum(found.values())
        assert {row["voxels"] for row in own} == set(found.values())
        to_background = sum(n for (_, after), n in found.items() if after == names["background"])
        assert sum(row["voxels"] for row in own if row["to"] == "background") == to_background
    assert (tmp_path / "pictures" / "curves_stage_0.png").exists()

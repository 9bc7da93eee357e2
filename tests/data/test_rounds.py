"""Rounds: what was asked is written once, answers are whole or not there, and the ledger tells of every one of them."""

import json

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.data.rounds import Asked, Region, Rounds, boundary_voxels, slices_touched
from labeleff.errors import StoreError

REGIONS = (
    Region(1, "a", (0, 1, 2), (1, 3, 2), 0.5),
    Region(2, "b", (2, 0, 0), (1, 2, 2), 0.4),
    Region(3, "a", (1, 1, 2), (1, 3, 2), 0.3, "below the first"),
)


@pytest.fixture
def rounds(tmp_path):
    rounds = Rounds(tmp_path)
    rounds.ask(
        Asked(1, 0, 10, 0, {"name": "random"}, "w", REGIONS, {"planned": 16.0}),
        [("a", np.full((2, 5, 5), 1, np.uint8))],
    )
    return rounds


def labels(*numbers):
    found = {r.number: np.zeros(r.size, np.uint8) for r in REGIONS if r.number in numbers}
    for label in found.values():
        label.reshape(-1)[:2] = 2
        label.reshape(-1)[-1] = IGNORE
    return found


def test_a_round_comes_back_as_it_was_asked(rounds):
    assert rounds.numbers() == [1]
    assert rounds.get(1).regions == REGIONS
    assert rounds.get(1).noted == {"planned": 16.0}
    assert rounds.at(0, 10).number == 1
    assert rounds.at(0, 11) is None
    assert (rounds.prediction(1, "a") == 1).all()
    assert rounds.prediction(1, "b") is None
    assert [r.number for r in rounds.asked_of("a")] == [1, 3]
    assert not rounds.asked_of("a", before=1)
    with pytest.raises(StoreError, match="asked before"):
        rounds.ask(rounds.get(1))
    with pytest.raises(StoreError, match="no round 2; the run has 1"):
        rounds.get(2)


def test_regions_of_a_round_lie_apart(tmp_path):
    over = (Region(1, "a", (0, 0), (3, 3)), Region(2, "a", (3, 0), (3, 3)), Region(3, "a", (2, 2), (2, 1)))
    with pytest.raises(StoreError, match="'a': regions 1 and 3 of a round overlap"):
        Rounds(tmp_path).ask(Asked(1, 0, 0, 0, {"name": "random"}, "", over, {}))
    assert not Rounds(tmp_path).numbers()


def test_answers_are_charged_region_by_region(rounds):
    rounds.answer(1, labels(2), author="person", by="Ada", seconds=30.0)
    assert [r.number for r in rounds.open_regions(1)] == [1, 3]
    rounds.answer(1, labels(1, 3), author="oracle")
    assert not rounds.open_regions(1)
    lines = rounds.ledger()
    assert [(line["region"], line["answer"], line["author"], line["seconds"]) for line in lines] == [
        (2, 1, "person", 30.0),
        (1, 2, "oracle", None),
        (3, 2, "oracle", None),
    ]
    first = lines[0]
    assert (first["voxels"], first["labelled"], first["unknown"], first["foreground"]) == (4, 3, 1, 2)
    assert first["classes"] == {"0": 1, "2": 2}
    assert first["by"] == "Ada"
    assert first["round"] == 1
    rounds.verify()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({4: np.zeros((1, 1, 1), np.uint8)}, "region 4 is not open"),
        ({1: np.zeros((1, 3, 3), np.uint8)}, r"region 1 is uint8 \(1, 3, 3\); uint8 \(1, 3, 2\)"),
        ({1: np.zeros((1, 3, 2), np.int64)}, "region 1 is int64"),
    ],
)
def test_what_does_not_fit_is_refused_whole(rounds, given, words):
    with pytest.raises(StoreError, match=words):
        rounds.answer(1, labels(2) | given, author="person")
    assert not rounds.answers(1)
    assert not rounds.ledger()


def test_nothing_is_answered_twice(rounds):
    rounds.answer(1, labels(1), author="oracle")
    with pytest.raises(StoreError, match="region 1 is not open"):
        rounds.answer(1, labels(1), author="oracle")
    assert len(rounds.ledger()) == 1


def test_labels_reach_the_store_as_they_were_given(rounds, tmp_path):
    rounds.answer(1, labels(1, 2), author="oracle")
    rounds.answer(1, labels(3), author="person")
    shapes = {"a": (2, 5, 5), "b": (3, 2, 2)}
    store = AnnotationStore.create(tmp_path / "annotations", shapes, ())
    store.apply(rounds.edits(1), step=10, stage=0, author="random")
    wanted = np.full((2, 5, 5), IGNORE, np.uint8)
    for number in (1, 3):
        wanted[REGIONS[number - 1].box] = labels(number)[number]
    assert (store.read("a", revision=1) == wanted).all()
    assert sum(line["labelled"] for line in rounds.ledger()) == sum(
        int((store.read(case, revision=1) != IGNORE).sum()) for case in shapes
    )


def test_a_death_between_an_answer_and_its_charge_is_made_good_once(rounds):
    rounds.answer(1, labels(2), author="person", seconds=5.0)
    whole = rounds.ledger_path.read_bytes()
    rounds.ledger_path.unlink()
    rounds.reconcile()
    assert rounds.ledger_path.read_bytes() == whole
    rounds.ledger_path.write_bytes(whole[:-9])  # torn
    rounds.reconcile()
    rounds.reconcile()
    assert rounds.ledger_path.read_bytes() == whole
    rounds.verify()


def test_a_death_before_the_description_leaves_no_round_and_no_answer(rounds):
    (rounds.folder / "002" / "predictions").mkdir(parents=True)
    folder = rounds.folder / "001" / "answers"
    folder.mkdir()
    (folder / "001.npz").write_bytes(b"half")
    assert rounds.numbers() == [1]
    assert not rounds.answers(1)
    assert len(rounds.open_regions(1)) == 3
    rounds.answer(1, labels(1), author="oracle")
    rounds.verify()


@pytest.mark.parametrize("harm", ["line", "order", "labels", "gone"])
def test_changes_behind_the_back_are_found(rounds, harm):
    rounds.answer(1, labels(1), author="oracle")
    rounds.answer(1, labels(2), author="oracle")
    lines = rounds.ledger_path.read_text().splitlines()
    if harm == "line":
        row = json.loads(lines[1])
        lines[1] = json.dumps(row | {"labelled": row["labelled"] - 1})
    elif harm == "order":
        lines.reverse()
    elif harm == "gone":
        lines.pop()
    else:
        path = rounds.folder / "001" / "answers" / "001.npz"
        path.write_bytes(path.read_bytes()[:-1])
    rounds.ledger_path.write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match=r"ledger|changed after"):
        rounds.verify()


def test_what_a_person_has_to_look_at():
    label = np.array([[0, 0, 1], [0, IGNORE, 1], [2, 2, 1]], np.uint8)
    # by hand: (0,1)|(0,2), (1,0)|(2,0), (2,1)|(2,2)
    assert boundary_voxels(label) == 6
    assert slices_touched(REGIONS, 0) == 3
    assert slices_touched(REGIONS, 2) == 2 + 2

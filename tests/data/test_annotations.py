"""The annotation store under crashes, tampering and several readers; its plain use is in test_store."""

import multiprocessing
import pickle

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data import annotations
from labeleff.data.annotations import KEPT_VOXELS, OPEN_HANDLES, AnnotationStore
from labeleff.edits import Edit
from labeleff.errors import StoreError

SHAPE = (12, 10)


class PowerCut(RuntimeError):
    """The process ends here."""


@pytest.fixture
def store(tmp_path):
    given = [("a", np.zeros(SHAPE, np.uint8)), ("b", np.ones(SHAPE, np.uint8))]
    return AnnotationStore.create(tmp_path / "annotations", dict.fromkeys("abc", SHAPE), given)


def edits():
    return [Edit(name, np.full(SHAPE, 2, np.uint8), "pseudo") for name in "abc"]


def contents(store, revision):
    return {name: np.unique(store.read(name, revision=revision)).tolist() for name in "abc"}


GIVEN = {"a": [0], "b": [1], "c": [IGNORE]}
REVISED = {"a": [2], "b": [2], "c": [2]}


def cut_power_at_write(monkeypatch, number):
    """Let the given write of labels, revision and pointer, counted from 1, fail before its file has its name."""
    done = []

    def counted(plain):
        def write(*arguments):
            done.append(1)
            if len(done) == number:
                raise PowerCut
            return plain(*arguments)

        return write

    monkeypatch.setattr(annotations, "write_atomically", counted(annotations.write_atomically))
    monkeypatch.setattr(AnnotationStore, "_write_label", counted(AnnotationStore._write_label))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])  # three labels, the revision, the pointer
def test_a_crash_leaves_the_old_revision_and_the_next_attempt_works(store, monkeypatch, number):
    with monkeypatch.context() as patch:
        cut_power_at_write(patch, number)
        with pytest.raises(PowerCut):
            store.apply(edits(), step=3, stage=0, author="x")
    again = AnnotationStore.open(store.folder)
    assert again.revision == 0
    assert again.history() == []
    assert contents(again, 0) == GIVEN
    again.verify()
    assert again.apply(edits(), step=3, stage=0, author="x") == 1
    assert (contents(again, 0), contents(again, 1)) == (GIVEN, REVISED)
    again.verify()


def test_an_annotator_that_fails_half_way_changes_nothing(store):
    def failing():
        yield edits()[0]
        raise PowerCut

    with pytest.raises(PowerCut):
        store.apply(failing(), step=0, stage=0, author="x")
    with pytest.raises(StoreError, match="case 'hidden' is not a training case"):
        store.apply([edits()[0], Edit("hidden", np.zeros(SHAPE, np.uint8), "oracle")], step=0, stage=0, author="x")
    assert store.revision == 0
    assert contents(store, 0) == GIVEN


def test_a_crash_while_discarding_leaves_a_whole_revision(store, monkeypatch):
    for _ in range(2):
        store.apply(edits(), step=1, stage=0, author="x")

    def fail(*arguments, **options):
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", fail)
        with pytest.raises(PowerCut):
            store.discard_after(0)
    again = AnnotationStore.open(store.folder)
    assert again.revision == 0
    # what is made next replaces what was left behind
    again.apply([Edit("a", np.full(SHAPE, 3, np.uint8), "corrected")], step=2, stage=0, author="y")
    assert contents(again, 1) == {"a": [3], "b": [1], "c": [IGNORE]}
    assert [change["by"] for change in again.history()] == ["y"]
    again.verify()


def test_discarding_what_is_not_there_changes_nothing(store):
    store.apply(edits(), step=1, stage=0, author="x")
    store.discard_after(4)
    assert store.revision == 1
    assert contents(store, 1) == REVISED


@pytest.mark.parametrize("revision", [0, 1])
def test_a_changed_label_file_is_found(store, revision):
    store.apply(edits(), step=1, stage=0, author="x")
    path = store.folder / "labels" / f"b.{revision:06d}.b2nd"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="the label of case 'b' was changed after it was written"):
        store.verify()


def test_a_torn_label_is_named(store):
    path = store.folder / "labels" / "a.000000.b2nd"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match=r"a\.000000\.b2nd: the label of case 'a' is damaged"):
        store.read("a", revision=0)


def test_a_torn_pointer_is_named(store):
    (store.folder / "current").write_text("")
    with pytest.raises(StoreError, match="current: damaged"):
        _ = AnnotationStore.open(store.folder).revision


def test_a_revision_that_is_not_there_is_named(store):
    with pytest.raises(StoreError, match="revision 7 of the labels is missing"):
        store.read("a", revision=7)


def read_twice(store, connection):
    """Read revision 0, wait for revision 1 to be made elsewhere, read both."""
    before = contents(store, 0)
    connection.send("read")
    connection.recv()
    connection.send((before, contents(store, 0), contents(store, 1), store.revision))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_in_another_process_sees_the_next_revision(store, method):
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    reader = context.Process(target=read_twice, args=(store, there))
    reader.start()
    assert here.poll(60)
    here.recv()
    store.apply(edits(), step=1, stage=0, author="x")
    here.send("go on")
    assert here.poll(60)
    assert here.recv() == (GIVEN, GIVEN, REVISED, 1)
    reader.join(60)
    assert reader.exitcode == 0


def test_a_copy_reads_the_same_and_carries_no_handles(store):
    store.read("a", revision=0)
    store.foreground("b", 0)
    content = pickle.dumps(store)
    assert len(content) < 2000
    assert contents(pickle.loads(content), 0) == GIVEN


def test_handles_are_bounded(tmp_path):
    names = [f"c{i}" for i in range(OPEN_HANDLES + 8)]
    labels = [(name, np.full((4, 4), i, np.uint8)) for i, name in enumerate(names)]
    store = AnnotationStore.create(tmp_path, dict.fromkeys(names, (4, 4)), labels)
    for _ in range(2):
        assert [int(store.read(name, revision=0)[0, 0]) for name in names] == list(range(len(names)))
    assert len(store._open) == OPEN_HANDLES


def test_a_volume_is_read_by_boxes_over_chunk_borders(tmp_path):
    label = np.random.default_rng(0).integers(0, 4, (40, 70, 9)).astype(np.uint8)
    store = AnnotationStore.create(tmp_path, {"v": label.shape}, [("v", label)])
    for box in [np.s_[0:40, 31:33, 8:9], np.s_[30:34, 0:70, 0:1], np.s_[39:40, 69:70, 0:9], np.s_[5:5, 0:1, 0:1]]:
        assert np.array_equal(store.read("v", box, revision=0), label[box])


def test_foreground_is_spread_over_the_class_and_the_same_everywhere(tmp_path):
    label = np.zeros((100, 100), np.uint8)
    label[20:90], label[3, 4] = 1, 3
    label[0] = IGNORE
    store = AnnotationStore.create(tmp_path, {"a": label.shape}, [("a", label)])
    large, small = store.foreground("a", 0)
    assert small.tolist() == [[3, 4]]
    assert KEPT_VOXELS <= len(large) < 2 * KEPT_VOXELS
    assert {int(v) for v in np.unique(label[tuple(large.T)])} == {1}
    assert set(large[:, 0].tolist()) == set(range(20, 90))  # every row of the class is met
    other = AnnotationStore.open(tmp_path).foreground("a", 0)
    assert all(np.array_equal(x, y) for x, y in zip((large, small), other, strict=True))


def test_foreground_follows_the_revision(store):
    assert store.foreground("c", 0) == ()
    store.apply([Edit("c", np.full((1, 2), 2, np.uint8), "oracle", origin=(7, 3))], step=0, stage=0, author="x")
    assert [voxels.tolist() for voxels in store.foreground("c", 1)] == [[[7, 3], [7, 4]]]
    assert store.foreground("c", 0) == ()


def test_history_counts_every_pair_of_classes_and_keeps_who_said_it(store):
    label = np.array([[2, 2, 1]], np.uint8)
    first = Edit(
        "b", label, "oracle", origin=(0, 0), mask=np.array([[True, True, False]]), confidence=0.75, note="seen"
    )
    store.apply([first], step=5, stage=2, author="asker")
    store.apply([Edit("b", np.full(SHAPE, IGNORE, np.uint8), "person")], step=9, stage=2, author="eraser")
    one, two = store.history()
    assert one == {
        "revision": 1,
        "case": "b",
        "author": "oracle",
        "voxels": {"1->2": 2},
        "confidence": 0.75,
        "note": "seen",
        "stage": 2,
        "step": 5,
        "by": "asker",
    }
    assert two["voxels"] == {"1->255": 118, "2->255": 2}
    assert two["confidence"] is None

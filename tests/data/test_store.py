"""The prepared store and the annotation store."""

import hashlib
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.data.manifest import Case, Source
from labeleff.data.store import ImageStore
from labeleff.edits import Edit
from labeleff.errors import DataError, StoreError


class Memory:
    """A data set in memory that counts how often it is decoded."""

    def __init__(self, images):
        self.images, self.decoded = images, []

    def read_image(self, case):
        self.decoded.append(case.id)
        return self.images[case.id]

    def fingerprint(self, case):
        return f"memory|{case.id}|{self.images[case.id].tobytes().hex()[:64]}"


def cases(images, spacing=None):
    return [Case(name, name, (Source(Path(name)),), spacing=spacing) for name in images]


def images(dtype=np.float32):
    generator = np.random.default_rng(1)
    values = {name: generator.normal(50, 20, (1, 40, 37, 5)) for name in "abc"}
    return {k: np.clip(v, 0, 255).astype(dtype) for k, v in values.items()}


def prepare(data, cache, **options):
    return ImageStore.prepare(data, cases(data.images, options.pop("own", None)), axes=3, cache=cache, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_values_and_normalisation(tmp_path, dtype):
    data = Memory(images(dtype))
    plain, scored, ranged = (prepare(data, tmp_path, normalise=n) for n in ("none", "zscore", "minmax"))
    for name, image in data.images.items():
        exact = image.astype(np.float64)
        assert np.allclose(plain.read(name), exact, atol=0 if dtype == np.uint8 else 0.05)
        assert np.allclose(scored.read(name), (exact - exact.mean()) / exact.std(), atol=3e-3)
        assert np.allclose(ranged.read(name), (exact - exact.min()) / np.ptp(exact), atol=1e-3)
        assert plain.read(name).dtype == np.float32
        assert plain.shape(name) == plain.original_shape(name) == (40, 37, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_window_clips_before_all_else(tmp_path, dtype):
    data = Memory(images(dtype))
    window = (40.5, 60.0)
    stores = {n: prepare(data, tmp_path, normalise=n, window=window) for n in ("none", "zscore", "minmax")}
    for name, image in data.images.items():
        kept = image.astype(np.float64)
        kept[kept < 40.5], kept[kept > 60] = 40.5, 60
        assert (kept == 40.5).mean() > 0.2
        assert np.allclose(stores["none"].read(name), kept, atol=0.01)
        assert np.allclose(stores["zscore"].read(name), (kept - kept.mean()) / kept.std(), atol=2e-3)
        assert np.allclose(stores["minmax"].read(name), (kept - 40.5) / 19.5, atol=1e-3)
    assert len(data.decoded) == 3
    whole = prepare(data, tmp_path)
    assert len(data.decoded) == 6
    assert whole.content("a") == stores["zscore"].content("a")
    assert len({whole.key, stores["zscore"].key, prepare(data, tmp_path, window=(40.5, 61.0)).key}) == 3
    assert whole.kept("n", lambda: 1) == 1
    assert stores["zscore"].kept("n", lambda: 2) == 2
    assert whole.kept("n", lambda: 3) == 1


def test_a_window_comes_before_resampling(tmp_path):
    step = {"a": np.zeros((1, 8, 4, 4), np.float32)}
    step["a"][:, 4:] = 1000
    store = prepare(
        Memory(step), tmp_path, own=(1.0,) * 3, spacing=(0.5, 1.0, 1.0), normalise="none", window=(0.0, 100.0)
    )
    # new voxels lie a quarter and three quarters of the way between old ones: clipped afterwards, both would be 100
    assert np.allclose(store.read("a")[0, :, 0, 0], [0] * 7 + [25, 75] + [100] * 7, atol=0.1)


def test_a_window_that_leaves_nothing_is_refused(tmp_path):
    data = Memory(images())
    data.images["b"] = data.images["b"] - 1000
    store = prepare(data, tmp_path, window=(0.0, 200.0))
    assert store.constant() == ("b",)
    assert not store.read("b").any()
    with pytest.raises(
        DataError, match=r"^data\.window: \[300, 400\] leaves .*case 'a' has values from 0 to 12\d.*: give"
    ):
        prepare(data, tmp_path, window=(300.0, 400.0))


def test_a_box_is_part_of_the_whole_and_costs_its_chunks(tmp_path):
    store = prepare(Memory(images()), tmp_path)
    box = (slice(3, 17), slice(30, 37), slice(2, 3))
    assert np.array_equal(store.read("b", box), store.read("b")[(slice(None), *box)])


def test_decoded_once_and_found_again_by_content(tmp_path):
    first = Memory(images())
    one = prepare(first, tmp_path)
    again = Memory(images())
    two = prepare(again, tmp_path)
    assert first.decoded == ["a", "b", "c"]
    assert again.decoded == []
    assert one.key == two.key
    named = [1, one.content("a"), None, [float("nan")] * 3]  # the name that older versions gave
    assert (tmp_path / hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32] / "entry.json").is_file()
    changed = images()
    changed["b"] = changed["b"] + 1
    assert prepare(Memory(changed), tmp_path).content("b") != one.content("b")


def prepare_in_process(cache):
    prepare(Memory(images()), Path(cache))


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=prepare_in_process, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob(".*.tmp"))
    assert np.isfinite(prepare(Memory(images()), tmp_path).read("a")).all()


def test_resampling_looks_at_spacing(tmp_path):
    ramp = {"a": np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None, None], (1, 40, 37, 5))}
    store = prepare(Memory(ramp), tmp_path, own=(1.0, 1.0, 4.0), spacing=(2.0, 1.0, 2.0), normalise="none")
    assert store.shape("a") == (20, 37, 10)
    assert store.original_shape("a") == (40, 37, 5)
    assert store.spacing("a") == (2.0, 1.0, 2.0)
    assert np.allclose(np.diff(store.read("a")[0, 1:-1, 0, 0]), 2, atol=0.05)
    with pytest.raises(DataError, match=r"data\.spacing needs"):
        prepare(Memory(ramp), tmp_path, spacing=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("image", "message"),
    [(np.full((1, 4, 4, 4), np.nan, np.float32), "NaN"), (np.zeros((4, 4, 4), np.uint8), "a channel axis and 3")],
)
def test_unusable_images_are_named(tmp_path, image, message):
    with pytest.raises(DataError, match=rf"case 'a': .*{message}"):
        prepare(Memory({"a": image}), tmp_path)


def test_damage_is_named_with_the_remedy(tmp_path):
    store = prepare(Memory(images()), tmp_path)
    for path in tmp_path.rglob("image.b2nd"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"case 'a': the prepared image is damaged .*; delete .* and run again"):
        store.read("a")


def test_a_copy_in_another_process_reads_the_same(tmp_path):
    store = prepare(Memory(images()), tmp_path)
    before = store.read("c")
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read("c"), before)
    with pytest.raises(StoreError, match="was not prepared"):
        store.read("z")


# -- annotations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(tmp_path):
    label = np.zeros((40, 37), np.uint8)
    label[5:9, 5:9], label[20, 20] = 1, 2
    return AnnotationStore.create(tmp_path / "annotations", {"a": (40, 37), "b": (40, 37)}, [("a", label)]), label


def test_given_and_unlabelled(labels):
    store, label = labels
    assert store.revision == 0
    assert np.array_equal(store.read("a", revision=0), label)
    box = (slice(4, 8), slice(0, 37))
    assert np.array_equal(store.read("a", box, revision=0), label[box])
    assert set(np.unique(store.read("b", revision=0))) == {IGNORE}
    assert store.read("b", box, revision=0).shape == (4, 37)
    assert (store.known("a", 0), store.known("b", 0), store.edited("a", 0)) == (True, False, False)
    with pytest.raises(StoreError, match="out of reach"):
        store.read("hidden", revision=0)


def test_foreground_lists_every_class(labels):
    store, label = labels
    classes = store.foreground("a", 0)
    assert [len(c) for c in classes] == [16, 1]
    assert all(label[tuple(v)] == 1 for v in classes[0])
    assert classes[1].tolist() == [[20, 20]]
    assert store.foreground("b", 0) == ()


def test_revisions_are_immutable_and_readers_see_exactly_one(labels):
    store, label = labels
    reader = AnnotationStore.open(store.folder)
    reader.read("a", revision=0)
    patch = np.full((3, 3), 2, np.uint8)
    assert store.apply([Edit("a", patch, "corrected", origin=(0, 0))], step=4, stage=1, author="tester") == 1
    assert np.array_equal(reader.read("a", revision=0), label)  # what was given stays
    assert reader.read("a", revision=1)[:3, :3].tolist() == patch.tolist()
    assert np.array_equal(reader.read("a", revision=1)[3:], label[3:])
    assert (store.edited("a", 1), store.edited("b", 1)) == (True, False)
    assert np.array_equal(store.read_given("a"), label)
    change = store.history()[0]
    assert change["voxels"] == {"0->2": 9}
    assert (change["case"], change["step"], change["stage"], change["by"], change["author"]) == (
        "a",
        4,
        1,
        "tester",
        "corrected",
    )
    store.verify()


def test_masks_and_several_edits_of_one_case(labels):
    store, _ = labels
    mask = np.zeros((40, 37), bool)
    mask[0, 0] = True
    everything = np.ones((40, 37), np.uint8)
    store.apply(
        [Edit("b", everything, "pseudo", mask=mask), Edit("b", everything * 2, "pseudo", mask=~mask)],
        step=1,
        stage=0,
        author="x",
    )
    found = store.read("b", revision=1)
    assert found[0, 0] == 1
    assert (np.delete(found.ravel(), 0) == 2).all()


@pytest.mark.parametrize(
    "edit",
    [
        Edit("a", np.zeros((3, 3), np.uint8), "corrected", origin=(39, 0)),
        Edit("a", np.zeros((3, 3), np.uint8), "corrected", origin=(-1, 0)),
        Edit("a", np.zeros((40, 37), np.int64), "corrected"),
        Edit("a", np.zeros((40, 37, 1), np.uint8), "corrected"),
    ],
)
def test_edits_that_do_not_fit_change_nothing(labels, edit):
    store, label = labels
    with pytest.raises(DataError, match="does not fit"):
        store.apply([Edit("a", label, "corrected"), edit], step=1, stage=0, author="x")
    assert store.revision == 0


def test_discarding_and_making_a_revision_again(labels):
    store, label = labels
    edit = Edit("a", label * 0, "corrected")
    for _ in range(2):
        store.apply([edit], step=1, stage=0, author="x")
    first = [p.read_bytes() for p in sorted((store.folder / "revisions").iterdir())]
    store.discard_after(0)
    assert store.revision == 0
    for _ in range(2):
        store.apply([edit], step=1, stage=0, author="x")
    assert [p.read_bytes() for p in sorted((store.folder / "revisions").iterdir())] == first


def test_tampering_is_found(labels):
    store, label = labels
    store.apply([Edit("a", label * 0, "corrected")], step=1, stage=0, author="x")
    path = store.folder / "revisions" / "000000.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StoreError, match="revision 0 was changed"):
        store.verify()


def test_wrong_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="has shape"):
        AnnotationStore.create(tmp_path, {"a": (3, 3)}, [("a", np.zeros((2, 3), np.uint8))])
    with pytest.raises(DataError, match="no training case"):
        AnnotationStore.create(tmp_path, {"a": (3, 3)}, [("b", np.zeros((3, 3), np.uint8))])
    with pytest.raises(StoreError, match="no annotation store"):
        AnnotationStore.open(tmp_path / "none")

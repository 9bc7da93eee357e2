"""Several raters from the files to the batch: what is read, what is made of it, and who gets to see it."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from labeleff.batch import IGNORE
from labeleff.corruption import corrupt
from labeleff.data import raters
from labeleff.data.annotations import AnnotationStore
from labeleff.data.augment import Augment, apply
from labeleff.data.formats.nifti import Nifti
from labeleff.data.manifest import Case, Manifest, Source, read_manifest, write_manifest
from labeleff.data.module import StepData, make_loader
from labeleff.data.sampling import StreamPlan
from labeleff.data.split import make_split
from labeleff.describing import describe
from labeleff.edits import Edit
from labeleff.errors import DataError, RecipeError, SplitError, StoreError
from labeleff.prepare import prepare
from labeleff.recipe import Component
from labeleff.recipe_io import load_recipe
from labeleff.registry import build
from labeleff.runner import run

from ..conftest import tiny
from .test_store import Memory
from .test_store import prepare as prepare_images

NAMES = [f"n{i}" for i in range(5)]  # n4 is for testing
PEOPLE = ["labels_anna", "labels_ben", "labels_eva"]
SHAPE = (10, 12, 4)


def save(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")


def volumes():
    """Return image, and label by rater, of every case."""
    generator = np.random.default_rng(0)
    found = {}
    for name in NAMES:
        image = generator.normal(size=SHAPE).astype(np.float32)
        own = [(image + 0.3 * generator.normal(size=SHAPE) > limit).astype(np.uint8) for limit in (0.3, 0.5, 0.7)]
        found[name] = image, np.stack(own)
    return found


@pytest.fixture
def folder(tmp_path):
    for name, (image, votes) in volumes().items():
        save(tmp_path / "set" / "images", name, image)
        for person, label in zip(PEOPLE, votes, strict=True):
            save(tmp_path / "set" / person, name, label)
    (tmp_path / "set" / "test.list").write_text("n4\n")
    return tmp_path / "set"


def recipe(folder, **changes):
    dataset = {"name": "nifti", "path": str(folder), "classes": ["background", "organ"], "raters": PEOPLE}
    return load_recipe(
        {
            "name": "raters",
            "data": {"dataset": dataset, "labelled": 2, "patch": [8, 8], "dimensions": 2} | changes,
            "backbone": {"name": "unet", "channels": [4, 8], "dropout": 0.0},
            "stages": [{"strategy": "supervised", "steps": 4, "batch": 4}],
        }
    )


def prepared(folder, tmp_path, **changes):
    return prepare(recipe(folder, **changes), tmp_path / "run", cache=tmp_path / "cache")


# -- files --------------------------------------------------------------------------------------------------------------


def test_a_manifest_keeps_its_raters_and_old_ones_have_none(tmp_path):
    votes = (Source(tmp_path / "one.npz", "label"), Source(tmp_path / "two.npz"))
    cases = (Case("a", "p", (Source(tmp_path / "a.npz"),), raters=votes), Case("b", "q", (Source(tmp_path / "b.npz"),)))
    one = Manifest("set", cases, ("background", "organ"), 2)
    write_manifest(one, tmp_path / "set.json")
    assert read_manifest(tmp_path / "set.json") == one
    content = json.loads((tmp_path / "set.json").read_text())
    assert ["raters" in row for row in content["cases"]] == [True, False]


def test_a_case_with_raters_counts_as_labelled():
    source = (Source(Path("x")),)
    cases = [Case(f"c{i}", f"c{i}", source, None, raters=source * 2 if i < 2 else ()) for i in range(3)]
    manifest = Manifest("set", (*cases, replace(cases[0], id="t", patient="t", role="test")), ("a", "b"), 2)
    split = make_split(manifest, labelled="all")
    assert (set(split.labelled), split.unlabelled, split.test) == ({"c0", "c1"}, ("c2",), ("t",))
    bare = replace(manifest, cases=(*cases, replace(cases[2], id="t", patient="t", role="test")))
    with pytest.raises(SplitError, match="'t' has no label"):
        make_split(bare, labelled="all")


def test_a_manifest_file_with_raters_is_a_data_set(folder, tmp_path):
    nifti = Nifti(path=str(folder), raters=tuple(PEOPLE)).manifest()
    write_manifest(nifti, tmp_path / "set.json")
    data = build("dataset", "manifest", path=str(tmp_path / "set.json"))
    assert np.array_equal(data.read_votes(data.manifest().case("n3")), volumes()["n3"][1])
    first = replace(nifti.cases[0], raters=(Source(Path("x.doc")),))
    write_manifest(replace(nifti, cases=(first, *nifti.cases[1:])), tmp_path / "set.json")
    with pytest.raises(DataError, match=r"case 'n0': x.doc is none of"):
        data.manifest()


def test_folders_of_raters(folder):
    (folder / "labels_ben" / "n1.nii.gz").unlink()
    save(folder / "labels", "n2", np.ones(SHAPE, np.uint8))
    data = Nifti(path=str(folder), raters=tuple(PEOPLE))
    manifest, truth = data.manifest(), volumes()
    assert np.array_equal(data.read_votes(manifest.case("n0")), truth["n0"][1])
    assert np.array_equal(data.read_votes(manifest.case("n1")), truth["n1"][1][[0, 2]])
    assert np.array_equal(data.read_votes(manifest.case("n2")), truth["n2"][1])  # a consensus is not one more vote
    plain = Nifti(path=str(folder))
    assert [case.id for case in plain.manifest().cases if case.has_label] == ["n2"]
    assert data.read_votes(plain.manifest().case("n2")).shape == (1, *SHAPE)


def test_folders_of_raters_that_are_wrong(folder):
    with pytest.raises(ValueError, match="own folder once"):
        Nifti(path=".", raters=("labels_anna", "labels_anna"))
    with pytest.raises(ValueError, match="images and labels not among them"):
        Nifti(path=".", raters=("labels",))
    with pytest.raises(DataError, match=r"labels_anne: no .nii or .nii.gz files"):
        Nifti(path=str(folder), raters=("labels_anne",)).manifest()
    save(folder / "labels_eva", "n9", np.ones(SHAPE, np.uint8))
    with pytest.raises(DataError, match=r"n9.nii.gz: a label without an image"):
        Nifti(path=str(folder), raters=tuple(PEOPLE)).manifest()
    (folder / "labels_eva" / "n9.nii.gz").unlink()
    save(folder / "labels_eva", "n0", np.full(SHAPE, 2, np.uint8))
    data = Nifti(path=str(folder), raters=tuple(PEOPLE))
    with pytest.raises(DataError, match=r"labels_eva/n0.nii.gz: label value 2 is no class"):
        data.read_votes(data.manifest().case("n0"))


# -- fusion -------------------------------------------------------------------------------------------------------------


def two_of_three(votes):
    return (votes.sum(0) >= 2).astype(np.uint8)


def test_the_first_revision_is_the_majority(folder, tmp_path):
    data, truth = prepared(folder, tmp_path), volumes()
    for case in data.split.labelled:
        assert np.array_equal(data.annotations.read_given(case), two_of_three(truth[case][1]))
        assert not data.annotations.has_votes(case)


def test_a_consensus_is_measured_against_but_not_learnt_from(folder, tmp_path):
    for name in NAMES:
        save(folder / "labels", name, np.ones(SHAPE, np.uint8))
    data, truth = prepared(folder, tmp_path), volumes()
    for case in data.split.labelled:
        assert np.array_equal(data.annotations.read_given(case), two_of_three(truth[case][1]))
    assert (data.reference(data.manifest.case("n4")) == 1).all()
    assert not [note for note in describe(data)["notes"] if "no consensus" in note]


def test_one_rater_is_drawn_per_case_by_the_draw(folder, tmp_path):
    truth, chosen = volumes(), {}
    for draw in range(6):
        for seed in (0, 1):
            whole = replace(recipe(folder, raters="random", labelled="all", draw=draw), seed=seed)
            data = prepare(whole, tmp_path / f"run{draw}{seed}", cache=tmp_path / "cache")
            for case in data.split.labelled:
                label = data.annotations.read_given(case)
                (rater,) = [i for i, own in enumerate(truth[case][1]) if np.array_equal(own, label)]
                assert chosen.setdefault((draw, case), rater) == rater  # the seed of training plays no part
    assert set(chosen.values()) == {0, 1, 2}
    assert len({tuple(chosen[draw, case] for case in NAMES[:4]) for draw in range(6)}) > 2


@pytest.mark.parametrize("how", ["majority", "random", "soft", "staple"])
def test_evaluation_is_never_against_a_rater_drawn_by_chance(folder, tmp_path, how):
    data, votes = prepared(folder, tmp_path, raters=how), volumes()["n4"][1]
    found = data.reference(data.manifest.case("n4"))
    if how != "staple":
        assert np.array_equal(found, two_of_three(votes))
    else:
        assert np.array_equal(found, raters.fuse(votes, "staple", case="n4", draw=0))
    (note,) = [note for note in describe(data)["notes"] if "no consensus" in note]
    assert ("STAPLE" if how == "staple" else "the majority") in note


def test_raters_of_slices_outside_the_budget_play_no_part(folder, tmp_path):
    found = {}
    for when in ("before", "after"):
        data = prepare(recipe(folder, raters="staple", slices=2), tmp_path / when, cache=tmp_path / "cache")
        found[when] = [data.annotations.read_given(case) for case in data.split.labelled], data.raters
        known = [np.flatnonzero((label != IGNORE).any((0, 1))).tolist() for label in found[when][0]]
        assert known == [[1, 3]] * 2  # of four
        for case in NAMES:
            for person in PEOPLE:
                path = folder / person / f"{case}.nii.gz"
                label = np.asarray(nib.load(path).dataobj).copy()
                label[..., [0, 2]] = 1 - label[..., [0, 2]]
                save(folder / person, case, label)
    assert all(np.array_equal(a, b) for a, b in zip(found["before"][0], found["after"][0], strict=True))
    assert found["before"][1] == found["after"][1]


def test_asking_for_what_cannot_be(folder, tmp_path, monkeypatch):
    alone = {"name": "phantom", "patients": 4, "test": 1, "size": [32, 32]}
    with pytest.raises(RecipeError, match=r"data.raters is soft, but no case of phantom has several raters"):
        prepare(recipe(folder, dataset=alone, raters="soft"), tmp_path / "run", cache=tmp_path / "cache")
    with pytest.raises(
        RecipeError, match=r"data.noise: cases of set have labels by several raters, who err by themselves"
    ):
        prepare(recipe(folder, noise="swap"), tmp_path / "run", cache=tmp_path / "cache")
    write_manifest(Nifti(path=str(folder), raters=tuple(PEOPLE)).manifest(), tmp_path / "set.json")
    with pytest.raises(RecipeError, match="who err by themselves"):
        corrupt(str(tmp_path / "set.json"), Component("swap"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'labeleff\[staple\]'"):
        raters.check_fusion(Nifti(path=str(folder), raters=tuple(PEOPLE)).manifest(), "staple")


def test_no_file_of_a_rater_outside_the_budget_is_opened(folder, tmp_path):
    split = prepared(folder, tmp_path, raters="soft").split
    for name in set(NAMES) - set(split.labelled):
        for person in PEOPLE:
            (folder / person / f"{name}.nii.gz").write_bytes(b"torn")
    again = prepare(recipe(folder, raters="soft"), tmp_path / "again", cache=tmp_path / "cache")
    for name in (*split.unlabelled, *split.test):
        with pytest.raises(StoreError, match="out of reach"):
            again.votes(name)
    files = {path.name.split(".")[0] for path in (again.annotations.folder / "labels").iterdir()}
    assert files == set(split.labelled)


# -- the record ---------------------------------------------------------------------------------------------------------


def test_the_record_by_hand():
    one = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], np.uint8)  # Dice 0.8, 0, 0
    two = np.array([[2, 0, 0, 0], [2, 0, 0, 0]], np.uint8)
    alone = np.ones((1, 4), np.uint8)
    found = raters.record([("a", one), ("b", two), ("c", alone)], ("background", "x", "y", "z"), "soft")
    assert found["fusion"] == "soft"
    assert found["dice"] == {
        "x": {"mean": round(0.8 / 3, 6), "lowest": 0.0, "pairs": 3},
        "y": {"mean": 1.0, "lowest": 1.0, "pairs": 1},
        "z": {"mean": None, "lowest": None, "pairs": 0},
    }
    two_to_one = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(4)  # in three voxels of three
    assert found["cases"] == [
        {"case": "a", "raters": 3, "disputed": pytest.approx(two_to_one, abs=1e-6), "dice": found["cases"][0]["dice"]},
        {"case": "b", "raters": 2, "disputed": 0.0, "dice": {"x": None, "y": 1.0, "z": None}},
    ]
    assert raters.in_words(found).endswith("mean Dice between two: x 0.267, y 1.000")


def test_the_record_is_of_the_labelled_cases_and_is_written_once(folder, tmp_path):
    data, truth = prepared(folder, tmp_path), volumes()
    path = tmp_path / "run" / "raters.json"
    written = json.loads(path.read_text())
    assert data.raters == written
    assert [row["case"] for row in written["cases"]] == list(data.split.labelled)
    values = [
        2 * (votes[i] & votes[j]).sum() / (votes[i].sum() + votes[j].sum())
        for votes in (truth[case][1] for case in data.split.labelled)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert written["dice"]["organ"]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert written["dice"]["organ"]["lowest"] == pytest.approx(min(values), abs=1e-5)
    assert [note for note in describe(data)["notes"] if note.startswith("2 labelled cases have several raters")]
    when = path.stat().st_mtime_ns
    assert prepared(folder, tmp_path).raters == written
    assert path.stat().st_mtime_ns == when


def test_a_strategy_that_gets_the_majority_is_named(folder, tmp_path):
    def notes(*strategies):
        whole = recipe(folder, raters="soft")
        stages = tuple(replace(whole.stages[0], strategy=s) for s in strategies)
        found = describe(replace(prepared(folder, tmp_path, raters="soft"), recipe=replace(whole, stages=stages)))
        return [note for note in found["notes"] if "soft" in note and "stages" in note]

    plain = recipe(folder).stages[0].strategy
    robust = replace(plain, options={**plain.options, "loss": "noise_robust_dice"})
    assert notes(plain) == []
    (note,) = notes(plain, robust)
    assert note == "stages.1: supervised as set does not learn from soft labels, but from the majority"


# -- batches ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path):
    """Three volumes: ``a`` has three raters of three classes, ``b`` one label, ``c`` none."""
    generator = np.random.default_rng(4)
    images = {n: generator.integers(1, 255, (1, 12, 14, 4)).astype(np.uint8) for n in "abc"}
    store = prepare_images(Memory(images), tmp_path / "cache", normalise="none")
    votes = generator.choice([0, 1, 2, IGNORE], (3, 12, 14, 4)).astype(np.uint8)
    labels = [(n, generator.integers(0, 3, (12, 14, 4)).astype(np.uint8)) for n in "ab"]
    shapes = dict.fromkeys("abc", (12, 14, 4))
    return store, AnnotationStore.create(tmp_path / "ann", shapes, labels, [("a", votes)])


def data(stores, **options):
    plans = {"labelled": StreamPlan(("a", "b"), 6), "unlabelled": StreamPlan(("c",), 2)}
    chosen = {"first_step": 0, "last_step": 6, "patch": (16, 8), "slice_axis": 2, "augment": Augment(), "seed": 1}
    return StepData(*stores, plans, **(chosen | {"stage": 0, "num_classes": 3} | options))


def shares_of(maps, value):
    spoke = (maps != IGNORE).sum(0)
    return np.where(spoke, (maps == value).sum(0) / np.maximum(spoke, 1), 0)


def test_a_batch_holds_the_shares_of_the_raters(stores):
    store, annotations = stores
    batch = data(stores)[2]
    assert batch["unlabelled"].soft is None
    share = batch["labelled"]
    assert share.soft.shape == (6, 3, 16, 8)
    assert share.soft.dtype == torch.float32
    seen = set()
    for row in range(6):
        name = store.ids[int(share.geometry.case[row])]
        x, y, z = share.geometry.origin[row].tolist()
        assert x == -2
        maps = annotations.read_votes(name, revision=0) if name == "a" else annotations.read_given(name)[None]
        seen.add(name)
        for value in range(3):
            expected = shares_of(maps[:, :, y : y + 8, z], value)
            assert share.soft[row, value, 2:14].numpy() == pytest.approx(expected)
        assert (share.soft[row, :, :2] == 0).all()
    assert seen == {"a", "b"}


def test_what_is_drawn_and_the_number_of_workers_change_nothing(stores):
    with_raters, without = data(stores), data(stores, num_classes=None)
    for step in range(3):
        one, two = with_raters[step]["labelled"], without[step]["labelled"]
        assert two.soft is None
        assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    for one, two in zip(make_loader(with_raters, workers=1), with_raters, strict=False):
        assert torch.equal(one["labelled"].soft, two["labelled"].soft)
        assert one["unlabelled"].soft is None


def test_an_edited_case_has_only_its_label(stores):
    store, annotations = stores
    annotations.apply([Edit("a", np.full((12, 14, 4), 2, np.uint8), "corrected")], step=1, stage=0, author="x")
    assert annotations.read_votes("a", revision=1) is None
    assert annotations.read_votes("a", revision=0).shape == (3, 12, 14, 4)
    before, after = data(stores)[2]["labelled"], data(stores, revision=1)[2]["labelled"]
    changed = after.geometry.case == store.index("a")
    assert torch.equal(before.soft[~changed], after.soft[~changed])
    assert changed.any()
    assert (after.soft[changed][:, 2, 2:14] == 1).all()
    annotations.discard_after(0)
    assert torch.equal(data(stores)[2]["labelled"].soft, before.soft)


@pytest.mark.parametrize("augment", [Augment(rotate=40.0, scale=0.3, shift=0.2), Augment(flip=(0, 1), probability=0.0)])
def test_augmentation_moves_the_raters_with_the_label(stores, augment):
    share = data(stores, augment=augment)[1]["labelled"]
    moved = apply(share)
    store, annotations = stores
    for row in range(6):
        if store.ids[int(share.geometry.case[row])] != "a":
            continue
        _, y, z = share.geometry.origin[row].tolist()
        grid = F.affine_grid(share.geometry.affine[row : row + 1], [1, 1, 16, 8], align_corners=False)
        maps = []
        for own in annotations.read_votes("a", revision=0)[:, :, y : y + 8, z]:  # each rater's label by itself
            padded = np.full((16, 8), IGNORE, np.float32)
            padded[2:14] = own
            label = torch.from_numpy(padded - IGNORE)[None, None]
            maps.append(F.grid_sample(label, grid, mode="nearest", align_corners=False)[0, 0].numpy() + IGNORE)
        for value in range(3):
            assert moved.soft[row, value].numpy() == pytest.approx(shares_of(np.stack(maps), value))
    assert not torch.equal(moved.soft, share.soft)
    known = moved.soft.sum(1) > 0
    assert not known[~moved.valid[:, 0]].any()


def test_the_store_watches_over_what_raters_said(stores):
    annotations = stores[1]
    annotations.verify()
    path = annotations.folder / "labels" / "a.raters.b2nd"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="'a' was changed after it was written"):
        annotations.verify()
    with pytest.raises(DataError, match="the label has shape"):
        AnnotationStore.create(annotations.folder / "x", {"a": (2, 3)}, [], [("a", np.zeros((2, 3, 3), np.uint8))])


# -- whole runs ---------------------------------------------------------------------------------------------------------


def phantom_run(folder, cache, how):
    """Run two steps on generated patients with three raters."""
    plain = tiny(stages=[{"strategy": "supervised", "steps": 2, "batch": 4}], evaluation={"pictures": True})
    dataset = plain["data"]["dataset"] | {"raters": 3}
    recipe = load_recipe(plain | {"data": plain["data"] | {"dataset": dataset, "raters": how}})
    return run(recipe, folder, cache=cache)


def test_a_run_leaves_a_record_and_pictures_of_disputes(tmp_path, cache):
    summary = phantom_run(tmp_path, cache, "soft")
    record = json.loads((tmp_path / "raters.json").read_text())
    ranked = sorted(record["cases"], key=lambda row: -row["disputed"])
    drawn = {path.stem for path in (tmp_path / "pictures" / "raters").glob("*.png")}
    assert drawn == {row["case"] for row in ranked[:3]}
    assert len(record["cases"]) == 4  # two patients of two slices
    assert [note for note in summary["notes"] if "several raters (soft); mean Dice between two: large 0." in note]


def test_soft_labels_are_what_a_run_learns_from(tmp_path, cache):
    for how in ("soft", "majority"):
        phantom_run(tmp_path / how, cache, how)
    one, two = (load_file(tmp_path / how / "predictor.safetensors") for how in ("soft", "majority"))
    assert any(not torch.equal(one[key], two[key]) for key in one)

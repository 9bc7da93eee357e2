"""The training side reads what it was given and nothing else; how batches are made is in test_sampling."""

import inspect
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.data.augment import Augment
from labeleff.data.module import StepData, make_loader
from labeleff.data.sampling import StreamPlan
from labeleff.data.store import ImageStore
from labeleff.edits import Edit
from labeleff.errors import DataError, StoreError
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.registry import build

from .test_store import Memory
from .test_store import prepare as prepare_images

NAMES = [f"n{i}" for i in range(6)]
SHAPE = (10, 12, 4)


def recipe(folder):
    return load_recipe(
        {
            "name": "hidden",
            "data": {
                "dataset": {"name": "nifti", "path": str(folder), "classes": ["background", "organ"]},
                "labelled": 2,
                "patch": [8, 8],
                "dimensions": 2,
                "foreground": 0.5,
            },
            "backbone": {"name": "unet", "channels": [4, 8], "dropout": 0.0},
            "stages": [{"strategy": "mean_teacher", "steps": 4, "batch": 4}],
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Six volumes with labels in files of their own; two will be labelled, two are for testing."""
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / "set" / part).mkdir(parents=True)
    for name in NAMES:
        image = generator.normal(size=SHAPE).astype(np.float32)
        label = (image > 0.5).astype(np.uint8)
        for part, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "set" / part / f"{name}.nii.gz")
    (tmp_path / "set" / "test.list").write_text("n4\nn5\n")
    return tmp_path / "set"


def batches(prepared, recipe):
    stage = recipe.stages[0]
    strategy = build("strategy", stage.strategy.name, **stage.strategy.options)
    return list(prepared.loader(stage, 0, strategy, first=0, last=4, revision=0))


def tensors(found):
    return [t for batch in found for share in batch.values() for t in (*share[:4], *share.geometry)]


def test_hidden_label_files_are_never_opened(folder, tmp_path):
    plain = recipe(folder)
    whole = prepare(plain, tmp_path / "one", cache=tmp_path / "cache")
    hidden = [i for i in NAMES if i not in whole.split.labelled]
    assert len(hidden) == 4
    expected = batches(whole, plain)
    for name in hidden:
        (folder / "labels" / f"{name}.nii.gz").write_bytes(b"torn")
    again = prepare(plain, tmp_path / "two", cache=tmp_path / "cache")
    found = batches(again, plain)
    assert {name for batch in found for name in batch} == {"labelled", "unlabelled"}
    assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(found), strict=True))
    for batch in found:
        assert set(batch["labelled"].label.unique().tolist()) <= {0, 1}
        assert set(batch["unlabelled"].label.unique().tolist()) == {IGNORE}
    # the same damage to a label of the budget is noticed at once: the test above could have failed
    shutil.rmtree(tmp_path / "two" / "annotations")
    (folder / "labels" / f"{whole.split.labelled[0]}.nii.gz").write_bytes(b"torn")
    with pytest.raises(DataError, match=f"case '{whole.split.labelled[0]}'"):
        prepare(plain, tmp_path / "two", cache=tmp_path / "cache")


def test_what_the_training_side_holds_knows_no_label_outside_the_budget(folder, tmp_path):
    prepared = prepare(recipe(folder), tmp_path / "run", cache=tmp_path / "cache")
    annotations, split = prepared.annotations, prepared.split
    files = {path.name.split(".")[0] for path in (annotations.folder / "labels").iterdir()}
    assert files == set(split.labelled)
    for case in split.unlabelled:
        assert not annotations.known(case, 0)
        assert (annotations.read_given(case) == IGNORE).all()
    for case in split.test:
        for ask in (annotations.read_given, annotations.shape, lambda c: annotations.known(c, 0)):
            with pytest.raises(StoreError, match="out of reach"):
                ask(case)
    public = [name for name, _ in inspect.getmembers(ImageStore) if not name.startswith("_")]
    assert not [name for name in public if "label" in name]


@pytest.fixture
def stores(tmp_path):
    """Two volumes smaller than the patch along one axis, one of them labelled."""
    generator = np.random.default_rng(3)
    images = {n: generator.integers(1, 255, (1, 6, 9, 8)).astype(np.uint8) for n in "ab"}
    store = prepare_images(Memory(images), tmp_path / "cache", normalise="none", own=(3.0, 1.0, 2.0))
    label = (images["a"][0] > 128).astype(np.uint8)
    return store, AnnotationStore.create(tmp_path / "ann", dict.fromkeys("ab", (6, 9, 8)), [("a", label)])


def data(stores, **options):
    plans = options.pop("plans", {"all": StreamPlan(("a", "b"), 2)})
    chosen = {"first_step": 0, "last_step": 8, "patch": (8, 4, 8), "augment": Augment(), "seed": 5, "stage": 1}
    return StepData(*stores, plans, **(chosen | options))


def test_volumes_are_padded_after_normalisation_with_what_nobody_knows(stores):
    share = data(stores)[0]["all"]
    assert share.image.shape == (2, 1, 8, 4, 8)
    for row in range(2):
        name = stores[0].ids[int(share.geometry.case[row])]
        x, y, z = share.geometry.origin[row].tolist()
        assert (x, z) == (-1, 0)
        assert torch.equal(share.image[row, 0, 1:7], torch.from_numpy(stores[0].read(name)[0, :, y : y + 4]))
        edge = torch.tensor([0, 7])
        assert (share.image[row, 0, edge] == 0).all()
        assert (share.label[row, edge] == IGNORE).all()
        assert share.valid[row, 0].sum(dim=(1, 2)).tolist() == [0, *[32] * 6, 0]
    assert share.geometry.shape.tolist() == [[6, 9, 8]] * 2
    assert share.geometry.size.tolist() == [[8, 4, 8]] * 2
    assert share.geometry.spacing.tolist() == [[3.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_along_any_axis(stores, axis):
    plans = {"all": StreamPlan(("a",), 2)}
    share = data(stores, plans=plans, patch=(5, 5), slice_axis=axis)[0]["all"]
    volume, label = stores[0].read("a")[0], stores[1].read_given("a")
    for row in range(2):
        origin = share.geometry.origin[row].tolist()
        number = origin.pop(axis)
        window = tuple(slice(o, o + 5) for o in origin)
        assert share.geometry.size[row].tolist() == [1 if a == axis else 5 for a in range(3)]
        assert np.array_equal(share.image[row, 0], volume.take(number, axis)[window])
        assert np.array_equal(share.label[row], label.take(number, axis)[window])


def test_pseudo_labels_of_a_later_revision_reach_the_unlabelled(stores):
    stores[1].apply([Edit("b", np.full((6, 9, 8), 1, np.uint8), "pseudo")], step=1, stage=0, author="x")
    old, new = (data(stores, revision=r)[0]["all"] for r in (0, 1))
    (row,) = [i for i in range(2) if int(new.geometry.case[i]) == 1]
    assert (old.label[row] == IGNORE).all()
    assert (new.label[row, 1:7] == 1).all()
    assert (new.given[row] == IGNORE).all()
    assert torch.equal(new.label[1 - row], old.label[1 - row])
    assert old.given is old.label
    assert torch.equal(new.image, old.image)


def test_streams_stages_steps_and_samples_draw_on_their_own(stores):
    spec = Augment(rotate=30.0, noise=0.2)
    plans = {"one": StreamPlan(("a", "b"), 4), "two": StreamPlan(("a", "b"), 4)}
    base = data(stores, plans=plans, augment=spec)
    draws = [base[0]["one"], base[0]["two"], base[1]["one"]]
    draws += [data(stores, plans=plans, augment=spec, **{key: 9})[0]["one"] for key in ("seed", "stage")]
    keys = torch.cat([share.geometry.sample for share in draws])
    turns = torch.cat([share.geometry.affine.flatten(1) for share in draws])
    assert len(keys.unique()) == len(keys) == 20
    assert len(turns.unique(dim=0)) == 20
    same = data(stores, plans={"one": plans["one"]}, augment=spec)[0]["one"]  # without the other stream
    assert all(torch.equal(a, b) for a, b in zip(tensors([{"x": same}]), tensors([{"x": draws[0]}]), strict=True))


def test_length_end_and_resume_under_accumulation(stores):
    plans = {"all": StreamPlan(("a", "b"), 4)}
    whole = data(stores, plans=plans, accumulate=2)
    assert len(whole) == 16
    with pytest.raises(IndexError):
        whole[16]
    resumed = list(make_loader(data(stores, plans=plans, accumulate=2, first_step=6)))
    assert len(resumed) == 4
    for here, there in zip(resumed, range(12, 16), strict=True):
        assert torch.equal(here["all"].image, whole[there]["all"].image)
    assert torch.equal(
        torch.cat([whole[12]["all"].image, whole[13]["all"].image]), data(stores, plans=plans)[6]["all"].image
    )

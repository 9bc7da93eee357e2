"""Runs that have asked a round, on volumes whose geometry is awkward, without any training."""

import nibabel as nib
import numpy as np
import pytest

from labeleff import registry
from labeleff.data.rounds import Asked, Region, Rounds
from labeleff.data.split import make_split
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.rundir import RunDirectory

SHAPE = (12, 10, 6)


def rotated(degrees):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


AFFINES = {
    "plain": np.diag([1.0, 1.0, 3.0, 1.0]),
    "oblique": rotated(20) @ np.diag([0.8, 0.8, 2.5, 1.0])
    + np.array([[0, 0, 0, -31], [0, 0, 0, 7.5], [0, 0, 0, 100], [0] * 4]),
    "lefthanded": np.diag([-0.9, 1.1, 4.0, 1.0]),
    "permuted": np.array([[0, 0, 2.0, -5], [1.5, 0, 0, 3], [0, -1.0, 0, 40], [0, 0, 0, 1]]),
}


def write_data(folder):
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for name, affine in (AFFINES | {"given": np.eye(4), "test": np.eye(4)}).items():
        image = generator.normal(size=SHAPE).astype(np.float32)
        label = ((image > 0.3).astype(np.uint8) + (image > 1.2)).astype(np.uint8)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"{name}.nii.gz")
    (folder / "test.list").write_text("test\n")


def make_run(folder, dataset, *, patch, dimensions=None, regions=None, spacing=None):
    """Return a run that waits for the labels of a round, and what it works on."""
    manifest = registry.build("dataset", **dataset).manifest()
    # a draw in which the case that no test looks at is the labelled one
    draw = next(d for d in range(99) if make_split(manifest, labelled=1, draw=d).labelled[0] in ("given", "p0000_s0"))
    recipe = load_recipe(
        {
            "name": "asking",
            "data": {
                "dataset": dataset,
                "labelled": 1,
                "draw": draw,
                "patch": patch,
                "dimensions": dimensions,
                "spacing": spacing,
            },
            "backbone": {"name": "unet", "channels": [4, 8], "dropout": 0.0},
            "stages": [
                {"strategy": "ripu", "steps": 4, "annotator": "random", "answers": "person", "revise_at_start": True}
            ],
        }
    )
    RunDirectory(folder).folder.mkdir(parents=True)
    RunDirectory(folder).claim(recipe)
    data = prepare(recipe, folder, cache=folder.parent / "cache")
    asked = regions(data) if regions else volumes(data)
    generator = np.random.default_rng(1)
    cases = dict.fromkeys(region.case for region in asked)
    predictions = [
        (c, generator.integers(0, len(data.task.classes), data.store.shape(c)).astype(np.uint8)) for c in cases
    ]
    options = recipe.stages[0].annotator
    Rounds(folder).ask(
        Asked(1, 0, 0, 0, {"name": options.name, **options.options}, "ab" * 32, asked, {"asked": 1.0}), predictions
    )
    return data


def volumes(data):
    """Return two regions of every unlabelled case."""
    rows = []
    for case in data.split.unlabelled:
        last = [n - 3 for n in data.store.shape(case)]
        rows.append(Region(len(rows) + 1, case, (0, 1, 2), (4, 3, 2), 0.5))
        rows.append(Region(len(rows) + 1, case, tuple(last), (3, 3, 3), 0.25))
    return tuple(rows)


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A run on volumes with four awkward geometries; returns its folder and data."""
    monkeypatch.setattr("labeleff.prepare.DEFAULT_CACHE", tmp_path / "cache")
    write_data(tmp_path / "set")
    dataset = {"name": "nifti", "path": str(tmp_path / "set"), "classes": ["background", "organ", "core"]}
    data = make_run(tmp_path / "run", dataset, patch=[8, 8, 4])
    return tmp_path / "run", data


def truth_of(data, regions):
    return {region.number: data.hidden_label(region.case)[region.box] for region in regions}

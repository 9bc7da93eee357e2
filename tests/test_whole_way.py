"""Every format goes the whole way: a folder in its layout, indexed, audited, learnt from, and predicted in its geometry."""

import json
from functools import partial

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.recipe_io import load_recipe
from labeleff.runner import run

from .conftest import tiny
from .data import layouts
from .data.layouts import AFFINES, save

FORMATS = {  # how a folder is made, which way its volumes lie, options of index, classes, one image of it
    "nifti": (layouts.nifti, "oblique", ["--test", "1"], 3, "images/a.nii.gz"),
    "nnunet": (
        partial(layouts.nnunet, channels=1),
        "oblique, left-handed",
        ["--test", "1"],
        2,
        "imagesTr/la_001_0000.nii.gz",
    ),
    "decathlon": (layouts.decathlon, "permuted", ["--test", "1"], 3, "imagesTr/b_1.nii.gz"),
    "acdc": (layouts.acdc, "anisotropic", [], 4, "training/patient099/patient099_frame01.nii.gz"),
    "segthor": (layouts.segthor, "flipped", [], 5, "test/Patient_41.nii.gz"),
    "btcv": (layouts.btcv, "left-handed", [], 14, "RawData/Testing/img/img0061.nii.gz"),
    "nih_pancreas": (layouts.nih_pancreas, "oblique", [], 2, "data/PANCREAS_0064.nii.gz"),
    "prostate": (layouts.prostate, "oblique, left-handed", ["--test", "1"], 2, "RUNMC/Case02.nii.gz"),
    "mmwhs": (layouts.mmwhs, "permuted", ["--test", "1"], 5, "ct_train/ct_train_1002_image.nii.gz"),
    "ivdm3seg": (layouts.ivdm3seg, "flipped", ["--test", "1"], 2, "02/02_wat.nii"),
    "acdc_h5": (layouts.acdc_h5, None, [], 4, "data/patient011_frame01.h5"),
    "left_atrium_h5": (layouts.left_atrium_h5, None, [], 2, "C3/mri_norm2.h5"),
    "compact": (layouts.compact, None, [], 2, "C3.npz"),
    "pictures": (layouts.pictures, None, ["--test", "1"], 3, "images/a.png"),
    "cityscapes": (layouts.streets, None, None, 20, "leftImg8bit/val/b/b_000000_000019_leftImg8bit.png"),
}


def labeleff(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (words, done.output, done.exception)
    return " ".join(done.output.split())


def as_volume(path, folder):
    """Return a file that ``predict`` reads: an array in HDF5 or numpy's format has none of its own, so it is written as one."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return save(folder / "array.nii.gz", file["image"][()], AFFINES["oblique"])
    if path.suffix == ".npz":
        return save(folder / "array.nii.gz", np.load(path)["image"], AFFINES["oblique"])
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_goes_the_whole_way(tmp_path, cache, name):
    make, turned, options, classes, image = FORMATS[name]
    folder = make(tmp_path / "in", **({"matrix": AFFINES[turned]} if turned else {}))
    if options is None:
        dataset = {"name": name, "path": str(folder)}
    else:
        dataset = {"name": "manifest", "path": str(tmp_path / "m.json")}
        assert "written:" in labeleff("index", folder, "--out", tmp_path / "m.json", *options)
        labeleff("audit", tmp_path / "m.json")
    axes = 2 if name in ("pictures", "cityscapes") else 3
    recipe = tiny(
        data={"dataset": dataset, "labelled": 1, "patch": [4] * axes},
        backbone={"name": "unet", "channels": [2, 4], "res_units": 0},
        stages=[{"strategy": "supervised", "steps": 2, "batch": 2}],
    )
    summary = run(load_recipe(recipe), tmp_path / "run", cache=cache)
    assert len(summary["classes"]) == classes
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["leaks"] == []
    given = as_volume(folder / image, tmp_path)
    target = tmp_path / f"label{'.png' if axes == 2 else '.nii.gz'}"
    labeleff("predict", tmp_path / "run", given, target)
    if axes == 2:
        assert Image.open(target).size == Image.open(given).size
        return
    one, two = nib.load(given), nib.load(target)
    assert two.shape == one.shape[:3]
    assert np.abs(two.affine - one.affine).max() < 1e-6
    assert set(np.unique(two.dataobj)) <= set(range(classes))


def test_sets_for_pretraining_are_learnt_from(tmp_path, cache):
    data = {"dataset": {"name": "prect", "path": str(layouts.prect(tmp_path / "in"))}, "patch": [8, 8, 8]}
    recipe = tiny(
        data=data | {"labelled": "none", "evaluate_on": "none"},
        backbone={"name": "unet", "channels": [2, 4, 4], "res_units": 0},
        stages=[{"strategy": {"name": "masked_autoencoder", "block": 2}, "steps": 2, "batch": 2}],
    )
    summary = run(load_recipe(recipe), tmp_path / "run", cache=cache)
    assert (summary["unlabelled_patients"], summary["labelled_patients"], summary["steps"]) == (6, 0, [2])

"""Files that no run has seen: geometry, slabs, ensembles, and what is refused."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from scipy import ndimage
from torch import nn
from typer.testing import CliRunner

from labeleff.backbones.views import Ensemble
from labeleff.backbones.weights import state_of
from labeleff.cli import app
from labeleff.data.manifest import Case, Manifest, Source, write_manifest
from labeleff.data.store import ImageStore, as_stored
from labeleff.errors import DataError, RecipeError, RunError
from labeleff.evaluation.inference import count_windows, evaluating, predict_slabs, predict_volume
from labeleff.export import export
from labeleff.predict import Wish, predict
from labeleff.predictor import FILE, HEADER, Processing, _processing, open_predictor, processing_of
from labeleff.prepare import prepare
from labeleff.prepared import make_backbone
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.unseen import read_unseen

from .conftest import tiny

CLASSES = ("background", "one", "two")


def write_run(folder, *, ndim=3, axes=3, seed=0, backbone=None, dataset=None, **changes):
    """Write what a finished run leaves for prediction, without having run."""
    patch = changes.setdefault("patch", (16,) * ndim)
    recipe = load_recipe(
        tiny(
            backbone=backbone or {"name": "unet", "channels": [4, 8], "res_units": 0},
            data=tiny()["data"] | {"patch": list(patch)} | ({"dataset": dataset} if dataset else {}),
            stages=[{"strategy": "supervised", "steps": 1}],
        )
    )
    processing = replace(
        Processing(
            axes, ndim, 1, CLASSES, True, "RAS" if axes == 3 else None, None, None, "zscore",
            2 if ndim < axes else None, patch, 0.5, 3, False,
        ),
        **changes,
    )  # fmt: skip
    network = make_backbone(recipe, processing.task, seed)
    header = {
        "version": "0", "predictor": "student", "recipe": to_mapping(recipe), "split": "abc",
        "classes": list(CLASSES), "processing": processing.as_plain(),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(save(state_of(network), metadata={HEADER: json.dumps(header)}))
    return network.eval(), processing


def write_volume(path, shape, affine, seed=0, slope=None):
    values = np.random.default_rng(seed).normal(100, 30, shape)
    image = nib.Nifti1Image(values.astype(np.int16 if slope else np.float32), affine)
    if slope:
        image.header.set_slope_inter(slope, -7)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return nib.load(path)


ANGLE = 0.3
OBLIQUE = np.array(
    [[np.cos(ANGLE), -np.sin(ANGLE), 0, -31.7], [np.sin(ANGLE), np.cos(ANGLE), 0, 12.25], [0, 0, 1, -90], [0, 0, 0, 1]]
) @ np.diag([0.7, 0.9, 2.5, 1])
AFFINES = {
    "oblique, anisotropic": OBLIQUE,
    "flipped and permuted": OBLIQUE[:, [2, 0, 1, 3]] @ np.diag([-1, 1, -1, 1]),
    "left-handed": np.diag([-1.0, 1, 1, 1]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_geometry_is_that_of_the_input_and_labels_are_those_of_the_image_upright(tmp_path, name):
    network, processing = write_run(tmp_path / "run")
    given = write_volume(tmp_path / "scan.nii.gz", (18, 21, 19), AFFINES[name], slope=0.5)
    predict([tmp_path / "run"], tmp_path / "scan.nii.gz", tmp_path / "out" / "label.nii.gz", Wish(True, True))
    label, probs, entropy = (
        nib.load(tmp_path / "out" / f"label{what}.nii.gz") for what in ("", "_probabilities", "_uncertainty")
    )
    for image in (label, probs, entropy):
        assert np.array_equal(image.affine, given.affine)
        assert image.shape[:3] == given.shape
        assert [int(image.header[key]) for key in ("qform_code", "sform_code", "xyzt_units")] == [
            int(given.header[key]) for key in ("qform_code", "sform_code", "xyzt_units")
        ]
    assert label.get_data_dtype() == np.uint8
    # the same by way of the in-memory path, of the image as nibabel turns it
    upright = nib.as_closest_canonical(given)
    image = as_stored(upright.get_fdata(dtype=np.float32)[None], "zscore")
    whole = predict_volume(
        network, torch.from_numpy(image), ndim=3, patch=processing.patch, window_batch=3, num_classes=3
    )
    theirs = nib.as_closest_canonical(probs).get_fdata(dtype=np.float32)
    assert np.allclose(np.moveaxis(theirs, 3, 0), whole.numpy(), atol=1e-5)
    ours = np.asarray(probs.dataobj)
    assert np.array_equal(np.asarray(label.dataobj), ours.argmax(3))
    assert np.allclose(entropy.get_fdata(), -(ours * np.log(ours)).sum(3), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "patch", "slice_axis"),
    [
        ((20, 30), (16, 16), None),
        ((9, 30), (16, 16), None),
        ((30, 9), (16, 16), None),
        ((16, 16), (16, 16), None),
        ((29, 9, 20), (8, 8, 8), None),
        ((5, 9, 7), (8, 8, 8), None),
        ((14, 13, 7), (8, 8), 2),
        ((7, 14, 13), (8, 8), 0),
    ],
)
@pytest.mark.parametrize("overlap", [0.5, 0.3])
def test_slabs_are_the_in_memory_path_to_the_bit(shape, patch, slice_axis, overlap):
    torch.manual_seed(0)
    conv = nn.Conv2d if len(patch) == 2 else nn.Conv3d
    network = conv(2, 3, 3, padding=1)  # zeros at the edge of a window: windows differ where they overlap
    image = torch.randn(2, *shape)
    options = {"ndim": len(patch), "patch": patch, "overlap": overlap, "window_batch": 3, "slice_axis": slice_axis}
    whole = predict_volume(network, image, num_classes=3, **options)
    axis = slice_axis or 0
    with evaluating(network):
        slabs = list(predict_slabs(network, image, **options))
    assert torch.equal(torch.cat([slab for _, slab in slabs], axis + 1), whole)
    ends = [0, *(place.stop for place, _ in slabs)]
    assert [place.start for place, _ in slabs] == ends[:-1]
    assert ends[-1] == shape[axis]
    if shape == (29, 9, 20):  # a batch of three windows is less than a layer of them
        assert max(slab.shape[1] for _, slab in slabs) <= patch[0]


def test_windows_are_counted():
    seen = []

    class Count(nn.Module):
        def forward(self, image):
            seen.append(len(image))
            return image

    for shape, patch, axis in [((20, 9, 8), (8, 8, 8), None), ((14, 13, 7), (8, 8), 2)]:
        seen.clear()
        predict_volume(Count(), torch.zeros(1, *shape), ndim=len(patch), patch=patch, slice_axis=axis, num_classes=1)
        assert sum(seen) == count_windows(shape, patch, 0.5, axis)


@pytest.mark.parametrize("normalise", ["zscore", "minmax", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_are_what_the_store_would_give_back(tmp_path, normalise, dtype):
    image = np.random.default_rng(0).normal(80, 20, (2, 40, 9, 8)).astype(dtype)
    image[1, 3:5] = 0

    class One:
        def read_image(self, case):
            return image

        def fingerprint(self, case):
            return str(dtype)

    case = Case("a", "a", (Source(tmp_path),), None, "", "train", None)
    store = ImageStore.prepare(One(), [case], axes=3, cache=tmp_path, normalise=normalise)
    assert np.allclose(as_stored(image, normalise), store.read("a"), rtol=1e-6, atol=1e-6)


def test_training_and_prediction_see_the_same_window(tmp_path, cache):
    rows = []
    for name, role in (("a", "train"), ("b", "train"), ("c", "test")):
        write_volume(tmp_path / f"{name}.nii.gz", (20, 18, 12), np.diag([1.0, -2.0, 1.0, 1]), seed=ord(name))
        label = nib.Nifti1Image(np.ones((20, 18, 12), np.uint8), np.diag([1.0, -2.0, 1.0, 1]))
        nib.save(label, tmp_path / f"{name}_label.nii.gz")
        files = (Source(tmp_path / f"{name}.nii.gz"),), Source(tmp_path / f"{name}_label.nii.gz")
        rows.append(Case(name, name, *files, "", role, (1.0, 2.0, 1.0)))
    write_manifest(Manifest("scans", tuple(rows), CLASSES, 3), tmp_path / "scans.json")
    spec = {"dataset": {"name": "manifest", "path": str(tmp_path / "scans.json")}, "labelled": 1, "patch": [16] * 3}
    recipe = tiny(
        data=spec | {"spacing": [1.0, 1.0, 1.0], "window": [90, 120]},
        backbone={"name": "unet", "channels": [4, 8], "res_units": 0},
        stages=[{"strategy": "supervised", "steps": 1}],
    )
    data = prepare(load_recipe(recipe), tmp_path / "run", cache=cache)
    processing = processing_of(data)
    assert processing.window == (90, 120)
    for name in "abc":
        seen = read_unseen([tmp_path / f"{name}.nii.gz"], processing)
        assert np.allclose(seen.image, data.store.read(name), atol=1e-5)
        assert np.ptp(seen.image) < 3  # and not the 8 standard deviations of what was drawn
        assert not seen.notes
    dark = nib.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4))
    nib.save(dark, tmp_path / "dark.nii.gz")
    found = read_unseen([tmp_path / "dark.nii.gz"], processing)
    assert found.notes[0] == (
        "nothing is left of values from 0 to 63 in the run's window [90, 120]: is the image in other units?"
    )


def test_resampled_to_the_spacing_of_the_run_and_back(tmp_path):
    network, processing = write_run(tmp_path / "run", spacing=(1.0, 1.0, 2.0))
    given = write_volume(tmp_path / "scan.nii", (12, 14, 20), np.diag([2.0, 1.5, 1.0, 1]))
    predict([tmp_path / "run"], tmp_path / "scan.nii", tmp_path / "out.nii", Wish(probabilities=True))
    image = given.get_fdata(dtype=np.float32)[None]
    small = ndimage.zoom(image, (1, 2, 1.5, 0.5), order=1, grid_mode=True, mode="nearest")
    assert small.shape == (1, 24, 21, 10)
    whole = predict_volume(
        network,
        torch.from_numpy(as_stored(small, "zscore")),
        ndim=3,
        patch=processing.patch,
        window_batch=3,
        num_classes=3,
    )
    back = torch.nn.functional.interpolate(whole[None], size=(12, 14, 20), mode="trilinear", align_corners=False)[0]
    found = np.moveaxis(np.asarray(nib.load(tmp_path / "out_probabilities.nii").dataobj), 3, 0)
    assert np.allclose(found, back.numpy(), atol=1e-5)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii").dataobj), found.argmax(0))


def test_a_folder_an_ensemble_and_flips(tmp_path):
    networks = [write_run(tmp_path / name, ndim=2, seed=seed)[0] for seed, name in enumerate("ab")]
    (tmp_path / "images").mkdir()
    for name in ("one.nii.gz", "two.nii"):
        write_volume(tmp_path / "images" / name, (16, 16, 5), np.diag([1.0, 1, 3, 1]))
    (tmp_path / "images" / "readme.txt").write_text("no image")
    runs = [tmp_path / "a", tmp_path / "b"]
    said = []
    wish = Wish(probabilities=True, flips=(1,))
    written = predict(runs, tmp_path / "images", tmp_path / "out", wish, say=said.append)
    assert written == [tmp_path / "out" / "one.nii.gz", tmp_path / "out" / "two.nii.gz"]
    assert [line.split(": ")[1].split(", ")[1][:9] for line in said] == ["5 windows"] * 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}{what}.nii.gz" for name in ("one", "two") for what in ("", "_probabilities")
    }
    image = as_stored(nib.load(tmp_path / "images" / "two.nii").get_fdata(dtype=np.float32)[None], "zscore")
    slices = torch.from_numpy(np.moveaxis(image, 3, 0).copy())
    with torch.no_grad():
        mean = sum(network(slices.flip(axes)).softmax(1).flip(axes) for network in networks for axes in ((), (3,))) / 4
    found = np.asarray(nib.load(tmp_path / "out" / "two_probabilities.nii.gz").dataobj)
    assert np.allclose(np.moveaxis(found, (2, 3), (0, 1)), mean.numpy(), atol=1e-5)


def test_pictures(tmp_path):
    network, _ = write_run(tmp_path / "run", ndim=2, axes=2)
    values = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    predict([tmp_path / "run"], tmp_path / "a.png", tmp_path / "out", Wish(uncertainty=True))
    with torch.no_grad():
        probs = network(torch.from_numpy(as_stored(values[None], "zscore"))[None]).softmax(1)[0].numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), probs.argmax(0))
    entropy = np.load(tmp_path / "out" / "a_uncertainty.npz")["values"]
    assert np.allclose(entropy, -(probs * np.log(probs)).sum(0), atol=1e-5)
    with pytest.raises(DataError, match="not a file of the kinds"):
        predict([tmp_path / "run"], tmp_path / "a.txt", tmp_path / "out")


def test_regions_that_overlap_are_bits(tmp_path):
    network, _ = write_run(tmp_path / "run", ndim=2, axes=2, exclusive=False)
    values = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    predict([tmp_path / "run"] * 2, tmp_path / "a.png", tmp_path / "out.png", Wish(True, True))
    predict([tmp_path / "run"], tmp_path / "a.png", tmp_path / "kept.png", Wish(largest_component=True))
    probs = np.load(tmp_path / "out_probabilities.npz")["values"]
    image = torch.from_numpy(as_stored(values[None], "zscore"))
    alone = predict_volume(network, image, ndim=2, patch=(16, 16), window_batch=3, num_classes=2, exclusive=False)
    assert np.allclose(probs, alone.numpy(), atol=1e-5)
    label, kept = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("out", "kept"))
    assert np.array_equal(label, (probs[0] >= 0.5) + 2 * (probs[1] >= 0.5))
    entropy = np.load(tmp_path / "out_uncertainty.npz")["values"]
    assert np.allclose(entropy, -sum(p * np.log(p) for p in (*probs, *(1 - probs))), atol=1e-5)
    counts = []
    for region in range(2):
        parts, count = ndimage.label((label >> region) & 1, np.ones((3, 3)))
        counts.append(count)
        assert ((kept >> region) & 1).sum() == ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1)).max()
    assert max(counts) > 1


def test_the_largest_component_is_kept_where_asked_for(tmp_path):
    write_run(tmp_path / "run", ndim=2, axes=2, largest_component=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "a.png")
    said = []
    predict([tmp_path / "run"], tmp_path / "a.png", tmp_path / "all.png", say=said.append)
    assert "--largest-component" in said[0]
    predict([tmp_path / "run"], tmp_path / "a.png", tmp_path / "kept.png", Wish(largest_component=True))
    every, kept = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("all", "kept"))
    for index in (1, 2):
        parts, count = ndimage.label(every == index, np.ones((3, 3)))
        assert count > 1
        sizes = ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1))
        assert (kept == index).sum() == sizes.max()


def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(tmp_path):
    write_run(tmp_path / "run")
    write_run(tmp_path / "other", normalise="minmax")
    scan = tmp_path / "scan.nii.gz"
    image = write_volume(scan, (17, 16, 16), np.eye(4))
    out, run = tmp_path / "out", tmp_path / "run"
    (tmp_path / "torn.nii.gz").write_bytes(scan.read_bytes()[:4000])
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), np.eye(4)), tmp_path / "four.nii")
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / FILE).write_bytes(save({"a": torch.zeros(1)}))
    cases = [
        ([tmp_path / "empty"], scan, out, {}, RunError, "there is no predictor"),
        ([tmp_path / "none"], scan, out, {}, RunError, "not a predictor that labeleff wrote"),
        ([run, tmp_path / "other"], scan, out, {}, RunError, "other: normalise is minmax, and zscore in"),
        ([run], scan, out, {"flips": (3,)}, RecipeError, "--flips 3: this network has the axes 0 to 2"),
        ([run], tmp_path / "gone.nii", out, {}, DataError, "gone.nii: not a file of the kinds"),
        ([run], tmp_path / "empty", out, {}, DataError, "no files of the kinds"),
        ([run], scan, scan, {}, DataError, "is the image itself"),
        ([run], tmp_path / "torn.nii.gz", out, {}, DataError, "not a readable NIfTI file"),
        ([run], tmp_path / "four.nii", out, {}, DataError, r"has the shape \(4, 4, 4, 3\)"),
        ([run], tmp_path / "nan.nii", out, {}, DataError, "holds NaN"),
    ]
    for runs, source, target, wish, kind, words in cases:
        with pytest.raises(kind, match=words) as error:
            predict(runs, source, target, Wish(**wish))
        assert "\n" not in str(error.value)
        assert not out.exists()
    found = CliRunner().invoke(app, ["predict", str(run), str(scan), str(out), "--flips", "0"])
    assert found.exit_code == 0, found.output
    assert nib.load(out / "scan.nii.gz").shape == image.shape
    again = CliRunner().invoke(app, ["predict", str(run), str(scan), str(out)])
    assert (again.exit_code, "is there already" in again.output) == (2, True)
    assert CliRunner().invoke(app, ["predict", str(run), str(scan), str(out), "--overwrite"]).exit_code == 0


def test_spacing_unlike_that_of_training_is_worth_a_word(tmp_path):
    write_run(tmp_path / "run", ndim=2, seen=((1.0, 1.0, 2.0), (1.2, 1.2, 3.0)))
    write_volume(tmp_path / "scan.nii", (16, 16, 2), np.diag([1.0, 2.0, 3.0, 1]))
    said = []
    predict([tmp_path / "run"], tmp_path / "scan.nii", tmp_path / "out.nii", say=said.append)
    assert said[0].startswith("scan.nii: voxels of 1 × 2 × 3 mm are unlike those of training (1-1.2 × 1-1.2 × 2-3)")


def test_weights_travel_with_what_they_need(tmp_path):
    _, processing = write_run(tmp_path / "run")
    found = export(tmp_path / "run", "safetensors", tmp_path / "out")
    assert (found["largest_difference"], found["labels_equal"]) == (0, 1)
    plain = json.loads((tmp_path / "out" / "processing.json").read_text())
    assert plain["processing"]["patch"] == [16, 16, 16]
    assert plain["backbone"]["name"] == "unet"
    assert open_predictor(tmp_path / "run").processing == processing
    assert plain["processing"].pop("window") is None  # what older versions wrote has none
    assert _processing(plain["processing"]) == processing
    with pytest.raises(RunError, match="is there already"):
        export(tmp_path / "run", "safetensors", tmp_path / "out")


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_bundle_predicts_what_predict_does(tmp_path, ndim):
    from monai.bundle import ConfigParser

    deep = {"name": "dynunet", "filters": [4, 8, 8], "deep_supervision": True}
    write_run(tmp_path / "run", ndim=ndim, backbone=deep, window=(95.0, 110.0) if ndim == 3 else None)
    found = export(tmp_path / "run", "bundle", tmp_path / "bundle")
    assert found["largest_difference"] < 1e-5
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "scan.nii.gz", (18, 21, 17), AFFINES["flipped and permuted"])
    predict([tmp_path / "run"], tmp_path / "in", tmp_path / "ours", Wish(probabilities=True))
    parser = ConfigParser()
    parser.read_config(str(tmp_path / "bundle" / "configs" / "inference.json"))
    parser["bundle_root"], parser["input_dir"] = str(tmp_path / "bundle"), str(tmp_path / "in")
    parser["output_dir"], parser["device"] = str(tmp_path / "theirs"), "cpu"
    parser.get_parsed_content("run")
    ours, theirs = nib.load(tmp_path / "ours" / "scan.nii.gz"), nib.load(tmp_path / "theirs" / "scan_label.nii.gz")
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
    # images are kept as 16-bit numbers in a run, and are not in a bundle: labels that are a matter of a hair may differ
    agree = np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)
    assert agree.mean() > 0.995


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    network, _ = write_run(tmp_path / "run", ndim=2)
    predictor = replace(open_predictor(tmp_path / "run"), network=Ensemble([network]))
    monkeypatch.setattr("labeleff.export.open_predictor", lambda run: predictor)
    with pytest.raises(RunError, match="is a Ensemble, which a MONAI bundle cannot describe"):
        export(tmp_path / "run", "bundle", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    network.model[0] = nn.Identity()
    predictor = replace(predictor, network=network)
    with pytest.raises(RunError, match="a stage has changed the structure of the network"):
        export(tmp_path / "run", "bundle", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", "onxx"])
    assert (result.exit_code, "Known: safetensors, bundle, onnx" in " ".join(result.output.split())) == (2, True)


def write_channels(folder, marks, *, second=None):
    """Write a volume of two channels as one file and as two, of which the second is stored with other axes."""
    folder.mkdir()
    values = np.random.default_rng(3).normal(100, 30, (18, 21, 19, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, OBLIQUE), folder.parent / "both.nii.gz")
    first, other = (nib.Nifti1Image(values[..., channel], OBLIQUE) for channel in (0, 1))
    nib.save(first, folder / f"scan{marks[0]}.nii.gz")
    nib.save(
        other.as_reoriented([[0, -1], [2, 1], [1, -1]]) if second is None else second, folder / f"scan{marks[1]}.nii.gz"
    )
    return nib.load(folder / f"scan{marks[0]}.nii.gz")


@pytest.mark.parametrize("how", ["numbered", "endings of the recipe", "manifest"])
def test_channels_may_be_files_of_their_own(tmp_path, how):
    marks = ("_t1", "_t2") if how == "endings of the recipe" else ("_0000", "_0001")
    dataset = {"name": "nifti", "path": "x", "channels": list(marks)} if how == "endings of the recipe" else None
    write_run(tmp_path / "run", channels=2, dataset=dataset)
    given = write_channels(tmp_path / "scans", marks)
    predict([tmp_path / "run"], tmp_path / "both.nii.gz", tmp_path / "expected.nii.gz")
    source = tmp_path / "scans"
    if how == "manifest":
        files = tuple(Source(source / f"scan{mark}.nii.gz") for mark in marks)
        source = tmp_path / "scans.json"
        write_manifest(Manifest("scans", (Case("scan", "p", files),), CLASSES, 3, 2), source)
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), str(source), str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scan.nii.gz"]
    label, expected = nib.load(tmp_path / "out" / "scan.nii.gz"), nib.load(tmp_path / "expected.nii.gz")
    assert np.array_equal(label.affine, given.affine)
    assert np.array_equal(np.asarray(label.dataobj), np.asarray(expected.dataobj))
    assert len(np.unique(label.dataobj)) > 1


def test_pictures_whose_channels_are_files(tmp_path):
    network, processing = write_run(tmp_path / "run", ndim=2, axes=2, channels=2)
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (2, 20, 24)).astype(np.uint8)
    for number, channel in enumerate(values):
        Image.fromarray(channel).save(tmp_path / "in" / f"cell_{number:04d}.png")
    predict([tmp_path / "run"], tmp_path / "in", tmp_path / "out")
    image = torch.from_numpy(as_stored(values, "zscore"))
    whole = predict_volume(network, image, ndim=2, patch=processing.patch, window_batch=3, num_classes=3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "cell.png")), whole.argmax(0).numpy())


def test_channels_that_do_not_belong_together_are_refused(tmp_path):
    write_run(tmp_path / "run", channels=2)
    moved = nib.Nifti1Image(np.zeros((18, 21, 19), np.float32), np.diag([1.0, 1, 1, 1]))
    write_channels(tmp_path / "scans", ("_0000", "_0001"), second=moved)
    run = [tmp_path / "run"]
    with pytest.raises(DataError, match=r"scan_0001\.nii\.gz: lies elsewhere than scan_0000\.nii\.gz"):
        predict(run, tmp_path / "scans", tmp_path / "out")
    nib.save(moved, tmp_path / "scans" / "more.nii.gz")
    with pytest.raises(DataError, match=r"more\.nii\.gz: ends in none of _0000, _0001"):
        predict(run, tmp_path / "scans", tmp_path / "out")
    (tmp_path / "scans" / "scan_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="the channel scan_0001 of this image is not in the folder"):
        predict(run, tmp_path / "scans", tmp_path / "out")
    source = tmp_path / "scans.json"
    write_manifest(Manifest("scans", (Case("a", "p", (Source(tmp_path / "both.nii.gz"),)),), CLASSES, 3), source)
    with pytest.raises(DataError, match=r"3-D with 1 channel\(s\); this run was trained on 3-D with 2"):
        predict(run, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

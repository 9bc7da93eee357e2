"""What ``labeleff init`` proposes, against values worked out by hand, and that it can be run."""

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from labeleff.checking import estimate
from labeleff.cli import app
from labeleff.data import phantom
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError
from labeleff.proposing import Fingerprint, _patch, fingerprint, propose
from labeleff.recipe_io import load_recipe

SEEN = Fingerprint(
    shape=(96.0, 96.0, 64.0),
    spacing=(1.0, 1.0, 1.0),
    spread=1.0,
    foreground=0.05,
    labelled=4,
    unlabelled=6,
    labelled_cases=4,
    tests=2,
)


def manifest(axes=3, **changes):
    case = Case("a", "a", (Source("a.nii.gz"),), Source("b.nii.gz"))
    return Manifest("my scans", (case,), ("background", "one", "two"), axes, **changes)


def chosen(seen, data=None, *, memory=8.0, gpu=True):
    return {c.key: c for c in propose(data or manifest(), seen, "x.json", memory=memory, gpu=gpu)}


def test_volumes_of_equal_sides_are_seen_whole_where_memory_lets_them():
    found = chosen(SEEN, memory=80.0)
    assert found["name"].value == "my-scans"
    assert found["data.dimensions"].value == 3
    assert "data.slice_axis" not in found
    # 64 / 5 is halved 3 times: multiples of 8
    assert found["backbone"].value == {"name": "unet", "channels": [16, 32, 64, 128]}
    assert found["data.patch"].value == [96, 96, 64]
    assert found["data.foreground"].value == 0.0
    assert "data.spacing" not in found
    assert [s["strategy"] for s in found["stages"].value] == ["bcp_pretrain", "bcp"]
    assert [s["strategy"] for s in found["baseline"].value] == ["supervised"]
    # 4 labelled volumes are 4 patches: a twentieth of them is less than a batch, which is two; seen 60 times in 120 steps
    assert found["stages"].value[0]["batch"] == 2
    assert sum(s["steps"] for s in found["stages"].value) == 400
    assert "evaluation" not in found


def test_little_memory_shrinks_the_patch_in_its_proportions():
    found = chosen(SEEN, memory=1.0)
    patch = found["data.patch"].value
    assert math.prod(patch) < 96 * 96 * 64
    assert all(n % 8 == 0 for n in patch)
    assert patch[0] == patch[1] > patch[2]
    assert "memory allows for a batch of two" in found["data.patch"].reason
    assert found["data.foreground"].value == 0.33
    assert math.prod(chosen(SEEN, memory=0.5)["data.patch"].value) < math.prod(patch)


def test_the_patch_of_a_cpu_by_hand():
    # 64^3 voxels at the most: 96 x 96 x 64 times (262144 / 589824)^(1/3) = 0.763 is 73.3 x 73.3 x 48.8
    assert _patch([96.0, 96.0, 64.0], 8, 1e9, 3, gpu=False)[0] == [72, 72, 48]
    # an axis of 16 stays, and 2 x 2048 of 4096 voxels are left for the others: 512^2 -> 16 x 16
    assert _patch([512.0, 512.0, 16.0], 16, 8192, 3, gpu=True)[0] == [16, 16, 16]
    assert _patch([500.0, 300.0], 16, 1e9, 2, gpu=True)[0] == [512, 304]


@pytest.mark.parametrize(
    ("changes", "axis", "reason"),
    [
        ({"spacing": (0.8, 0.8, 5.0), "shape": (200.0, 200.0, 30.0)}, 2, "slices are thick: 5 mm beside 0.8 mm"),
        ({"spacing": (5.0, 0.8, 0.8), "shape": (30.0, 200.0, 200.0)}, 0, "slices are thick: 5 mm beside 0.8 mm"),
        ({"shape": (96.0, 10.0, 96.0)}, 1, "only 10 slices: too few to halve"),
        (
            {"spacing": None, "shape": (96.0, 96.0, 30.0)},
            2,
            "30 slices of unknown thickness, few beside the other axes",
        ),
        ({"spacing": None}, None, "axes are about equally long"),
        ({"spacing": (1.0, 1.0, 2.9)}, None, "voxels are about as long along every axis"),
    ],
)
def test_thick_slices_are_seen_by_a_2d_network(changes, axis, reason):
    found = chosen(replace(SEEN, **changes))
    assert found["data.dimensions"].value == (3 if axis is None else 2)
    assert found["data.dimensions"].reason == reason
    assert len(found["data.patch"].value) == (3 if axis is None else 2)
    if axis is not None:
        assert found["data.slice_axis"].value == axis
        assert found["data.foreground"].value == 0.33  # a whole slice may be empty


def test_unlike_voxels_are_resampled_and_small_foreground_is_looked_for():
    found = chosen(replace(SEEN, spread=1.3, spacing=(1.0, 1.0, 1.5), foreground=0.004), memory=1.0)
    assert found["data.spacing"].value == [1.0, 1.0, 1.5]
    assert found["data.foreground"].value == 0.5


class Scans:
    """Three labelled cases in memory, the last one without foreground."""

    def __init__(self, images):
        self.images = images

    def read_image(self, case):
        return self.images[case.id]

    def read_label(self, case):
        label = (np.arange(30_000).reshape(300, 10, 10) < 20_000).astype(np.uint8)
        label[0, 0, :5] = 255
        return label * (case.id != "c")


def test_a_window_is_proposed_where_images_look_like_ct():
    cases = tuple(Case(i, i, (Source(f"{i}.nii.gz"),), Source("l.nii.gz")) for i in "abc")
    scans = Manifest("scans", cases, ("background", "one"), 3)
    ramp = np.concatenate([np.arange(-100, 300).repeat(50), np.full(10_000, -1000)]).reshape(1, 300, 10, 10)
    ramp[0, -1, -1, -1] = 1500
    images = {"a": ramp.astype(np.int16), "b": ramp.astype(np.float32), "c": ramp.astype(np.int16)}
    seen = fingerprint(Scans(images), scans)
    # every other voxel of 20,000 is looked at, 25 of each value from -100 to 299: the percentiles are the third from each end
    assert seen.window == (-98, 297)
    found = chosen(replace(seen, spacing=(1.0, 1.0, 1.0)), scans)
    assert found["data.window"].value == [-98, 297]
    assert "Hounsfield units; the 0.5 and 99.5 percentiles of the labelled foreground" in found["data.window"].reason
    for other in (ramp + 1000, ramp.clip(-1000, 150), ramp.repeat(2, 0), ramp.clip(-175, 250)):
        assert fingerprint(Scans(images | {"b": other}), scans).window is None
    assert "data.window" not in chosen(SEEN)


def test_what_is_learnt_and_measured_follows_from_the_labels():
    alone = chosen(replace(SEEN, unlabelled=0, tests=0))
    assert [s["strategy"] for s in alone["stages"].value] == ["supervised"]
    assert "baseline" not in alone
    assert alone["evaluation"].value == {"folds": 4, "fold": 0}
    assert chosen(replace(SEEN, labelled=1, tests=0))["data.evaluate_on"].value == "none"
    regions = chosen(SEEN, manifest(overlapping=True))
    assert [s["strategy"] for s in regions["stages"].value] == ["mean_teacher"]
    with pytest.raises(DataError, match="no training patient has a label"):
        chosen(replace(SEEN, labelled=0))


def test_a_batch_holds_at_most_a_twentieth_of_the_labelled_voxels():
    pictures = Fingerprint((64.0, 64.0), None, 1.0, 0.2, 200, 0, 200, 10)
    assert chosen(pictures, manifest(2))["stages"].value[0]["batch"] == 10
    assert chosen(replace(pictures, labelled_cases=2000), manifest(2))["stages"].value[0]["batch"] == 16
    # 60 x 2000 / 16 is 7500 steps, more than the most
    assert chosen(replace(pictures, labelled_cases=2000), manifest(2))["stages"].value[0]["steps"] == 4000
    assert chosen(pictures, manifest(2))["stages"].value[0]["steps"] == 1200


def test_a_folder_becomes_a_recipe_that_passes_the_check(tmp_path, cache, monkeypatch):
    (tmp_path / "scans" / "images").mkdir(parents=True)
    (tmp_path / "scans" / "labels").mkdir()
    volumes = {}
    for number in range(6):
        image, label = phantom.generate(7, number, shape=(16, 24, 24))[:2]
        affine = np.diag([1.0, 1.0, 1.0 if number else 1.5, 1.0])
        volumes[f"s{number}"] = label
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), tmp_path / "scans" / "images" / f"s{number}.nii.gz")
        if number < 4:
            nib.save(nib.Nifti1Image(label, affine), tmp_path / "scans" / "labels" / f"s{number}.nii.gz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), tmp_path / "bare" / "s0.nii.gz")
    refused = CliRunner().invoke(app, ["init", "bare"])
    assert refused.exit_code == 2
    assert "no training patient has a label" in refused.stderr
    assert not list(tmp_path.glob("*.json"))
    done = CliRunner().invoke(app, ["init", "scans", "--memory", "2"])
    assert done.exit_code == 0, done.stderr
    assert "4 patients have labels, 2 have none" in done.output
    text = (tmp_path / "recipe.yaml").read_text()
    assert "# sizes of voxels differ 1.5 times; their median" in text
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.spacing == (1.0, 1.0, 1.0)
    assert recipe.evaluation.folds == 4
    from labeleff.data.formats.manifest_file import ManifestFile

    data = ManifestFile(path="scans.json")
    seen = fingerprint(data, data.manifest())
    assert seen.foreground == pytest.approx(np.mean([(volumes[f"s{n}"] > 0).mean() for n in range(4)]))
    found = estimate(recipe, cache=cache)
    assert found["labelled_patients"] == 3
    assert json.dumps(yaml.safe_load(text)["stages"][0]["optimiser"]) == '{"name": "adamw", "lr": 0.002}'
    again = CliRunner().invoke(app, ["init", "scans.json"])
    assert again.exit_code == 2
    assert "recipe.yaml: exists already" in again.stderr
    done = CliRunner().invoke(app, ["init", "scans.json", "--output", "two.yaml", "--memory", "2"])
    assert (tmp_path / "two.yaml").read_text() == text

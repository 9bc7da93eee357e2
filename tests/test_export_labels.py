"""Labels of a run as a data set for others: what is written is what is known, where it was, and no test label."""

import json

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from labeleff import registry
from labeleff.batch import IGNORE
from labeleff.cli import app
from labeleff.data.manifest import Case, Manifest, Source, write_manifest
from labeleff.data.rounds import Asked, Region, Rounds
from labeleff.edits import Edit
from labeleff.errors import RunError
from labeleff.export_labels import _sets, _Values, export_labels
from labeleff.files import write_atomically
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe, to_yaml

from .conftest import tiny

SHAPE = (6, 5, 8)
# oblique, left-handed, anisotropic: x runs to the left, z is tilted
AFFINE = np.array([[-1.5, 0, 0.2, 10], [0, 1.0, -0.4, -20], [0, 0.2, 2.0, 5], [0, 0, 0, 1]])


def canonical(array):
    """Return voxels as they are read: x runs to the right."""
    return array[::-1]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory, cache):
    """A run of five NIfTI volumes that has begun: its labels on a grid of voxels twice as long, edited and answered."""
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    cases, images, labels = [], {}, {}
    for number, role in enumerate(["train"] * 4 + ["test"]):
        name = f"c{number}"
        images[name] = rng.normal(size=SHAPE).astype(np.float32)
        if number == 4:
            images[name] = np.rint(100 * images[name]) - 1000  # Hounsfield units
        labels[name] = rng.integers(0, 3, SHAPE).astype(np.uint8)
        for kind, array in (("image", images[name]), ("label", labels[name])):
            nib.save(nib.Nifti1Image(array, AFFINE), folder / f"{name}_{kind}.nii.gz")
        label = Source(folder / f"{name}_label.nii.gz")
        spacing = tuple(float(n) for n in np.linalg.norm(AFFINE[:3, :3], axis=0))
        cases.append(Case(name, f"p{number}", (Source(folder / f"{name}_image.nii.gz"),), label, "", role, spacing))
    write_manifest(Manifest("cubes", tuple(cases), ("background", "one", "two"), 3), folder / "cubes.json")
    double = [*cases[0].spacing[:2], 2 * cases[0].spacing[2]]
    data = {"dataset": {"name": "manifest", "path": str(folder / "cubes.json")}, "labelled": 2, "patch": [32, 32]}
    recipe = load_recipe(tiny(data=data | {"dimensions": 2, "slice_axis": 2, "spacing": double}))
    prepared = prepare(recipe, folder / "run", cache=cache)
    write_atomically(folder / "run" / "recipe.yaml", to_yaml(recipe))
    return folder, prepared, images, labels


def test_nnunet_holds_what_is_known_where_it_was(volumes, tmp_path):
    folder, data, images, labels = volumes
    pseudo, silent = data.split.unlabelled
    small = data.store.shape(pseudo)
    assert small == (6, 5, 4)
    said = np.full(small, IGNORE, np.uint8)
    said[:, :2] = 1
    data.annotations.apply([Edit(pseudo, said, "pseudo")], step=1, stage=0, author="me")
    first = data.split.labelled[0]
    rounds = Rounds(folder / "run")
    asked = Asked(1, 0, 1, 1, {"name": "me"}, "", (Region(1, first, (0, 0, 0), (2, 2, 2)),), {})
    rounds.ask(asked)
    rounds.answer(1, {1: np.full((2, 2, 2), 2, np.uint8)}, author="person")
    lines = export_labels(folder / "run", "nnunet", tmp_path / "Dataset007_Cubes")
    assert lines[0].endswith("3 labelled cases, 1 images of the test without labels")
    assert any(line.startswith("1 training cases have no label at all") for line in lines)

    spec = json.loads((tmp_path / "Dataset007_Cubes" / "dataset.json").read_text())
    assert spec["labels"] == {"background": 0, "one": 1, "two": 2, "ignore": 3}
    assert (spec["numTraining"], spec["channel_names"]) == (3, {"0": "channel_0"})
    written = sorted(p.relative_to(tmp_path / "Dataset007_Cubes").as_posix() for p in tmp_path.rglob("*.nii.gz"))
    known = sorted([*data.split.labelled, pseudo])
    pairs = [(f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz") for name in known]
    assert written == sorted(["imagesTs/c4_0000.nii.gz", *(file for pair in pairs for file in pair)])

    expected = {name: np.repeat(canonical(labels[name])[:, :, 1::2], 2, axis=2) for name in data.split.labelled}
    expected[first] = expected[first].copy()
    expected[first][:2, :2, :4] = 2
    expected[pseudo] = np.full(SHAPE, IGNORE, np.uint8)
    expected[pseudo][:, :2] = 1
    again = registry.build("dataset", "nnunet", path=str(tmp_path / "Dataset007_Cubes"), unlabelled_tests=True)
    manifest = again.manifest()
    assert {case.id: case.patient for case in manifest.cases} == {n: f"p{n[1]}" for n in (*known, "c4")}
    for case in manifest.cases:
        assert np.allclose(again.affine(case), data.dataset.affine(data.manifest.case(case.id)), atol=1e-6)
        assert np.array_equal(again.read_image(case)[0], canonical(images[case.id]))
        assert case.id == "c4" or np.array_equal(again.read_label(case), expected[case.id])
    assert silent not in known
    kinds = {
        n: nib.load(tmp_path / "Dataset007_Cubes" / n).get_data_dtype() for n in (written[0], "imagesTs/c4_0000.nii.gz")
    }
    assert list(kinds.values()) == [np.float32, np.int16]


def test_manifest_points_at_files_and_reads_no_test_label(volumes, tmp_path, monkeypatch):
    folder, data, _, labels = volumes
    opened, plain = [], type(data.dataset).read_label
    monkeypatch.setattr(
        type(data.dataset), "read_label", lambda self, case: opened.append(case.id) or plain(self, case)
    )
    done = CliRunner().invoke(
        app, ["export-labels", str(folder / "run"), str(tmp_path / "out"), "--format", "manifest"]
    )
    assert done.exit_code == 0, done.stderr
    assert not opened
    again = registry.build("dataset", "manifest", path=str(tmp_path / "out" / "manifest.json"))
    manifest = again.manifest()
    assert {case.id: case.role for case in manifest.cases} == {
        **dict.fromkeys(("c0", "c1", "c2", "c3"), "train"),
        "c4": "test",
    }
    second = data.split.labelled[1]
    assert np.array_equal(
        again.read_label(manifest.case(second)), np.repeat(canonical(labels[second])[:, :, 1::2], 2, axis=2)
    )
    assert manifest.case("c4").label.path.resolve() == folder / "c4_label.nii.gz"
    assert not manifest.case(data.split.unlabelled[1]).has_label


def test_overlapping_regions_become_nnunet_regions(tmp_path, cache):
    data = {"dataset": {"name": "phantom_chest", "patients": 3, "test": 1, "size": [32, 32]}, "labelled": 2}
    recipe = load_recipe(tiny(data=data | {"patch": [32, 32]}, stages=[{"strategy": "supervised", "steps": 1}]))
    prepared = prepare(recipe, tmp_path / "run", cache=cache)
    write_atomically(tmp_path / "run" / "recipe.yaml", to_yaml(recipe))
    lines = export_labels(tmp_path / "run", "nnunet", tmp_path / "chest")
    assert lines[-1] == "nnU-Net looks for folders named DatasetNNN_NAME below nnUNet_raw: rename it"
    again = registry.build("dataset", "nnunet", path=str(tmp_path / "chest"))
    manifest = again.manifest()
    assert manifest.overlapping
    assert "ignore" not in json.loads((tmp_path / "chest" / "dataset.json").read_text())["labels"]
    for name in prepared.split.labelled:
        case = prepared.manifest.case(name)
        found, true = again.read_label(manifest.case(name)), prepared.dataset.read_label(case)
        assert np.array_equal(again.read_image(manifest.case(name)), prepared.dataset.read_image(case))
        for bit, region in enumerate(prepared.manifest.classes[1:]):
            assert np.array_equal(found >> manifest.classes[1:].index(region) & 1, true >> bit & 1)
    assert len(np.unique(found)) > 4


def test_nested_regions_come_back_from_the_one_map_that_nnunet_writes():
    values = _Values(("background", "core", "enhancing", "whole"), _sets([0b100, 0b101, 0b111], 3), partial=True)
    found = values.described()
    assert found["labels"] == {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    label = np.array([0, 0b100, 0b101, 0b111, IGNORE], np.uint8)
    stored = values.stored(label)
    assert stored.tolist() == [0, 1, 2, 3, 4]
    merged = np.zeros(4, int)  # as nnU-Net puts what it predicts of regions into one map
    for value, members in zip(found["regions_class_order"], list(found["labels"].values())[1:4], strict=True):
        merged[np.isin(stored[:4], members)] = value
    assert merged.tolist() == stored[:4].tolist()


def test_regions_stay_regions_where_none_overlap():
    # without a region of two values, a reader takes them for classes that exclude one another
    assert _sets([1], 2) == _sets([1, 2], 2) == _sets([3], 2) == (1, 2, 3)
    assert _sets([1, 3], 2) == (1, 3)
    assert _sets([1, 2, 4], 3) == (1, 2, 4, 7)


def test_what_cannot_be_exported_is_refused(volumes, tmp_path):
    folder = volumes[0]
    with pytest.raises(RunError, match="not empty"):
        export_labels(folder / "run", "nnunet", folder)
    with pytest.raises(RunError, match=r"no recipe\.yaml"):
        export_labels(tmp_path, "nnunet", tmp_path / "out")
    done = CliRunner().invoke(app, ["export-labels", str(folder / "run"), str(tmp_path / "o"), "--format", "nnunett"])
    assert done.exit_code == 2
    assert "Did you mean 'nnunet'?" in done.stderr

"""Layouts on disk, generated small; the real sets where they are at hand."""

import contextlib
import json

import h5py
import nibabel as nib
import numpy as np
import pytest

from labeleff.data.formats.compact import Compact
from labeleff.data.formats.left_atrium_h5 import LeftAtriumH5
from labeleff.data.formats.nifti import Nifti
from labeleff.data.manifest import read_manifest
from labeleff.errors import DataError, LabeleffError

GENERATOR = np.random.default_rng(0)


def volume(shape=(6, 7, 8), classes=2):
    return GENERATOR.integers(0, 255, shape).astype(np.uint8), GENERATOR.integers(0, classes, shape).astype(np.uint8)


@pytest.fixture
def atrium(tmp_path):
    for name in ("A", "B", "C"):
        image, label = volume()
        np.savez(tmp_path / f"{name}.npz", image=image, label=label, orig_shape=(1, 2, 3))
    (tmp_path / "train.list").write_text("A\nB\n")
    (tmp_path / "test.list").write_text("C\n")
    return tmp_path


def test_compact_left_atrium(atrium):
    data = Compact(path=str(atrium))
    manifest = data.manifest()
    assert [(c.id, c.role) for c in manifest.cases] == [("A", "train"), ("B", "train"), ("C", "test")]
    assert manifest.official == ("A", "B")
    assert manifest.case("A").spacing == (1.25,) * 3
    with np.load(atrium / "A.npz") as file:
        assert np.array_equal(data.read_image(manifest.case("A"))[0], file["image"])
        assert np.array_equal(data.read_label(manifest.case("A")), file["label"])


def test_images_are_read_without_their_labels(atrium, monkeypatch):
    data = Compact(path=str(atrium))
    case = data.manifest().case("A")
    touched = []
    plain = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: touched.append(key) or plain(self, key))
    data.read_image(case)
    assert touched == ["image"]


def test_compact_errors_name_case_and_file(atrium, monkeypatch):
    data = Compact(path=str(atrium))
    manifest = data.manifest()
    (atrium / "A.npz").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"case 'A': .*A\.npz: no readable array 'image'"):
        data.read_image(manifest.case("A"))
    np.savez(atrium / "B.npz", image=volume()[0], label=np.full((6, 7, 8), 9))
    with pytest.raises(DataError, match=r"case 'B': .* label value 9 is no class"):
        data.read_label(manifest.case("B"))
    (atrium / "C.npz").unlink()
    with pytest.raises(DataError, match="case 'C'"):
        data.fingerprint(manifest.case("C"))
    monkeypatch.delenv("LABELEFF_DATA", raising=False)
    with pytest.raises(DataError, match=r"nowhere: no such folder; .* LABELEFF_DATA .*\(it is not set\)"):
        Compact(path="nowhere").manifest()
    (atrium / "train.list").unlink()
    with pytest.raises(DataError, match="is this a compact set"):
        Compact(path=str(atrium)).manifest()


def test_compact_refuses_pickles(tmp_path):
    np.savez(tmp_path / "A.npz", image=np.array([{"evil": 1}], dtype=object), label=np.zeros(1))
    for name in ("train.list", "test.list"):
        (tmp_path / name).write_text("A\n" if name.startswith("train") else "B\n")
    data = Compact(path=str(tmp_path))
    with pytest.raises(DataError, match="no readable array"):
        data.read_image(data.manifest().case("A"))


def test_left_atrium_h5(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        image, label = volume()
        with h5py.File(tmp_path / name / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = image.astype(np.float32) / 7, label
    (tmp_path / "train.list").write_text("one\n")
    (tmp_path / "test.list").write_text("two\n")
    data = LeftAtriumH5(path=str(tmp_path))
    manifest = data.manifest()
    assert data.read_image(manifest.case("one")).dtype == np.float32
    assert data.read_label(manifest.case("two")).shape == (6, 7, 8)
    (tmp_path / "one" / "mri_norm2.h5").write_bytes(b"torn")
    with pytest.raises(DataError, match="case 'one'"):
        data.read_image(manifest.case("one"))


@pytest.fixture
def folder(tmp_path):
    affine = np.diag([-2.0, 1.5, 3.0, 1.0])  # left-handed on purpose: x runs the other way
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name in ("p1_a", "p1_b", "p2_a", "p3_a"):
        image, label = volume()
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), tmp_path / "images" / f"{name}.nii.gz")
        if name != "p2_a":
            nib.save(nib.Nifti1Image(label, affine), tmp_path / "labels" / f"{name}.nii.gz")
    (tmp_path / "test.list").write_text("p3_a\n")
    return tmp_path


def test_nifti(folder):
    data = Nifti(path=str(folder), patient_pattern="(p[0-9]+)_")
    manifest = data.manifest()
    assert manifest.patients("train") == ("p1", "p2")
    assert manifest.case("p2_a").label is None
    assert manifest.case("p3_a").role == "test"
    assert manifest.case("p1_a").spacing == (2.0, 1.5, 3.0)
    stored = np.asarray(nib.load(folder / "images" / "p1_a.nii.gz").dataobj)
    assert np.array_equal(data.read_image(manifest.case("p1_a"))[0], stored[::-1])  # brought to the canonical side
    label = np.asarray(nib.load(folder / "labels" / "p1_a.nii.gz").dataobj)
    assert np.array_equal(data.read_label(manifest.case("p1_a")), label[::-1])


def test_nifti_errors(folder):
    data = Nifti(path=str(folder))
    manifest = data.manifest()
    other = nib.Nifti1Image(np.zeros((6, 7, 8), np.uint8), np.diag([2.0, 1.5, 1.0, 1.0]))
    nib.save(other, folder / "labels" / "p1_a.nii.gz")
    with pytest.raises(DataError, match="geometry"):
        data.read_label(manifest.case("p1_a"))
    (folder / "images" / "p1_b.nii.gz").write_bytes(b"torn")
    torn = Nifti(path=str(folder)).manifest().case("p1_b")  # the others are known all the same
    assert torn.spacing is None
    with pytest.raises(DataError, match=r"case 'p1_b'.* not a readable NIfTI"):
        data.read_image(torn)
    (folder / "images" / "p1_b.nii.gz").unlink()
    with pytest.raises(DataError, match="a label without an image"):
        Nifti(path=str(folder)).manifest()
    with pytest.raises(ValueError, match="needs a group"):
        Nifti(path=".", patient_pattern="p")


def test_patients_from_a_table(folder):
    (folder / "patients.csv").write_text("case,patient\np1_a,x\np1_b,x\np2_a,y\np3_a,z\n")
    assert Nifti(path=str(folder)).manifest().patients("train") == ("x", "y")
    (folder / "patients.csv").write_text("case,patient\np1_a,x\n")
    with pytest.raises(DataError, match="has no row"):
        Nifti(path=str(folder)).manifest()


@pytest.mark.parametrize(
    ("name", "cases", "patients", "classes", "axes"),
    [("left_atrium_half", 100, 80, 2, 3), ("acdc_128", 200, 70, 4, 3), ("nuclei_128", 664, None, 2, 2)],
)
def test_real_sets(real_data, name, cases, patients, classes, axes):
    data = Compact(path=str(real_data / name))
    manifest = data.manifest()
    assert (len(manifest.cases), len(manifest.classes), manifest.axes) == (cases, classes, axes)
    assert patients is None or len(manifest.patients("train")) == patients
    case = manifest.of_role("train")[0]
    image, label = data.read_image(case), data.read_label(case)
    assert image.shape[1:] == label.shape
    assert label.max() == classes - 1


GOOD = {
    "name": "m", "classes": ["background", "organ"], "axes": 2, "channels": 1, "slice_axis": 0, "official": [],
    "cases": [{"id": "a", "patient": "p", "image": [{"path": "a.npz", "key": "image"}], "label": None, "domain": "",
               "role": "train", "spacing": None}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["a.npz"]}, r"cases\.0 \(a\): image holds 'a\.npz'; a file is written as"),
        ({"image": "a.npz"}, "image is 'a.npz'; it is a list of files"),
        ({"image": []}, "image is empty"),
        ({"image": [{"path": 3}]}, "a file is written as"),
        ({"label": "a.npz"}, "label holds 'a.npz'; a file is written as"),
        ({"raters": {"path": "x"}}, "raters is .* it is a list of files"),
        ({"spacing": 1.0}, r"spacing is 1\.0; it is a list of lengths"),
        ({"spacing": ["x", 1]}, "it is a list of lengths"),
        ({"role": "exam"}, "role is 'exam'; it is one of train, validation, test"),
        ({"patient": 3}, "id, patient and domain are texts"),
    ],
)
def test_rows_of_a_manifest_written_by_hand(tmp_path, change, message):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(GOOD | {"cases": [GOOD["cases"][0] | change]}))
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_manifests_of_any_shape_are_read_or_refused_in_one_line(tmp_path):
    """Every value at every level is put in the place of every other kind of value."""
    path = tmp_path / "manifest.json"
    others = [None, 3, "x", [], {}, [1], {"a": 1}, [[]], True]
    for key in GOOD:
        for other in others:
            path.write_text(json.dumps(GOOD | {key: other}))
            with contextlib.suppress(LabeleffError):
                read_manifest(path)
    for key in GOOD["cases"][0]:
        row = GOOD["cases"][0]
        for changed in [*(row | {key: other} for other in others), {k: v for k, v in row.items() if k != key}, key]:
            path.write_text(json.dumps(GOOD | {"cases": [changed]}))
            with contextlib.suppress(LabeleffError):
                read_manifest(path)
    path.write_text(json.dumps(GOOD))
    assert read_manifest(path).case("a").image[0].key == "image"

"""DICOM series: geometry against SimpleITK's own NIfTI, no tag of a patient anywhere, and what is refused."""

import json
import locale
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from labeleff.data.formats import dicom_files
from labeleff.data.formats.dicom import Dicom
from labeleff.data.formats.manifest_file import ManifestFile
from labeleff.data.formats.nih_pancreas import NihPancreas
from labeleff.data.recognise import index_folder, write_index
from labeleff.data.store import ImageStore
from labeleff.errors import DataError
from labeleff.predict import predict
from tests.test_predict import write_run

itk = pytest.importorskip("SimpleITK")

PLANTED = {
    "0010|0010": "Planted^Nameless",
    "0010|0020": "ID-4711-SECRET",
    "0010|0030": "19010203",
    "0008|0080": "Hospital of X",
}
UID = "1.2.826.0.1.3680043.2.1125."
OBLIQUE = (0.96, -0.28, 0.0, 0.28 * 0.8, 0.96 * 0.8, -0.6, 0.28 * 0.6, 0.96 * 0.6, 0.8)
"""Directions of the axes as rows of a right-handed turn: columns below."""


def write_series(folder, *, seed=0, series=1, shape=(7, 6, 5), step=2.5, turn=OBLIQUE, at=None, suffix=".dcm", **tags):
    """Write a series, slice by slice, in an order of names that is not that of places; return the volume [z, y, x]."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_CTYPE)  # writing tags leaves another one, in which Python reads ASCII only
    voxels = np.random.default_rng(seed).integers(-1000, 2000, shape[::-1], dtype=np.int16)
    axes = np.array(turn).reshape(3, 3)
    for z in range(shape[2]):
        image = itk.GetImageFromArray(voxels[z])
        image.SetSpacing((0.75, 1.25))
        place = np.array([-30.5, 12.25, 100.0]) + axes[2] * (step * z if at is None else at[z])
        values = {
            **PLANTED,
            "0008|0060": "CT",
            "0020|000d": UID + "1",
            "0020|000e": f"{UID}2.{series}",
            "0020|0011": str(series),
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(f"{n:.9g}" for n in place),
            "0020|0037": "\\".join(f"{n:.9g}" for n in (*axes[0], *axes[1])),
            "0008|0018": f"{UID}3.{series}.{z + 1}",
            **tags,
        }
        for key, value in values.items():
            image.SetMetaData(key, value)
        writer = itk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / f"s{(z * 3) % shape[2]:02}_{series}{suffix or '.dcm'}"))
        writer.Execute(image)
        if not suffix:
            path = folder / f"s{(z * 3) % shape[2]:02}_{series}.dcm"
            path.rename(path.with_suffix(""))
    locale.setlocale(locale.LC_CTYPE, before)
    return voxels


def by_itk(folder, path):
    path.parent.mkdir(exist_ok=True)
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    itk.WriteImage(reader.Execute(), str(path))
    return nib.as_closest_canonical(nib.load(path))


@pytest.mark.parametrize(
    ("turn", "suffix"),
    [
        (OBLIQUE, ".dcm"),
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), ""),
        ((0, 1, 0, 0, 0, -1, -1, 0, 0), ".dcm"),  # sagittal, from right to left
        ((-1, 0, 0, 0, 1, 0, 0, 0, -1), ".dcm"),
    ],
)
def test_geometry_is_that_of_the_same_series_as_nifti(tmp_path, turn, suffix):
    voxels = write_series(tmp_path / "scans" / "one", turn=turn, suffix=suffix)
    reference = by_itk(tmp_path / "scans" / "one", tmp_path / "reference.nii.gz")
    data = Dicom(path=str(tmp_path / "scans"))
    case = data.manifest().case("one")
    found = data.read_image(case)
    assert found.dtype == np.float32
    assert np.array_equal(found[0], np.asarray(reference.dataobj))
    assert np.allclose(data.affine(case), reference.affine, atol=1e-4)
    assert case.spacing == pytest.approx(reference.header.get_zooms()[:3], abs=1e-5)
    # and by hand: a voxel of the file, its place from the tags, is found at that place
    axes = np.array(turn, float).reshape(3, 3)
    place = np.array([-30.5, 12.25, 100.0]) + axes[0] * 0.75 * 4 + axes[1] * 1.25 * 3 + axes[2] * 2.5 * 2
    index = np.linalg.inv(data.affine(case)) @ (*(place * (-1, -1, 1)), 1)
    assert np.allclose(index, np.rint(index), atol=1e-4)
    assert found[0][tuple(np.rint(index[:3]).astype(int))] == voxels[2, 3, 4]


@pytest.fixture
def read(monkeypatch):
    """The names of files whose headers are read."""
    names, opened = [], dicom_files._opened
    monkeypatch.setattr(dicom_files, "_opened", lambda path: (names.append(path.name), opened(path))[1])
    return names


def test_headers_are_read_once(tmp_path, read):
    write_series(tmp_path / "one")
    Dicom(path=str(tmp_path)).manifest()
    assert sorted(read) == ["s00_1.dcm"] + [
        f"s{n:02}_1.dcm" for n in range(5)
    ]  # one again: is the folder named as its patient?


def test_labels_roles_index_and_the_store(tmp_path):
    folder = tmp_path / "scans"
    for number, name in enumerate(("p1", "p2", "p3/late")):
        write_series(folder / "images" / name, seed=number, suffix="" if number else ".dcm")
    (folder / "labels").mkdir()
    reference = by_itk(folder / "images" / "p1", tmp_path / "p1.nii.gz")
    label = (np.asarray(reference.dataobj) > 500).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, reference.affine), folder / "labels" / "p1.nii.gz")
    (folder / "test.list").write_text("p2\n")
    lines = write_index(folder, tmp_path / "scans.json")
    assert lines[0] == "scans: DICOM series"
    data = ManifestFile(path=str(tmp_path / "scans.json"))
    manifest = data.manifest()
    assert [(case.id, case.role, case.has_label) for case in manifest.cases] == [
        ("p1", "train", True),
        ("p2", "test", False),
        ("p3_late", "train", False),
    ]
    assert np.array_equal(data.read_label(manifest.case("p1")), label)
    store = ImageStore.prepare(data, manifest.cases, axes=3, cache=tmp_path / "cache", normalise="none", processes=2)
    assert np.allclose(store.read("p1")[0], np.asarray(reference.dataobj), atol=2)
    before = data.fingerprint(manifest.case("p2"))
    write_series(folder / "images" / "p2", seed=9, suffix="")
    assert data.fingerprint(manifest.case("p2")) != before  # whichever slice it is that has changed
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / "p1.nii.gz")
    with pytest.raises(DataError, match=r"case 'p1': .*geometry"):
        data.read_label(manifest.case("p1"))


def test_no_tag_of_a_patient_is_written_anywhere(tmp_path):
    folder = tmp_path / "in"
    write_series(folder / "images" / "plain", series=1)
    write_series(folder / "images" / "two", series=2)
    write_series(folder / "images" / "two", series=3, seed=1)
    write_series(folder / "images" / "4711_secret_id" / "PLANTED_Nameless", series=4)
    out = tmp_path / "out"
    out.mkdir()
    lines = write_index(folder, out / "m.json")
    data = ManifestFile(path=str(out / "m.json"))
    manifest = data.manifest()
    assert [case.id for case in manifest.cases] == ["case_001", "plain", "two_1", "two_2"]
    ImageStore.prepare(data, manifest.cases, axes=3, cache=out / "cache")
    said = json.loads((out / "m.json").read_text())
    for row in said["cases"]:
        row["image"] = []  # where files are is not copied from them
    everything = [json.dumps(said).encode(), "\n".join(lines).replace(str(out), "").encode()]
    everything += [path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "m.json"]
    for tag in (*PLANTED.values(), "Planted", "Nameless", "4711", UID):
        assert not any(tag.lower().encode() in content.lower() for content in everything), tag


def broken(kind, folder):
    """Write a series with something wrong; return the words that say so."""
    even = [0, 2.5, 5, 7.5, 10]
    if kind == "missing":
        write_series(folder, at=[0, 2.5, 5, 10, 12.5])
        return r"a slice is missing between it and s02_1\.dcm|a slice is missing between it and s0\d_1\.dcm: 5 mm lie"
    if kind == "irregular":
        write_series(folder, at=[0, 2.5, 5, 8, 10.5])
        return r"from its place in an even stack; slices of one series are 2\.5 to 3 mm apart"
    if kind == "twice":
        write_series(folder, at=[0, 2.5, 2.5, 5, 7.5])
        return r"lies where s0\d_1\.dcm does"
    write_series(folder, at=even)
    write_series(folder / "other", shape=(4, 4, 5), at=[n + 12.5 for n in even])
    for path in (folder / "other").iterdir():
        path.rename(folder / f"t{path.name}")
    return "differs from s00_1.dcm of the same series in size"


@pytest.mark.parametrize("kind", ["missing", "irregular", "twice", "sizes"])
def test_what_is_no_even_stack_is_named(tmp_path, kind):
    words = broken(kind, tmp_path / "images" / "odd")
    write_series(tmp_path / "images" / "whole")
    shutil.rmtree(tmp_path / "images" / "odd" / "other", ignore_errors=True)
    data = Dicom(path=str(tmp_path))
    manifest = data.manifest()  # the others are known all the same
    with pytest.raises(DataError, match=rf"case 'odd': .*({words})"):
        data.read_image(manifest.case("odd"))
    assert any(note.startswith("case 'odd' cannot be read: ") for note in data.notes)
    assert data.read_image(manifest.case("whole")).shape[0] == 1


def test_kinds_that_are_not_read_are_named(tmp_path):
    frames = itk.GetImageFromArray(np.zeros((3, 8, 8), np.uint8))
    colour = itk.GetImageFromArray(np.zeros((8, 8, 3), np.uint8), isVector=True)
    for name, image, words in (
        (
            "frames",
            frames,
            r"x\.dcm: holds 3 frames in one file \(multi-frame DICOM\), which is not read; convert to NIfTI",
        ),
        ("colour", colour, r"x\.dcm: holds colours \(RGB DICOM\), which are not read"),
    ):
        (tmp_path / name).mkdir()
        itk.WriteImage(image, str(tmp_path / name / "x.dcm"))
        with pytest.raises(DataError, match=words):
            index_folder(tmp_path / name)
    write_series(tmp_path / "one", shape=(7, 6, 1))
    with pytest.raises(DataError, match="no DICOM series of two slices or more"):
        index_folder(tmp_path / "one")
    write_series(tmp_path / "torn")
    path = sorted((tmp_path / "torn").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"s00_1\.dcm: not a readable DICOM image; repair or remove it"):
        index_folder(tmp_path / "torn")
    content = sorted((tmp_path / "torn").iterdir())[1].read_bytes()

    def of_kind(uid):
        path.write_bytes(
            re.sub(rb"(\x02\x00\x02\x00UI)..[0-9.]+\x00?", lambda found: found[1] + b"\x1e\0" + uid, content, count=1)
        )

    of_kind(b"1.2.840.10008.5.1.4.1.1.66.4\0\0")
    with pytest.raises(DataError, match=r"s00_1\.dcm: DICOM-SEG is not read; convert labels to NIfTI"):
        index_folder(tmp_path / "torn")
    of_kind(b"1.2.840.10008.5.1.4.1.1.481.3\0")
    assert "1 DICOM files without an image, such as s00_1.dcm, are left out" in index_folder(tmp_path / "torn").notes


def test_series_are_predicted_in_their_geometry(tmp_path):
    write_run(tmp_path / "run")
    write_series(tmp_path / "in" / "one", shape=(20, 18, 17))
    by_itk(tmp_path / "in" / "one", tmp_path / "nifti" / "one.nii.gz")
    for kind in ("in", "nifti"):
        predict([tmp_path / "run"], tmp_path / kind, tmp_path / f"of_{kind}")
    one, two = (nib.as_closest_canonical(nib.load(tmp_path / f"of_{kind}" / "one.nii.gz")) for kind in ("in", "nifti"))
    assert np.allclose(one.affine, two.affine, atol=1e-4)
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))
    assert len(np.unique(np.asarray(one.dataobj))) > 1


def test_without_simpleitk_it_is_said_what_is_needed(tmp_path, monkeypatch):
    write_series(tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(DataError, match=r"pip install 'labeleff\[dicom\]'"):
        index_folder(tmp_path)


def test_the_pancreas_as_it_comes_from_the_archive(tmp_path, read):
    """Series lie two folders down, beside scouts of one slice; labels count to the left, the back and upwards."""
    upright = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)  # the patient's left, back and head
    for number in (2, 64):
        place = tmp_path / "Pancreas-CT" / f"PANCREAS_{number:04d}" / "11-24-2015"
        voxels = write_series(place / "Pancreas-18957", seed=number, turn=upright)
        write_series(place / "scout", series=2, shape=(4, 4, 1), turn=upright)
        label = (voxels > 500).astype(np.uint8).T
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"label{number:04d}.nii.gz")
    data = NihPancreas(path=str(tmp_path), labels="series")
    manifest = data.manifest()
    assert sorted(read) == sorted(["s00_2.dcm", *(f"s{n:02}_1.dcm" for n in range(5))] * 2)  # once each
    assert [(case.id, case.role) for case in manifest.cases] == [("PANCREAS_0002", "train"), ("PANCREAS_0064", "test")]
    for case in manifest.cases:
        assert case.spacing == pytest.approx((0.75, 1.25, 2.5))
        image = data.read_image(case)[0]
        assert image.shape == (7, 6, 5)
        assert np.array_equal(data.read_label(case), image > 500)
    shutil.rmtree(tmp_path / "Pancreas-CT")
    with pytest.raises(DataError, match=r"no volumes; expected PANCREAS_NNNN, of DICOM files or \.nii\.gz"):
        data.manifest()

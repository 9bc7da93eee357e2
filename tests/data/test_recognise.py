"""Folders that follow a standard, and folders that follow none, become manifests; cases are added to them."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.data.formats.manifest_file import ManifestFile
from labeleff.data.manifest import read_manifest
from labeleff.data.pairing import pair
from labeleff.data.recognise import Choices, add_folder, in_words, index_folder, write_index
from labeleff.errors import DataError, SplitError

from . import layouts
from .layouts import SHAPE, picture, save, volume

GREY = (np.arange(48).reshape(6, 8) * 5).astype(np.uint8)
MASK = np.where(GREY > 120, 255, 0).astype(np.uint8)


def rows(found):
    return [(c.id, c.patient, c.role, c.has_label) for c in found.manifest.cases]


@pytest.mark.parametrize(
    ("make", "layout", "cases"),
    [
        (layouts.nnunet, "an nnU-Net raw data set", 3),
        (layouts.decathlon, "a Medical Segmentation Decathlon task", 2),
        (layouts.acdc, "ACDC as its publishers distribute it", 6),
        (layouts.acdc_h5, "ACDC as SSL4MIS's authors converted it", 8),
    ],
)
def test_layouts_with_a_name(tmp_path, make, layout, cases):
    """What is written is read back as the format itself reads it."""
    folder = make(tmp_path / "in")
    lines = write_index(folder, tmp_path / "m.json")
    assert layout in lines[0]
    native = index_folder(folder).manifest
    data = ManifestFile(path=str(tmp_path / "m.json"))
    manifest = data.manifest()
    assert len(manifest.cases) == cases
    assert (manifest.classes, manifest.official) == (native.classes, native.official)
    case = manifest.cases[0]
    assert data.read_image(case).shape[1:] == data.read_label(case).shape == SHAPE
    with pytest.raises(DataError, match="exists already"):
        write_index(folder, tmp_path / "m.json")


def test_volumes_in_two_folders(tmp_path):
    for number, name in enumerate(("p1_scan1", "p1_scan2", "p2_scan1")):
        save(tmp_path / "imagesTr" / f"{name}.nii.gz", volume(number)[0])
        if name != "p2_scan1":
            save(tmp_path / "labelsTr" / f"{name}_seg.nii.gz", volume(number)[1])
    (tmp_path / "imagesTr" / "notes.docx").write_text("x")
    save(tmp_path / "labelsTr" / "lost.nii.gz", volume(9)[1])
    found = index_folder(tmp_path, Choices(classes=("background", "liver", "tumour"), domain="here"))
    assert rows(found) == [
        ("p1_scan1", "p1", "train", True), ("p1_scan2", "p1", "train", True), ("p2_scan1", "p2", "train", False),
    ]  # fmt: skip
    assert found.manifest.cases[0].domain == "here"
    text = "\n".join(in_words(found))
    for said in (
        "3 cases of 2 patients, 3-D, 1 channel: 2 labelled, 1 without a label",
        "patients: 2 by name, such as p1 of p1_scan1",
        "left out: labelsTr/lost.nii.gz: a label whose image was not found",
        "left out: 1 files .docx",
        "no test: hold patients out",
        "spacing: 1 × 1 × 1 mm",
    ):
        assert said in text, text


def test_volumes_beside_their_labels(tmp_path):
    for number, name in enumerate("abc"):
        save(tmp_path / f"{name}.nii.gz", volume(number)[0])
        save(tmp_path / f"{name}_label.nii.gz", volume(number, 2)[1])
    found = index_folder(tmp_path, Choices(test=1))
    assert len(found.manifest.of_role("test")) == 1
    assert found.manifest.classes == ("background", "foreground")
    assert index_folder(tmp_path, Choices(test=1)).manifest == found.manifest
    with pytest.raises(SplitError, match="has 3 labelled patients"):
        index_folder(tmp_path, Choices(test=3))


def test_a_folder_per_case_with_channels(tmp_path):
    for number, name in enumerate(("BraTS_1", "BraTS_2", "BraTS_3", "BraTS_4")):
        for channel, ending in enumerate(("flair", "t1", "t2")):
            if (name, ending) != ("BraTS_4", "t2"):
                save(tmp_path / name / f"{name}_{ending}.nii.gz", volume(10 * number + channel)[0])
        if name != "BraTS_3":
            label = volume(number, 3)[1]
            save(tmp_path / name / f"{name}_seg.nii.gz", np.where(label == 2, 4, label).astype(np.uint8))
    found = index_folder(tmp_path)
    assert rows(found) == [
        ("BraTS_1", "BraTS_1", "train", True), ("BraTS_2", "BraTS_2", "train", True), ("BraTS_3", "BraTS_3", "train", False),
    ]  # fmt: skip
    assert found.manifest.channels == 3
    assert any("BraTS_4: has not the channels of the others (t2)" in line for line in found.left_out)
    assert "label values: 0 is background, 1 is class 1, 4 is class 4" in found.notes
    write_index(tmp_path, tmp_path / "m.json")
    data = ManifestFile(path=str(tmp_path / "m.json"))
    case = data.manifest().case("BraTS_2")
    assert np.array_equal(data.read_image(case), np.stack([volume(10 + c)[0] for c in range(3)]))
    assert np.array_equal(data.read_label(case), volume(1, 3)[1])


def test_a_folder_per_case_with_a_mask_per_structure(tmp_path):
    for number, name in enumerate(("s1", "s2")):
        save(tmp_path / name / "ct.nii.gz", volume(number)[0])
        for value, organ in enumerate(("spleen", "liver")):
            if (name, organ) != ("s2", "spleen"):
                mask = np.zeros(SHAPE, np.uint8)
                mask[value + number] = 1
                save(tmp_path / name / "segmentations" / f"{organ}.nii.gz", mask)
    write_index(tmp_path, tmp_path / "m.json", Choices(classes=("background", "spleen", "liver")))
    data = ManifestFile(path=str(tmp_path / "m.json"))
    manifest = data.manifest()
    assert [c.id for c in manifest.cases] == ["s1_ct", "s2_ct"]
    assert [int(v) for v in data.read_label(manifest.cases[0])[:, 0, 0]] == [1, 2, 0, 0, 0]
    assert [int(v) for v in data.read_label(manifest.cases[1])[:, 0, 0]] == [0, 0, 2, 0, 0]
    assert index_folder(tmp_path).manifest.classes == ("background", "liver", "spleen")
    assert index_folder(tmp_path, Choices(overlapping=True)).manifest.overlapping
    save(tmp_path / "one" / "a.nii.gz", volume()[0])
    save(tmp_path / "one" / "a_seg.nii.gz", volume()[1])
    with pytest.raises(DataError, match="overlapping structures need a mask each"):
        index_folder(tmp_path / "one", Choices(overlapping=True))
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(DataError, match="the mask 'liver' is named after none of the classes"):
        index_folder(tmp_path, Choices(classes=("background", "spleen")))


def test_pictures_in_parts(tmp_path):
    for part, names in (("train", ("a", "b", "c")), ("test", ("a", "z"))):
        for number, name in enumerate(names):
            picture(tmp_path / part / "images" / f"{name}.png", GREY + number)
            if name not in ("c", "z"):
                picture(tmp_path / part / "masks" / f"{name}_mask.png", MASK)
    found = index_folder(tmp_path)
    assert rows(found) == [
        ("test_a", "test_a", "test", True), ("train_a", "train_a", "train", True), ("b", "b", "train", True),
        ("c", "c", "train", False),
    ]  # fmt: skip
    assert "label values: 0 is background, 255 is foreground" in found.notes
    assert any("1 test or validation images without a label" in line for line in found.left_out)
    more = index_folder(tmp_path, Choices(unlabelled_tests=True))
    assert ("z", "z", "train", False) in rows(more)


def test_pictures_of_patients_in_folders(tmp_path):
    for name in ("anna", "ben"):
        for number in range(2):
            picture(tmp_path / name / f"{number}.png", GREY + number)
            picture(tmp_path / name / "gt" / f"{number}.png", np.minimum(MASK, 1) * (number + 1))
    found = index_folder(tmp_path)
    assert [(c.id, c.patient) for c in found.manifest.cases] == [
        ("anna_0", "anna"), ("anna_1", "anna"), ("ben_0", "ben"), ("ben_1", "ben"),
    ]  # fmt: skip
    assert found.manifest.classes == ("background", "class 1", "class 2")
    assert "patients: 2, one per folder (else give --patient-pattern)" in found.notes


@pytest.mark.parametrize(
    ("image", "label", "name", "role"),
    [
        ("volume-7.png", "segmentation-7.png", "7", "train"),
        (
            "Part1_Training_Data/ISIC_7.png",
            "Part1_GroundTruth/ISIC_7_segmentation.png",
            "Part1_Training_Data_ISIC_7",
            "train",
        ),
        ("imagesVa/amos_7.png", "labelsVa/amos_7.png", "amos_7", "validation"),
        ("case_7/imaging.png", "case_7/segmentation.png", "case_7", "train"),
        ("data/img_7.png", "data/mask_7.png", "7", "train"),
        ("train/x 7.png", "train_labels/x 7.png", "x_7", "train"),
        ("x_image.png", "x_label.png", "x", "train"),
        ("scans/site-a/7.png", "labels/site-a/7.png", "site-a_7", "train"),
    ],
)
def test_names_that_people_give(tmp_path, image, label, name, role):
    picture(tmp_path / image, GREY)
    picture(tmp_path / label, MASK)
    (case,) = pair(tmp_path).cases
    assert (case.id, case.role, len(case.images), len(case.labels)) == (name, role, 1, 1)


@pytest.mark.parametrize(
    ("stored", "choices", "classes", "values"),
    [
        ((0, 1, 2), {}, 3, ()),
        ((0, 1, 255), {}, 2, ()),
        ((0, 255), {}, 2, ((0, 0), (255, 1))),
        ((0, 128, 255), {}, 3, ((0, 0), (128, 1), (255, 2))),
        ((0, 128, 255), {"ignore": 128}, 2, ((0, 0), (255, 1), (128, 255))),
        ((0, 2), {"classes": ("background", "a", "b")}, 3, ()),
    ],
)
def test_what_label_values_stand_for(tmp_path, stored, choices, classes, values):
    picture(tmp_path / "images" / "a.png", GREY)
    label = np.resize(np.array(stored, np.uint8), GREY.shape)
    picture(tmp_path / "labels" / "a.png", label)
    manifest = index_folder(tmp_path, Choices(**choices)).manifest
    assert len(manifest.classes) == classes
    assert manifest.cases[0].label.values == values


def test_a_table_of_files(tmp_path):
    small(tmp_path, ("a", "b", "c"))
    table = tmp_path / "cells.csv"
    table.write_text(
        "image,label,patient,domain,role,age\n"
        "images/a.png,labels/a.png,anna,here,train,7\nimages/b.png,,anna,here,,8\nimages/c.png,labels/c.png,ben,there,test,9\n"
    )
    found = index_folder(table, Choices(classes=("background", "cell")))
    assert rows(found) == [("a", "anna", "train", True), ("b", "anna", "train", False), ("c", "ben", "test", True)]
    assert (found.manifest.name, found.manifest.cases[2].domain, found.left_out) == ("cells", "there", ("columns age",))
    assert found.manifest.cases[0].label.values == ((0, 0), (255, 1))
    for line, message in (
        ("images/z.png,,,,,", "line 2: .*z.png: no such file"),
        (",,,,,", "names no image"),
        ("images/a.png,,,,exam,", "role is 'exam'"),
    ):
        table.write_text(f"image,label,patient,domain,role,age\n{line}\n")
        with pytest.raises(DataError, match=message):
            index_folder(table)
    table.write_text("picture\na.png\n")
    with pytest.raises(DataError, match="needs a column image"):
        index_folder(table)


def test_what_is_not_understood_is_said(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        index_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no NIfTI files, PNG, TIFF or JPEG"):
        index_folder(tmp_path)
    picture(tmp_path / "labels" / "a.png", MASK)
    with pytest.raises(DataError, match="labels only"):
        index_folder(tmp_path)
    picture(tmp_path / "images" / "a.png", GREY)
    picture(tmp_path / "images" / "b.png", GREY)
    (tmp_path / "images" / "b.png").write_bytes(b"torn")
    picture(tmp_path / "images" / "c.png", GREY)
    picture(tmp_path / "labels" / "c.png", np.arange(96, dtype=np.uint8).reshape(8, 12))
    found = index_folder(tmp_path)
    assert [c.id for c in found.manifest.cases] == ["a"]
    assert any(line.startswith("case b: ") and "not a readable image" in line for line in found.left_out)
    assert any(line.startswith("case c: c.png holds 96 values") for line in found.left_out)
    with pytest.raises(DataError, match="name one class per value"):
        index_folder(tmp_path, Choices(classes=("background", "a", "b")))


def test_names_that_collide_are_not_lost(tmp_path):
    picture(tmp_path / "a.png", GREY)
    picture(tmp_path / "a.tif", GREY)
    picture(tmp_path / "a_mask.png", MASK)
    picture(tmp_path / "a_gt.png", MASK)
    found = pair(tmp_path)
    assert [case.id for case in found.cases] == ["a"]
    assert len(found.left_out) == 2


def small(folder, names, part="images", labelled=True):
    for number, name in enumerate(names):
        picture(folder / part / f"{name}.png", GREY + number)
        if labelled:
            picture(folder / "labels" / f"{name}.png", MASK)
    return folder


def test_cases_are_appended_and_none_leaves_the_test(tmp_path):
    path = tmp_path / "m.json"
    write_index(small(tmp_path / "one", ("p1_slice1", "p2_slice1", "p3_slice1")), path, Choices(test=1))
    before = read_manifest(path)
    tested = before.patients("test")[0]
    learnt = before.patients("train")[0]
    new = small(tmp_path / "two", (f"{tested}_slice2", f"{learnt}_slice2", "p9_slice1"))
    lines = add_folder(path, new)
    after = read_manifest(path)
    assert after.cases[: len(before.cases)] == before.cases
    assert after.case(f"{tested}_slice2").role == "test"
    assert after.case(f"{learnt}_slice2").role == "train"
    assert after.case("p9_slice1").label.values == ((0, 0), (255, 1))
    assert "1 cases are of a test patient: test" in lines
    assert "3 cases were there already" in add_folder(path, new)[-1]
    assert read_manifest(path) == after


def test_a_label_that_comes_later_is_taken_up(tmp_path):
    path = tmp_path / "m.json"
    folder = small(tmp_path / "one", ("a", "b"))
    small(folder, ("c",), labelled=False)
    write_index(folder, path)
    assert read_manifest(path).case("c").label is None
    picture(folder / "labels" / "c.png", MASK)
    assert "1 cases gained a label" in add_folder(path, folder)
    assert read_manifest(path).case("c").label.values == ((0, 0), (255, 1))


def test_what_cannot_be_added_is_said_and_nothing_is_changed(tmp_path):
    path = tmp_path / "m.json"
    write_index(small(tmp_path / "one", ("a", "b")), path)
    before = path.read_bytes()
    other = small(tmp_path / "two", ("a",))
    with pytest.raises(
        DataError, match=r"the case 'a' is there already, from .*one/images/a.png; tell them apart with --prefix"
    ):
        add_folder(path, other)
    small(tmp_path / "four" / "test", ("a_slice2",))
    with pytest.raises(SplitError, match="its patient 'a' is learnt from"):
        add_folder(path, tmp_path / "four")
    three = small(tmp_path / "three", ("x",))
    picture(three / "labels" / "x.png", np.minimum(MASK, 7))
    with pytest.raises(DataError, match="labels hold the value 7, which has no meaning"):
        add_folder(path, three)
    save(tmp_path / "five" / "images" / "v.nii.gz", volume()[0])
    with pytest.raises(DataError, match="its axes are 3"):
        add_folder(path, tmp_path / "five")
    assert path.read_bytes() == before
    add_folder(path, other, Choices(prefix="new_"))
    assert read_manifest(path).cases[-1].id == "new_a"


def test_the_command_line(tmp_path):
    folder = small(tmp_path / "tiles", ("a", "b", "c"))
    out = tmp_path / "m.json"
    done = CliRunner().invoke(
        app, ["index", str(folder), "--out", str(out), "--classes", "background,nucleus", "--test", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "classes: background, nucleus" in done.output
    assert len(json.loads(out.read_text())["cases"]) == 3
    more = CliRunner().invoke(app, ["add", str(out), str(small(tmp_path / "more", ("d",))), "--domain", "elsewhere"])
    assert more.exit_code == 0, more.output
    assert read_manifest(out).case("d").domain == "elsewhere"
    wrong = CliRunner().invoke(app, ["index", str(tmp_path / "nowhere")])
    assert (wrong.exit_code, "no such folder" in wrong.stderr) == (2, True)

"""SegTHOR, BTCV, NIH pancreas and the sets for pretraining as they are downloaded, with the papers' splits."""

import nibabel as nib
import numpy as np
import pytest

from labeleff import registry
from labeleff.data.formats import btcv, segthor
from labeleff.data.formats.btcv import Btcv
from labeleff.data.formats.nih_pancreas import NihPancreas
from labeleff.data.formats.prect import PreCt
from labeleff.data.formats.segthor import SegThor
from labeleff.data.recognise import Choices, index_folder
from labeleff.errors import DataError
from labeleff.recipe_io import load_recipe

from . import layouts
from .layouts import AFFINES, save, volume


def roles(manifest):
    return {case.id: case.role for case in manifest.cases}


def test_segthor(tmp_path):
    data = SegThor(path=str(layouts.segthor(tmp_path)))
    manifest = data.manifest()
    assert roles(manifest) == {
        "Patient_01": "train", "Patient_08": "test", "Patient_21": "validation", "Patient_27": "test", "Patient_40": "train",
    }  # fmt: skip
    assert manifest.classes == ("background", "oesophagus", "heart", "trachea", "aorta")
    assert manifest.official == ("Patient_01", "Patient_40")
    assert np.array_equal(data.read_label(manifest.case("Patient_21")), volume(21, 5)[1])
    assert data.notes == [
        "1 images of the challenge's test have no label: left out (the option unlabelled_tests learns from them)"
    ]
    more = SegThor(path=str(tmp_path), unlabelled_tests=True).manifest().case("Patient_41")
    assert (more.role, more.label) == ("train", None)
    (tmp_path / "train" / "Patient_21" / "GT.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'Patient_21': .*GT\.nii\.gz: the label is missing"):
        data.manifest()


def test_the_split_of_segthor_names_every_patient_once():
    """31, 5 and 5 in the README of ADELE's authors, patient 27 twice: of 40 patients, 4 are left to validate."""
    parts = (segthor.TRAIN, segthor.VALIDATION, segthor.TEST)
    assert [len(part) for part in parts] == [31, 4, 5]
    assert sorted(number for part in parts for number in part) == list(range(1, 41))


@pytest.mark.parametrize("renamed", [False, True])
def test_btcv(tmp_path, renamed):
    layouts.btcv(tmp_path)
    if renamed:  # as MONAI's tutorials have it
        for old, new in (("Training/img", "imagesTr"), ("Training/label", "labelsTr"), ("Testing/img", "imagesTs")):
            (tmp_path / "RawData" / old).rename(tmp_path / new)
    data = Btcv(path=str(tmp_path))
    manifest = data.manifest()
    assert roles(manifest) == {"img0001": "train", "img0034": "train", "img0035": "test"}
    assert len(manifest.classes) == 14
    assert (manifest.classes[5], manifest.classes[11]) == ("oesophagus", "pancreas")
    assert np.array_equal(data.read_label(manifest.case("img0034")), volume(34, 14)[1])
    more = Btcv(path=str(tmp_path), unlabelled_tests=True).manifest().case("img0061")
    assert (more.role, more.label) == ("train", None)
    next(tmp_path.rglob("label0034.nii.gz")).unlink()
    with pytest.raises(DataError, match=r"case 'img0034': there is no label0034\.nii\.gz"):
        data.manifest()
    assert sorted((*btcv.TRAIN, *btcv.TEST)) == [*range(1, 11), *range(21, 41)]


def test_nih_pancreas(tmp_path):
    data = NihPancreas(path=str(layouts.nih_pancreas(tmp_path)))
    manifest = data.manifest()
    assert roles(manifest) == {
        "PANCREAS_0001": "train", "PANCREAS_0002": "train", "PANCREAS_0063": "train",
        "PANCREAS_0064": "test", "PANCREAS_0082": "test",
    }  # fmt: skip
    assert manifest.official == ("PANCREAS_0001", "PANCREAS_0002", "PANCREAS_0063")
    assert data.notes == ["left out, since TCIA has taken them back as copies: 25"]
    assert np.array_equal(data.read_label(manifest.case("PANCREAS_0063")), volume(63, 2)[1])
    for number in (2, 64):
        next(tmp_path.rglob(f"label{number:04d}.nii.gz")).unlink()
    manifest = data.manifest()
    assert manifest.case("PANCREAS_0002").label is None
    assert "PANCREAS_0064" not in roles(manifest)
    save(tmp_path / "again" / "image_0001.nii.gz", volume(1)[0])
    with pytest.raises(DataError, match=r"PANCREAS_0001\.nii\.gz: has the number of .*image_0001\.nii\.gz"):
        data.manifest()


def test_labels_that_follow_the_series_of_the_pancreas(tmp_path):
    """The label file counts to the left, the back and upwards, whatever its header says; the image may be turned any way."""
    as_series = np.diag([-1.0, -1, 1, 1])
    for name, matrix in AFFINES.items():
        folder = tmp_path / name.replace(" ", "")
        image = nib.load(save(folder / "PANCREAS_0001.nii.gz", volume(1)[0], matrix))
        upright = nib.as_closest_canonical(image)
        seen = np.asarray(upright.dataobj)  # right, front, up
        x, y, z = seen.shape
        label = np.array(
            [[[seen[x - 1 - i, y - 1 - j, k] > 100 for k in range(z)] for j in range(y)] for i in range(x)], np.uint8
        )
        save(folder / "label0001.nii.gz", label, as_series if name == "plain" else AFFINES["permuted"])
        data = NihPancreas(path=str(folder), labels="series")
        case = data.manifest().cases[0]
        assert np.array_equal(data.read_image(case)[0], seen)
        assert np.array_equal(data.read_label(case), seen > 100)
        data = NihPancreas(path=str(folder))
        if name not in ("permuted",):
            with pytest.raises(DataError, match=r"case 'PANCREAS_0001': .* set data\.dataset\.labels=series"):
                data.read_label(data.manifest().cases[0])
    with pytest.raises(ValueError, match="give header or series"):
        NihPancreas(path=".", labels="voxels")


def test_sets_for_pretraining_side_by_side(tmp_path):
    data = PreCt(path=str(layouts.prect(tmp_path)))
    manifest = data.manifest()
    assert [(case.id, case.domain) for case in manifest.cases] == [
        ("BTCV_RawData_Testing_img_img0061", "BTCV"),
        ("BTCV_RawData_Training_img_img0001", "BTCV"),
        ("BTCV_RawData_Training_img_img0034", "BTCV"),
        ("BTCV_RawData_Training_img_img0035", "BTCV"),
        ("Totalsegmentator_dataset_s0001_ct", "Totalsegmentator_dataset"),
        ("stoic21_data_17", "stoic21"),
    ]
    assert all(case.label is None and case.role == "train" for case in manifest.cases)
    assert data.notes == ["1 volumes have a fourth axis: left out"]
    assert np.array_equal(data.read_image(manifest.case("stoic21_data_17"))[0], volume(72)[0])
    some = PreCt(path=str(tmp_path), sets=("BTCV",), exclude=("img/img003[5-9].nii.gz", "BTCV/RawData/Testing/*/*"))
    assert [case.id[-7:] for case in some.manifest().cases] == ["img0001", "img0034"]
    with pytest.raises(DataError, match="exclude names img9999"):
        PreCt(path=str(tmp_path), exclude=("img9999*",)).manifest()
    with pytest.raises(DataError, match=r"LUNA16: no volumes; data\.dataset\.sets names it"):
        PreCt(path=str(tmp_path), sets=("LUNA16",)).manifest()


@pytest.mark.parametrize("kind", [SegThor, Btcv, NihPancreas, PreCt])
def test_an_empty_download_is_refused_in_one_line(tmp_path, kind):
    with pytest.raises(DataError, match="no volumes; expected") as found:
        kind(path=str(tmp_path)).manifest()
    assert "\n" not in str(found.value)


def test_held_out_patients_of_sites_are_the_formats(tmp_path):
    found = index_folder(layouts.prostate(tmp_path), Choices(test=1))
    assert [case.id for case in found.manifest.of_role("test")] == ["BMC_Case02", "RUNMC_Case02"]
    assert {case.domain for case in found.manifest.cases} == {"RUNMC", "BMC"}


@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        ("bcp_acdc", layouts.acdc_h5),
        ("glcl_acdc", layouts.acdc),
        ("bcp_left_atrium", layouts.left_atrium_h5),
        ("adele_segthor_schedule", layouts.segthor),
        ("umct_pancreas_10", layouts.nih_pancreas),
        ("umct_pancreas_20", layouts.nih_pancreas),
        ("voco_b", layouts.prect),
    ],
)
def test_recipes_of_papers_read_the_downloads(tmp_path, monkeypatch, recipe, make):
    """What a recipe names is found below LABELEFF_DATA, with the recipe's own options."""
    dataset = load_recipe(f"paper/{recipe}").data.dataset
    make(tmp_path / dataset.options["path"])
    monkeypatch.setenv("LABELEFF_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    manifest = registry.build("dataset", dataset.name, **dataset.options).manifest()
    assert manifest.of_role("train")
    assert bool(manifest.of_role("test")) == (dataset.name != "prect")

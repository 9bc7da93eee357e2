"""Volumes of several sites in their publishers' layouts, generated small."""

import nibabel as nib
import numpy as np
import pytest

from labeleff.data.formats.ivdm3seg import Discs
from labeleff.data.formats.mmwhs import WholeHeart
from labeleff.data.formats.prostate import Prostate
from labeleff.errors import DataError

AFFINE = np.diag([-0.5, -0.5, 3.0, 1.0])  # the first two axes run the other way
SHAPE = (4, 5, 3)


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def image(seed=0):
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def stored(*values):
    """Return a label volume that begins with some values."""
    label = np.zeros(SHAPE, np.int16)
    label.reshape(-1)[: len(values)] = values
    return label


@pytest.fixture
def prostate(tmp_path):
    for site, suffix in (("RUNMC", "segmentation"), ("BMC", "Segmentation")):
        for number in range(3):
            save(tmp_path / site / f"Case{number:02d}.nii.gz", image(number))
            save(tmp_path / site / f"Case{number:02d}_{suffix}.nii.gz", stored(0, 1, 2))
    return tmp_path


def test_prostate(prostate):
    data = Prostate(path=str(prostate), test=1)
    manifest = data.manifest()
    assert [(c.id, c.domain, c.role) for c in manifest.cases] == [
        ("BMC_Case00", "BMC", "train"),
        ("BMC_Case01", "BMC", "train"),
        ("BMC_Case02", "BMC", "test"),
        ("RUNMC_Case00", "RUNMC", "train"),
        ("RUNMC_Case01", "RUNMC", "train"),
        ("RUNMC_Case02", "RUNMC", "test"),
    ]
    case = manifest.case("RUNMC_Case01")
    assert case.spacing == (0.5, 0.5, 3.0)
    assert np.array_equal(data.read_image(case)[0], image(1)[::-1, ::-1])
    assert np.array_equal(data.read_label(case), stored(0, 1, 1)[::-1, ::-1])
    assert {c.domain for c in Prostate(path=str(prostate), sites=("BMC",), test=1).manifest().cases} == {"BMC"}


def test_prostate_errors(prostate):
    with pytest.raises(DataError, match="BMC has 3 patients, of which test: 10 leaves none"):
        Prostate(path=str(prostate)).manifest()
    with pytest.raises(DataError, match="UCL: no volumes"):
        Prostate(path=str(prostate), sites=("UCL",)).manifest()
    data = Prostate(path=str(prostate), test=1)
    case = data.manifest().case("BMC_Case00")
    save(case.label.path, stored(0, 3))
    with pytest.raises(DataError, match=r"case 'BMC_Case00': .* label value 3 is unknown; .* 0, 1, 2"):
        data.read_label(case)
    save(case.label.path, stored(0, 1), np.diag([0.5, 0.5, 2.0, 1.0]))
    with pytest.raises(DataError, match="geometry"):
        data.read_label(case)
    case.label.path.unlink()
    with pytest.raises(DataError, match=r"Case00\.nii\.gz: Case00_segmentation\.nii\.gz is missing"):
        data.manifest()
    (prostate / "empty").mkdir()
    with pytest.raises(DataError, match="no volumes; expected a folder per site"):
        Prostate(path=str(prostate / "empty")).manifest()
    with pytest.raises(ValueError, match="test is a number"):
        Prostate(path=".", test=-1)


@pytest.fixture
def hearts(tmp_path):
    for domain in ("ct", "mr"):
        for number in (1001, 1002):
            name = tmp_path / f"{domain}_train" / f"{domain}_train_{number}"
            save(name.with_name(name.name + "_image.nii.gz"), image(number))
            save(name.with_name(name.name + "_label.nii.gz"), stored(0, 205, 420, 500, 550, 600, 820, 850, 421))
    return tmp_path


@pytest.mark.parametrize(
    ("structures", "classes", "expected"),
    [("four", 5, [0, 1, 2, 3, 0, 0, 4, 0, 2]), ("seven", 8, [0, 1, 2, 3, 5, 6, 4, 7, 2])],
)
def test_mmwhs(hearts, structures, classes, expected):
    data = WholeHeart(path=str(hearts), structures=structures, test=1)
    manifest = data.manifest()
    assert [(c.id, c.domain, c.role) for c in manifest.cases] == [
        ("ct_train_1001", "ct", "train"),
        ("ct_train_1002", "ct", "test"),
        ("mr_train_1001", "mr", "train"),
        ("mr_train_1002", "mr", "test"),
    ]
    assert len(manifest.classes) == classes
    assert manifest.classes[1:5] == ("myocardium", "left atrium", "left ventricle", "ascending aorta")
    label = data.read_label(manifest.cases[0])
    assert label[::-1, ::-1].reshape(-1)[: len(expected)].tolist() == expected


def test_mmwhs_errors(hearts):
    (hearts / "mr_train" / "mr_train_1002_label.nii.gz").unlink()
    with pytest.raises(DataError, match=r"there is no mr_train_1002_label\.nii\.gz"):
        WholeHeart(path=str(hearts), test=1).manifest()
    (hearts / "ct_train" / "ct_train_1001_image.nii.gz").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"case 'ct_train_1001': .* not a readable NIfTI"):
        WholeHeart(path=str(hearts), test=1).manifest()
    (hearts / "other").mkdir()
    with pytest.raises(DataError, match="no volumes"):
        WholeHeart(path=str(hearts / "other")).manifest()


@pytest.fixture
def discs(tmp_path):
    for number in ("01", "02", "03"):
        for contrast in ("wat", "inn", "opp", "fat"):
            save(tmp_path / "training" / number / f"{number}_{contrast}.nii", image(int(number)))
        save(tmp_path / "training" / "labels" / f"{number}_Labels.nii", stored(0, 1, 1))
    return tmp_path


def test_ivdm3seg(discs):
    data = Discs(path=str(discs), test=1)
    manifest = data.manifest()
    assert [(c.id, c.patient, c.domain, c.role) for c in manifest.cases] == [
        ("01_inn", "01", "inn", "train"),
        ("02_inn", "02", "inn", "train"),
        ("03_inn", "03", "inn", "test"),
        ("01_wat", "01", "wat", "train"),
        ("02_wat", "02", "wat", "train"),
        ("03_wat", "03", "wat", "test"),
    ]
    assert data.read_label(manifest.case("01_wat")).sum() == 2
    every = Discs(path=str(discs), contrasts=("fat", "opp"), test=1).manifest()
    assert {c.domain for c in every.cases} == {"fat", "opp"}


def test_ivdm3seg_errors(discs):
    (discs / "training" / "02" / "02_inn.nii").unlink()
    with pytest.raises(DataError, match=r"acquisition 02 has no 02_inn\.nii"):
        Discs(path=str(discs), test=1).manifest()
    (discs / "other").mkdir()
    with pytest.raises(DataError, match="no volumes"):
        Discs(path=str(discs / "other")).manifest()
    with pytest.raises(ValueError, match="name some of wat, inn, opp, fat"):
        Discs(path=".", contrasts=("T1",))

"""Two-site phantoms and nuclei: domains, roles and what sets the domains apart."""

import csv

import numpy as np
import pytest

from labeleff.data import phantom, sites
from labeleff.data.formats.nuclei import Nuclei
from labeleff.data.formats.phantom import Phantom
from labeleff.data.formats.phantom_sites import PhantomSites
from labeleff.errors import DataError, SplitError

NONE = sites.Shift()


@pytest.mark.parametrize("shape", [(40, 48), (16, 24, 24)])
def test_without_a_shift_a_patient_is_the_phantom_s(shape):
    for ours, theirs in zip(
        sites.generate(5, 3, shape=shape, shift=NONE), phantom.generate(5, 3, shape=shape), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_the_source_is_the_phantom_data_set():
    options = {"patients": 2, "test": 1, "size": (32, 32), "slices": 2, "seed": 3}
    one, two = PhantomSites(**options), Phantom(**options)
    for mine, theirs in zip(one.manifest().cases[:6], two.manifest().cases, strict=True):
        assert np.array_equal(one.read_image(mine), two.read_image(theirs))
        assert np.array_equal(one.read_label(mine), two.read_label(theirs))
        assert mine.spacing == theirs.spacing == (5.0, 5.0)


def pair(shift, shape=(64, 64), patients=4):
    """Return images and labels of the same patients without and with a shift, [2, n, *shape] each."""
    found = [[sites.generate(9, p, shape=shape, shift=s, height=0.1) for p in range(patients)] for s in (NONE, shift)]
    images = np.array([[image for image, _ in row] for row in found], float)
    return images, np.array([[label for _, label in row] for row in found])


def test_contrast_of_all_or_of_one_organ():
    plain, labels = pair(sites.Shift(contrast=-1.0))
    halved, _ = pair(sites.Shift(contrast=0.5))
    small, own = pair(sites.Shift(inverted=("small",)))
    assert np.array_equal(labels[0], labels[1])
    assert np.array_equal(own[0], own[1])
    for patient, label in enumerate(labels[0]):
        # grey values are 255 (v + 4) / 8, so two contrasts differ by a multiple of the organ's one intensity
        signal = (plain[0, patient] - plain[1, patient]) / 2
        for organ, sign in ((1, 1), (2, 1), (3, -1)):
            values = signal[label == organ]
            assert np.ptp(values) <= 1.0
            assert np.sign(values.mean()) == sign
        inside = label > 0
        assert np.abs(plain[0, patient] - halved[1, patient] - signal / 2)[inside].max() <= 1.5
        assert np.array_equal(small[1, patient][label != 3], small[0, patient][label != 3])
        assert np.abs(small[1, patient] - plain[1, patient])[label == 3].max() == 0


def test_noise_and_blur_alone():
    images, labels = pair(sites.Shift(noise=0.7))
    assert np.array_equal(labels[0], labels[1])
    steps = np.diff(images, axis=-1).std((1, 2, 3))
    assert steps[1] > 1.5 * steps[0]
    quiet, _ = pair(sites.Shift(noise=0.0))
    soft, labels = pair(sites.Shift(noise=0.0, blur=1.5))
    assert np.array_equal(labels[0], labels[1])
    assert np.diff(soft[1], axis=-1).std() < 0.8 * np.diff(quiet[1], axis=-1).std()


def test_gamma_alone():
    images, labels = pair(sites.Shift(gamma=2.0))
    assert np.array_equal(labels[0], labels[1])
    # both are rounded to whole grey values: half of one, times the slope of the curve of at most 2, plus half of one
    assert np.abs(images[1] - 255 * (images[0] / 255) ** 2).max() <= 1.51


def test_organs_of_another_size():
    _, labels = pair(sites.Shift(organs=0.8), shape=(24, 48, 48))
    for organ in (1, 2, 3):
        # about 0.8^3 of the volume: the wavy surface is scaled with the organ but for its ripples
        assert (labels[1] == organ).sum() / (labels[0] == organ).sum() == pytest.approx(0.8**3, abs=0.12)


@pytest.mark.parametrize(("ndim", "images"), [(2, 2), (3, 1)])
def test_both_domains_have_patients_of_both_roles(ndim, images):
    data = PhantomSites(patients=3, test=2, ndim=ndim, slices=2, size=(16,) * ndim)
    manifest = data.manifest()
    for domain in ("source", "target"):
        for role, count in (("train", 3), ("test", 2)):
            own = [c for c in manifest.of_role(role) if c.domain == domain]
            assert len(own) == count * images
            assert len({c.patient for c in own}) == count
    again = PhantomSites(patients=3, test=2, ndim=ndim, slices=2, size=(16,) * ndim)
    case = manifest.cases[-1]
    assert case.domain == "target"
    assert np.array_equal(data.read_image(case), again.read_image(case))
    assert data.read_image(case).shape == (1, *data.read_label(case).shape)


def test_nobody_is_at_both_sites():
    off = {"contrast": 1.0, "gamma": 1.0, "noise": 0.35, "blur": 0.0, "organs": 1.0, "inverted": ()}
    data = PhantomSites(patients=1, test=1, size=(32, 32), slices=1, **off)
    cases = data.manifest().cases
    images = [data.read_image(case).tobytes() for case in cases]
    assert len(set(images)) == len(cases) == 4


def test_a_shift_changes_the_target_alone():
    one, two = (PhantomSites(patients=1, test=1, size=(16, 16), slices=1, blur=blur) for blur in (0.0, 1.0))
    for case in one.manifest().cases:
        assert (one.fingerprint(case) == two.fingerprint(case)) == (case.domain == "source")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ndim": 4}, "ndim is 2 or 3"),
        ({"inverted": ("liver",)}, "inverted names 'liver'; organs are large, paired, small"),
        ({"contrast": 0.0}, "contrast is not 0"),
        ({"gamma": 0.0}, "gamma above 0"),
        ({"organs": 9.0}, r"organs in \[0.2, 2\]"),
        ({"size": (4, 4)}, "at least 8 voxels"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PhantomSites(**options)


@pytest.fixture
def tiles(tmp_path):
    rows = [("a", "fluo_256", "train", "g1"), ("b", "fluo_256", "val", "g2"), ("c", "stain_white_bg", "test", "g3")]
    write_index(tmp_path, rows)
    for index, (name, *_) in enumerate(rows):
        image = np.full((8, 8), 10 * index, np.uint8)
        np.savez(tmp_path / f"{name}.npz", image=image, label=np.eye(8, dtype=np.uint8))
    return tmp_path


def write_index(folder, rows, head=("id", "domain", "split", "group")):
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def test_nuclei(tiles):
    data = Nuclei(path=str(tiles))
    manifest = data.manifest()
    assert [(c.id, c.patient, c.domain, c.role) for c in manifest.cases] == [
        ("a", "g1", "fluo_256", "train"),
        ("b", "g2", "fluo_256", "validation"),
        ("c", "g3", "stain_white_bg", "test"),
    ]
    assert (manifest.name, manifest.classes, manifest.axes) == ("nuclei", ("background", "nucleus"), 2)
    assert np.array_equal(data.read_image(manifest.case("c")), np.full((1, 8, 8), 20))
    assert np.array_equal(data.read_label(manifest.case("c")), np.eye(8))


def test_nuclei_errors(tiles):
    data = Nuclei(path=str(tiles))
    write_index(tiles, [("a", "x", "train", "g1"), ("b", "y", "train", "g1")])
    with pytest.raises(DataError, match=r"group 'g1' is of the domains 'x' and 'y' \(case 'b'\)"):
        data.manifest()
    write_index(tiles, [("a", "x", "train", "g1"), ("b", "x", "test", "g1")])
    with pytest.raises(SplitError, match="patient 'g1' is in train"):
        data.manifest()
    write_index(tiles, [("a", "x", "learn", "g1")])
    with pytest.raises(DataError, match=r"index\.csv: column or split 'learn'"):
        data.manifest()
    write_index(tiles, [("a", "x", "train", "g1"), ("d", "x", "train", "g4")])
    with pytest.raises(DataError, match=r"case 'd': .*d\.npz: listed in index\.csv"):
        data.manifest()
    (tiles / "index.csv").unlink()
    with pytest.raises(DataError, match=r"index\.csv is missing"):
        data.manifest()


def test_real_nuclei(real_data):
    if not (real_data / "nuclei_128").is_dir():
        pytest.skip("the folder nuclei_128 is not there")
    data = Nuclei()
    manifest = data.manifest()
    assert len(manifest.cases) == 664
    counts = {d: sum(c.domain == d for c in manifest.of_role("train")) for d in ("fluo_256", "stain_purple_bg")}
    assert counts == {"fluo_256": 201, "stain_purple_bg": 45}
    case = next(c for c in manifest.of_role("test") if c.domain == "stain_white_bg")
    assert data.read_image(case).shape == (1, 128, 128)
    assert set(np.unique(data.read_label(case))) == {0, 1}

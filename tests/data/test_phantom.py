"""Generated patients: repeatable, alike between patients, and hard enough to need labels."""

import numpy as np
import pytest

from labeleff.data import phantom
from labeleff.data.formats.phantom import Phantom


def test_a_patient_is_a_function_of_its_arguments():
    one = phantom.generate(1, 2, shape=(48, 48), height=0.1)
    two = phantom.generate(1, 2, shape=(48, 48), height=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    for changed in (
        phantom.generate(1, 3, shape=(48, 48), height=0.1),
        phantom.generate(2, 2, shape=(48, 48), height=0.1),
    ):
        assert not np.array_equal(one[0], changed[0])


def test_slices_are_those_of_the_volume():
    _, volume = phantom.generate(5, 0, shape=(32, 48, 48))
    _, piece = phantom.generate(5, 0, shape=(48, 48), height=(16 + 0.5) / 32 * 2 - 1)
    assert np.array_equal(volume[16], piece)


@pytest.mark.parametrize("shape", [(64, 64), (32, 48, 48)])
def test_every_organ_is_there_and_no_other_value(shape):
    for patient in range(6):
        image, label = phantom.generate(7, patient, shape=shape)
        assert image.shape == label.shape == shape
        assert image.dtype == label.dtype == np.uint8
        assert set(np.unique(label)) == {0, 1, 2, 3}


def test_anatomy_is_consistent():
    """The large organ lies on one side of the small one in every patient, and the paired one has two parts."""
    from scipy import ndimage

    for patient in range(12):
        _, label = phantom.generate(11, patient, shape=(48, 64, 64))
        centres = ndimage.center_of_mass(np.ones(label.shape), label, [1, 3])
        assert centres[0][2] > centres[1][2]
        _, parts = ndimage.label(label == 2)
        assert parts >= 2


def test_intensity_alone_does_not_tell_organs_from_distractors():
    """Outside every organ there are voxels as bright as the organ: position is needed."""
    overlap = []
    for patient in range(8):
        image, label = phantom.generate(3, patient, shape=(96, 96))
        low = np.percentile(image[label == 1], 25)
        overlap.append((image[(label == 0) & (image > 60)] > low).mean())
    assert np.mean(overlap) > 0.03


def test_sites_look_different_and_share_the_anatomy():
    images = [phantom.generate(1, 0, shape=(64, 64), site=site) for site in range(len(phantom.SITES))]
    assert all(np.array_equal(images[0][1], label) for _, label in images)
    for image, _ in images[1:]:
        assert not np.array_equal(images[0][0], image)


def test_as_a_data_set():
    data = Phantom(patients=4, test=2, slices=3, sites=2, size=(32, 40))
    manifest = data.manifest()
    assert len(manifest.cases) == 18
    assert {case.domain for case in manifest.cases} == {"site0", "site1"}
    case = manifest.cases[4]
    assert data.read_image(case).shape == (1, 32, 40)
    assert data.read_label(case).shape == (32, 40)
    assert case.spacing == (5.0, 4.0)
    for options in ({"ndim": 4}, {"patients": 0}, {"size": (4, 4)}, {"sites": 9}):
        with pytest.raises(ValueError, match=r"ndim is 2 or 3|lengths of at least 8"):
            Phantom(**options)


@pytest.mark.parametrize("options", [{"size": (64, 64), "slices": 2}, {"ndim": 3, "size": (24, 48, 48)}])
def test_raters_draw_the_same_organs_with_borders_of_their_own(options):
    data = Phantom(patients=3, test=1, raters=3, **options)
    case, other = data.manifest().cases[0], data.manifest().cases[1]
    votes, truth = data.read_votes(case), data.read_label(case)
    assert np.array_equal(votes, data.read_votes(case))
    assert votes.shape == (3, *truth.shape)
    assert np.array_equal(truth, Phantom(patients=3, test=1, **options).read_label(case))
    for value in (1, 2, 3):
        for own in votes:
            overlap = 2 * ((own == value) & (truth == value)).sum() / ((own == value).sum() + (truth == value).sum())
            assert 0.6 < overlap < 0.99
    moved = [own != truth for own in (*votes, *data.read_votes(other))]
    assert not any(np.array_equal(a, b) for i, a in enumerate(moved) for b in moved[:i])

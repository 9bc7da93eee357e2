"""Priors: shares of the image from anatomical sizes, tables, the source, and (marked) the truth."""

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.data.priors.base import Known, checked
from labeleff.errors import DataError, RecipeError
from labeleff.registry import build

CLASSES = ("background", "liver", "cyst")


def disc(liver, cyst, size=(10, 20)):
    """Return a label map with so many voxels of each class."""
    label = np.zeros(size, np.uint8)
    label.flat[:liver] = 1
    label.flat[liver : liver + cyst] = 2
    return label


def known(slice_axis=None, shape=(10, 20), spacing=(2.0, 0.5), labels=None, hidden=None):
    labels = {"s0": disc(40, 10), "s1": disc(20, 0)} if labels is None else labels
    hidden = {"t0": disc(30, 4), "t1": disc(50, 0)} if hidden is None else hidden
    images = {name: np.full((1, *shape), np.float32(i)) for i, name in enumerate([*labels, *hidden])}
    return Known(
        classes=CLASSES,
        cases=tuple(hidden),
        slice_axis=slice_axis,
        shape=lambda case: shape,
        spacing=lambda case: spacing,
        image=images.__getitem__,
        budget=lambda: iter(labels.items()),
        truth=hidden.__getitem__,
    )


def ratios(name, where=None, **options):
    where = known() if where is None else where
    return checked(build("prior", name, **options).ratios(where), where)


@pytest.mark.parametrize(
    ("unit", "sizes"),
    [
        ("ratio", {"liver": 0.1, "cyst": 0.02}),
        ("voxels", {"liver": 20, "cyst": 4}),
        ("mm2", {"liver": 20, "cyst": 4}),  # a pixel is 1 mm²
    ],
)
def test_constant_sizes_in_every_unit(unit, sizes):
    found = ratios("constant", unit=unit, sizes=sizes)
    np.testing.assert_allclose(found["t0"], [[0.88, 0.1, 0.02]])
    np.testing.assert_allclose(found["t1"], found["t0"])


def test_millilitres_of_volumes():
    volume = known(shape=(10, 20, 5), spacing=(3.0, 1.0, 2.0), hidden={"v": np.zeros((10, 20, 5), np.uint8)})
    # the case has 1,000 voxels of 6 mm³: 6 ml
    found = ratios("constant", volume, unit="ml", sizes={"liver": 1.5, "cyst": 0.3}, factor=2.0)
    np.testing.assert_allclose(found["v"], [[0.4, 0.5, 0.1]])
    with pytest.raises(DataError, match=r"unit is ml, but the prior is of 2-D images; use mm2"):
        ratios("constant", unit="ml", sizes={"liver": 1.5, "cyst": 0.3})
    with pytest.raises(DataError, match="the voxel size is not known"):
        ratios("constant", known(spacing=(1.0, float("nan"))), unit="mm2", sizes={"liver": 1.5, "cyst": 0.3})


def test_tags_say_which_classes_are_present(tmp_path):
    sizes = {"liver": 0.2, "cyst": 0.05}
    by_truth = ratios("constant", sizes=sizes, tags="truth")
    np.testing.assert_allclose(by_truth["t0"], [[0.75, 0.2, 0.05]])
    np.testing.assert_allclose(by_truth["t1"], [[0.8, 0.2, 0.0]])
    table = tmp_path / "tags.csv"
    table.write_text("case,liver,cyst\nt0,1,1\nt1,1,0\n")
    by_file = ratios("constant", sizes=sizes, tags=str(table))
    assert all(np.array_equal(by_file[case], by_truth[case]) for case in by_truth)
    assert "was told for every unlabelled image" in build("prior", "constant", sizes=sizes, tags="truth").mark
    assert build("prior", "constant", sizes=sizes).mark == ""


def test_slices_of_volumes_have_rows_of_their_own(tmp_path):
    volume = np.stack([disc(30, 4), disc(0, 0), disc(50, 0)])
    seen = known(slice_axis=0, shape=(3, 10, 20), spacing=(5.0, 2.0, 0.5), hidden={"v": volume})
    found = ratios("constant", seen, sizes={"liver": 20, "cyst": 4}, unit="mm2", tags="truth")
    np.testing.assert_allclose(found["v"], [[0.88, 0.1, 0.02], [1, 0, 0], [0.9, 0.1, 0]])
    table = tmp_path / "sizes.csv"
    table.write_text("case,slice,liver,cyst\nv,0,30,4\nv,1,0,0\nv,2,50,0\n")
    read = ratios("table", seen, path=str(table), unit="voxels")
    true = ratios("true_size", seen, upper_bound=True)
    np.testing.assert_allclose(read["v"], true["v"])
    np.testing.assert_allclose(true["v"], [[0.83, 0.15, 0.02], [1, 0, 0], [0.75, 0.25, 0]])


def test_tables_are_normalised_or_as_the_authors_leave_them(tmp_path):
    table = tmp_path / "sizes.csv"
    table.write_text("case,background,liver,cyst\nt0,160,40,1\nt1,100,100,0\n")
    np.testing.assert_allclose(ratios("table", path=str(table), unit="voxels")["t0"], [[160 / 201, 40 / 201, 1 / 201]])
    plain = ratios("table", path=str(table), unit="voxels", renormalise=False)
    np.testing.assert_allclose(plain["t0"], [[0.8, 0.2, 0.005]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,liver\nt0,1\n", "no column 'cyst'"),
        ("case,liver,cyst\nt0,1,1\n", "no row for case 't1'"),
        ("case,liver,cyst\nt0,1,-1\nt1,1,1\n", "line 2: every class needs a number of at least 0"),
        ("case,liver,cyst\nt0,1,x\nt1,1,1\n", "line 2: a value is no number"),
        ("case,liver,cyst\nt0,1,1\nt0,1,1\nt1,1,1\n", "line 3: case 't0' stands there twice"),
        ("case,liver,cyst\nt0,199,9\nt1,1,1\n", r"t0': the classes together take 104% of the image"),
        ("case,background,liver,cyst\nt0,100,9,1\nt1,198,1,1\n", r"sums to 0\.5500 of the image"),
        ("", "no column 'case'"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, message):
    table = tmp_path / "sizes.csv"
    table.write_text(content)
    with pytest.raises(DataError, match=message):
        ratios("table", path=str(table), unit="voxels")


def test_sizes_of_the_source_are_means_over_images_that_hold_the_class():
    # liver: 40 and 20 of 200 pixels; the cyst: 10 of 200, in one image
    np.testing.assert_allclose(ratios("source_mean")["t0"], [[1 - 0.15 - 0.05, 0.15, 0.05]])
    # target pixels are half as large: the same mm² are twice the share... of an image of as many pixels
    small = known(spacing=(1.0, 0.5))
    small = Known(**{**small.__dict__, "spacing": lambda case: (2.0, 0.5) if case.startswith("s") else (1.0, 0.5)})
    np.testing.assert_allclose(ratios("source_mean", small)["t0"], [[1 - 0.3 - 0.1, 0.3, 0.1]])
    with pytest.raises(DataError, match="no labelled image holds 'cyst'"):
        ratios("source_mean", known(labels={"s0": disc(10, 0)}))


def test_the_regressor_learns_sizes_from_looks():
    """A bright liver of many sizes: the share is in the quantiles of the image."""
    generator = np.random.default_rng(0)
    labels = {f"s{i}": disc(int(generator.integers(10, 150)), 0) for i in range(40)}
    hidden = {f"t{i}": disc(int(n), 0) for i, n in enumerate((30, 70, 110))}
    base = known(labels=labels, hidden=hidden)
    looks = {
        k: v[None].astype(np.float32) + 0.1 * generator.normal(size=(1, 10, 20)).astype(np.float32)
        for k, v in (labels | hidden).items()
    }
    where = Known(**{**base.__dict__, "image": looks.__getitem__})
    found = ratios("regressor", where, trees=50)
    for name, label in hidden.items():
        assert found[name][0, 1] == pytest.approx((label == 1).mean(), abs=0.05)
    again = ratios("regressor", where, trees=50)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_true_sizes_need_a_flag_and_mark_the_result():
    with pytest.raises(RecipeError, match="upper_bound: true"):
        build("prior", "true_size")
    prior = build("prior", "true_size", upper_bound=True, factor=1.5)
    assert "UPPER BOUND" in prior.mark
    assert "+50%" in prior.mark
    np.testing.assert_allclose(prior.ratios(known())["t0"], [[1 - 1.5 * 0.17, 1.5 * 0.15, 1.5 * 0.02]])
    constant = ratios("true_size", upper_bound=True, per="constant")
    np.testing.assert_allclose(constant["t0"], [[1 - 0.2 - 0.02, 0.2, 0.02]])
    np.testing.assert_allclose(constant["t1"], [[0.8, 0.2, 0.0]])


def test_unknown_voxels_are_left_out_of_shares():
    label = disc(30, 4)
    label[5:] = IGNORE
    np.testing.assert_allclose(known().counted(label), [[66 / 100, 0.3, 0.04]])
    assert np.isnan(known().counted(np.full((10, 20), IGNORE, np.uint8))).all()


def test_sizes_of_unknown_or_missing_classes():
    with pytest.raises(RecipeError, match=r"data\.prior\.sizes\.livr: there is no such class\. Did you mean 'liver'"):
        ratios("constant", sizes={"livr": 0.1, "cyst": 0.1})
    with pytest.raises(RecipeError, match="give a size of 'cyst' too"):
        ratios("constant", sizes={"liver": 0.1})
    with pytest.raises(DataError, match="together take 110% of the image"):
        ratios("constant", sizes={"liver": 0.6, "cyst": 0.5})

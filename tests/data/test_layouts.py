"""Layouts that others defined: nnU-Net, Decathlon, ACDC, folders of NIfTI files and pictures."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from labeleff import registry
from labeleff.data.formats.acdc import Acdc, AcdcH5
from labeleff.data.formats.compact import Compact
from labeleff.data.formats.manifest_file import ManifestFile
from labeleff.data.formats.nifti import Nifti
from labeleff.data.formats.nnunet import Decathlon, NnUNet
from labeleff.data.formats.pictures import Pictures
from labeleff.data.manifest import write_manifest
from labeleff.errors import DataError

from . import layouts
from .layouts import AFFINES, SHAPE, picture, save, volume


def in_a_folder(folder, matrix):
    save(folder / "images" / "one.nii.gz", volume(0)[0], matrix)
    save(folder / "labels" / "one.nii.gz", volume(0)[1], matrix)
    return Nifti(path=str(folder), classes=("background", "a", "b"))


LAYOUTS = {
    "nnunet": lambda folder, matrix: NnUNet(path=str(layouts.nnunet(folder, cases=("one",), matrix=matrix))),
    "decathlon": lambda folder, matrix: Decathlon(
        path=str(layouts.decathlon(folder, cases=("one",), tests=(), matrix=matrix))
    ),
    "acdc": lambda folder, matrix: Acdc(path=str(layouts.acdc(folder, patients=(("training", 99),), matrix=matrix))),
    "nifti": in_a_folder,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("orientation", AFFINES)
def test_every_voxel_keeps_its_place(tmp_path, layout, orientation):
    """Each stored voxel is found again at its place in the patient, in the format and through a manifest file."""
    native = LAYOUTS[layout](tmp_path, AFFINES[orientation])
    manifest = native.manifest()
    write_manifest(manifest, tmp_path / "manifest.json")
    for data in (native, ManifestFile(path=str(tmp_path / "manifest.json"))):
        case = data.manifest().cases[0]
        image, label, found = data.read_image(case), data.read_label(case), data.affine(case)
        stored = nib.load(case.image[0].path)
        raw, given = np.asarray(stored.dataobj), np.asarray(nib.load(case.label.path).dataobj)
        for index in np.ndindex(SHAPE):
            world = stored.affine @ [*index, 1]
            place = np.linalg.solve(found, world)
            there = tuple(np.rint(place[:3]).astype(int))
            assert np.abs(place[:3] - there).max() < 1e-6
            assert np.abs(found @ [*there, 1] - world).max() < 1e-6
            assert image[0][there] == (raw[index] if raw.ndim == 3 else raw[index][0])
            assert label[there] == (255 if layout == "nnunet" and given[index] == 2 else given[index])
        axes = found[:3, :3]
        assert list(np.abs(axes).argmax(axis=0)) == [0, 1, 2]
        assert (np.diag(axes) > 0).all()
        assert case.spacing == pytest.approx(np.linalg.norm(axes, axis=0), abs=1e-5)


def test_nnunet(tmp_path):
    folder = layouts.nnunet(tmp_path / "Dataset005_Prostate")
    save(folder / "imagesTr" / "new_0000.nii.gz", volume(50)[0])
    save(folder / "imagesTr" / "new_0001.nii.gz", volume(51)[0])
    save(folder / "imagesTs" / "t_0000.nii.gz", volume(60)[0])
    save(folder / "imagesTs" / "t_0001.nii.gz", volume(61)[0])
    data = NnUNet(path=str(folder), patient_pattern="(la)_")
    manifest = data.manifest()
    assert [(c.id, c.patient, c.has_label) for c in manifest.cases] == [
        ("la_001", "la", True), ("la_002", "la", True), ("la_003", "la", True), ("new", "new", False),
    ]  # fmt: skip
    assert (manifest.name, manifest.channels, manifest.classes) == ("Dataset005_Prostate", 2, ("background", "PZ"))
    assert data.notes == [
        "1 images of imagesTr have no label: they are unlabelled",
        "1 images of imagesTs have no label: left out (the option unlabelled_tests learns from them)",
    ]
    image, label = data.read_image(manifest.case("la_002")), data.read_label(manifest.case("la_002"))
    assert image.dtype == np.float32
    for channel in range(2):
        assert np.array_equal(image[channel], volume(20 + channel)[0])
    given = volume(20)[1]
    assert np.array_equal(label, np.where(given == 2, 255, given))
    more = NnUNet(path=str(folder), unlabelled_tests=True).manifest()
    assert (more.case("t").role, more.case("t").label) == ("train", None)
    save(folder / "labelsTs" / "t.nii.gz", volume(60)[1])
    assert NnUNet(path=str(folder)).manifest().case("t").role == "test"


def test_nnunet_follows_a_list_in_its_order(tmp_path):
    cases = {
        name: {"images": [f"imagesTr/{name}_000{c}.nii.gz" for c in range(2)], "label": f"labelsTr/{name}.nii.gz"}
        for name in ("la_003", "la_001")
    }
    manifest = NnUNet(path=str(layouts.nnunet(tmp_path, dataset=cases, name="atria"))).manifest()
    assert [case.id for case in manifest.cases] == ["la_003", "la_001"]
    assert manifest.name == "atria"


def test_nnunet_pictures_in_colour(tmp_path):
    layouts.nnunet(tmp_path, cases=(), channels=3, file_ending=".png", labels={"background": 0, "road": 1})
    colours = np.random.default_rng(0).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    picture(tmp_path / "imagesTr" / "img-1_0000.png", colours)
    picture(tmp_path / "labelsTr" / "img-1.png", (colours[..., 0] > 99).astype(np.uint8))
    data = NnUNet(path=str(tmp_path))
    manifest = data.manifest()
    assert (manifest.axes, manifest.channels, manifest.cases[0].spacing) == (2, 3, None)
    image = data.read_image(manifest.cases[0])
    assert image.dtype == np.uint8
    assert np.array_equal(image, colours.transpose(2, 0, 1))
    assert np.array_equal(data.read_label(manifest.cases[0]), colours[..., 0] > 99)


def test_nnunet_regions_that_overlap(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    folder = layouts.nnunet(tmp_path / "n", cases=("one",), labels=labels)
    stored = save(folder / "labelsTr" / "one.nii.gz", volume(0, 5)[1])
    native = NnUNet(path=str(folder))
    write_manifest(native.manifest(), tmp_path / "m.json")
    for data in (native, ManifestFile(path=str(tmp_path / "m.json"))):
        manifest = data.manifest()
        assert (manifest.overlapping, manifest.classes) == (True, ("background", "whole", "core", "enhancing"))
        label = data.read_label(manifest.cases[0])
        for index, value in np.ndenumerate(np.asarray(nib.load(stored).dataobj)):
            assert label[index] == [0, 0b001, 0b011, 0b111, 255][value]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, "x"]}}, r"labels\.whole is \[1, 'x'\]; it is a whole number"),
        ({"labels": {"organ": 1}}, "no value 0"),
        ({"labels": {"background": 0}}, "no class beside the background"),
        ({"labels": {"background": 0, "organ": "x"}}, r"labels\.organ is 'x'"),
        ({"labels": None}, "labels is missing"),
        ({"channel_names": {"0": "T2"}}, "has 2 channel files, dataset.json names 1"),
        ({"channel_names": None}, "channel_names is missing"),
        ({"file_ending": ".nrrd"}, "file_ending is '.nrrd', which is not read"),
        ({"dataset": {"x": {"images": ["nowhere.nii.gz"]}}}, "named in dataset.json, but there is no such file"),
        ({"dataset": {"x": 3}}, "dataset.x needs images"),
    ],
)
def test_what_is_wrong_with_a_description_is_said(tmp_path, change, message):
    layouts.nnunet(tmp_path, cases=("one",), **change)
    with pytest.raises(DataError, match=message):
        NnUNet(path=str(tmp_path)).manifest()


def test_missing_channels_and_images_are_named(tmp_path):
    layouts.nnunet(tmp_path)
    (tmp_path / "imagesTr" / "la_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'la_001' has the channels \[1\]"):
        NnUNet(path=str(tmp_path)).manifest()
    (tmp_path / "imagesTr" / "la_001_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="a label without an image la_001_0000"):
        NnUNet(path=str(tmp_path)).manifest()
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="is a list; an object is needed"):
        NnUNet(path=str(tmp_path)).manifest()


def test_channels_that_lie_elsewhere_are_named(tmp_path):
    layouts.nnunet(tmp_path, cases=("one",))
    save(tmp_path / "imagesTr" / "one_0001.nii.gz", volume(1)[0], AFFINES["flipped"])
    data = NnUNet(path=str(tmp_path))
    with pytest.raises(DataError, match=r"one_0001.nii.gz: lies elsewhere than one_0000.nii.gz"):
        data.read_image(data.manifest().cases[0])


def test_decathlon(tmp_path):
    data = Decathlon(path=str(layouts.decathlon(tmp_path)))
    manifest = data.manifest()
    assert [(c.id, c.role, c.has_label) for c in manifest.cases] == [("b_2", "train", True), ("b_1", "train", True)]
    assert (manifest.name, manifest.channels, manifest.classes) == ("Prostate", 2, ("background", "PZ", "TZ"))
    assert data.notes == ["1 images of test have no label: left out (the option unlabelled_tests learns from them)"]
    image = data.read_image(manifest.case("b_1"))
    assert np.array_equal(image, np.stack([volume(10)[0], volume(11)[0]]))
    assert np.array_equal(data.read_label(manifest.case("b_1")), volume(10)[1])
    more = Decathlon(path=str(tmp_path), unlabelled_tests=True).manifest()
    assert (more.case("b_3").role, more.case("b_3").label) == ("train", None)


def test_the_same_data_in_three_layouts_are_the_same_manifest(tmp_path):
    """Cases, roles, spacing, classes and arrays do not depend on the layout."""
    labels = {"background": 0, "PZ": 1, "TZ": 2}
    names = ("c", "a", "b")
    listed = {n: {"images": [f"imagesTr/{n}_0000.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in names}
    one = NnUNet(
        path=str(layouts.nnunet(tmp_path / "n", channels=1, cases=names, labels=labels, dataset=listed, name="x"))
    )
    two = Decathlon(path=str(layouts.decathlon(tmp_path / "d", channels=1, cases=names, tests=(), name="x")))
    rows = [
        (m.name, m.classes, m.axes, m.channels, m.slice_axis, [(c.id, c.patient, c.role, c.spacing) for c in m.cases])
        for m in (one.manifest(), two.manifest())
    ]
    assert rows[0] == rows[1]
    write_manifest(two.head, tmp_path / "m.json")
    three = ManifestFile(path=str(tmp_path / "m.json"))
    assert three.manifest().cases == tuple(three.head.cases)
    for name in names:
        images = [d.read_image(d.head.case(name)) for d in (one, two, three)]
        assert all(i.dtype == images[0].dtype and np.array_equal(i, images[0]) for i in images)
        assert np.array_equal(one.read_label(one.head.case(name)), three.read_label(three.head.case(name)))


def test_acdc_as_distributed(tmp_path):
    folder = layouts.acdc(tmp_path / "ACDC" / "database")
    data = Acdc(path=str(tmp_path / "ACDC"))
    manifest = data.manifest()
    assert [(c.id, c.role) for c in manifest.cases] == [
        ("patient011_frame01", "test"), ("patient011_frame12", "test"), ("patient028_frame01", "validation"),
        ("patient028_frame12", "validation"), ("patient099_frame01", "train"), ("patient099_frame12", "train"),
    ]  # fmt: skip
    assert manifest.official == ("patient099",)
    assert data.notes == ["1 patients are outside the split ssl4mis: left out"]
    assert np.array_equal(data.read_label(manifest.case("patient099_frame12")), volume(9912, 4)[1])
    official = Acdc(path=str(tmp_path / "ACDC"), split="official", phases=("ES",)).manifest()
    assert [c.id for c in official.of_role("test")] == ["patient101_frame12"]
    (folder / "training" / "patient099" / "patient099_frame12_gt.nii.gz").unlink()
    assert data.manifest().case("patient099_frame12").label is None
    (folder / "training" / "patient099" / "Info.cfg").write_text("ED: 1\n")
    with pytest.raises(DataError, match=r"Info.cfg: ED and ES are needed"):
        data.manifest()


def test_the_split_of_acdc_is_that_of_the_lists(real_data):
    from labeleff.data.formats.acdc import TEST, TRAIN, VALIDATION

    listed = Compact(path=str(real_data / "acdc_128")).manifest()
    for role, ours in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        assert set(listed.patients(role)) == {f"patient{n:03d}" for n in ours}
    assert listed.official == tuple(f"patient{n:03d}" for n in TRAIN)


def test_acdc_h5(tmp_path):
    data = AcdcH5(path=str(layouts.acdc_h5(tmp_path)), scribbles=True)
    manifest = data.manifest()
    assert manifest.official == ("patient099", "patient038")
    assert (len(manifest.of_role("validation")), len(manifest.of_role("test")), manifest.slice_axis) == (2, 2, 0)
    train, test = manifest.cases[0], manifest.of_role("test")[0]
    image, label = volume(layouts.named(train.id), 4)
    assert np.array_equal(data.read_image(train)[0], image.astype(np.float32) / 200)
    drawn = np.indices(SHAPE).sum(0) % 3 == 0
    assert np.array_equal(data.read_label(train), np.where(drawn, label, 255))
    assert np.array_equal(data.read_label(test), volume(layouts.named(test.id), 4)[1])
    dense = AcdcH5(path=str(tmp_path))
    assert np.array_equal(dense.read_label(dense.manifest().cases[0]), label)
    (tmp_path / "data" / f"{train.id}.h5").unlink()
    with pytest.raises(DataError, match=r"listed in train.list, but there is no such volume"):
        data.manifest()


def test_scribbles_of_the_compact_set(real_data):
    data = Compact(path=str(real_data / "acdc_128"), scribbles=True)
    manifest = data.manifest()
    train, test = manifest.of_role("train")[0], manifest.of_role("test")[0]
    with np.load(train.image[0].path) as file:
        scribble = file["scribble"]
    assert np.array_equal(data.read_label(train), np.where(scribble == 4, 255, scribble))
    with np.load(test.image[0].path) as file:
        assert np.array_equal(data.read_label(test), file["label"])


def test_nifti_with_several_channels(tmp_path):
    for number, ending in enumerate(("_t1", "_t2")):
        save(tmp_path / "images" / f"p{ending}.nii.gz", volume(number)[0])
    save(tmp_path / "labels" / "p.nii.gz", volume(0, 2)[1])
    data = Nifti(path=str(tmp_path), channels=("_t2", "_t1"))
    manifest = data.manifest()
    assert (manifest.channels, [c.id for c in manifest.cases]) == (2, ["p"])
    assert np.array_equal(data.read_image(manifest.cases[0]), np.stack([volume(1)[0], volume(0)[0]]))
    (tmp_path / "images" / "p_t1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'p' has no p_t1\.nii\.gz"):
        data.manifest()
    save(tmp_path / "images" / "p_t1.nii.gz", volume(0)[0])
    save(tmp_path / "images" / "p_flair.nii.gz", volume(0)[0])
    with pytest.raises(DataError, match="ends in none of _t2, _t1"):
        data.manifest()


def test_nifti_with_the_channels_in_one_file(tmp_path):
    stack = np.stack([volume(0)[0], volume(1)[0], volume(2)[0]], axis=-1)
    save(tmp_path / "images" / "p.nii.gz", stack, AFFINES["permuted"])
    data = Nifti(path=str(tmp_path))
    manifest = data.manifest()
    assert (manifest.channels, manifest.cases[0].spacing) == (3, (3.0, 1.25, 0.5))
    assert data.read_image(manifest.cases[0]).shape == (3, 7, 5, 6)
    save(tmp_path / "images" / "q.nii.gz", volume(3)[0])
    with pytest.raises(DataError, match=r"case 'q' has 1 channels, most cases have 3|case 'p' has 3 channels"):
        data.manifest()


def test_nifti_with_one_mask_per_structure(tmp_path):
    save(tmp_path / "images" / "p.nii.gz", volume(0)[0])
    save(tmp_path / "images" / "q.nii.gz", volume(1)[0])
    one, two = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    one[1:3], two[2:4] = 1, 255
    save(tmp_path / "labels" / "p" / "liver.nii.gz", one)
    save(tmp_path / "labels" / "p" / "spleen.nii.gz", two)
    native = Nifti(path=str(tmp_path), classes=("background", "liver", "spleen"))
    write_manifest(native.manifest(), tmp_path / "m.json")
    rows = json.loads((tmp_path / "m.json").read_text())["cases"]
    assert [part["mask_of"] for part in rows[0]["label"]] == [1, 2]
    assert rows[1]["label"] is None
    for data in (native, ManifestFile(path=str(tmp_path / "m.json"))):
        label = data.read_label(data.manifest().case("p"))
        assert [int(label[i, 0, 0]) for i in range(5)] == [0, 1, 2, 2, 0]
    both = Nifti(path=str(tmp_path), classes=("background", "liver", "spleen"), overlapping=True)
    label = both.read_label(both.manifest().case("p"))
    assert [int(label[i, 0, 0]) for i in range(5)] == [0, 1, 3, 2, 0]
    save(tmp_path / "labels" / "p" / "splen.nii.gz", two)
    with pytest.raises(DataError, match=r"splen: named after no class\. Did you mean 'spleen'"):
        native.manifest()


@pytest.fixture
def tiles(tmp_path):
    """Pictures in grey, in colour with opacity, of 16 bits, and a JPEG; two of them labelled with 0 and 255."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 255, (6, 7)).astype(np.uint8)
    colour = random.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    picture(tmp_path / "images" / "a_1.png", grey)
    picture(tmp_path / "images" / "a_2.png", np.dstack([colour, np.full((6, 7), 200, np.uint8)]))
    tifffile.imwrite(tmp_path / "images" / "b_1.tif", colour.astype(np.uint16) * 200)
    picture(tmp_path / "images" / "b_2.jpg", grey)
    mask = np.where(grey > 100, 255, 0).astype(np.uint8)
    picture(tmp_path / "labels" / "a_1.png", mask)
    picture(tmp_path / "labels" / "b_1.png", np.repeat(mask[..., None], 3, axis=2))
    return tmp_path, grey, colour, mask


def test_pictures(tiles):
    folder, grey, colour, mask = tiles
    (folder / "test.list").write_text("b_1\nb_2\n")
    data = Pictures(path=str(folder), values=(0, 255), patient_pattern="([ab])_")
    manifest = data.manifest()
    assert (manifest.axes, manifest.channels, manifest.patients("train")) == (2, 3, ("a",))
    assert [c.has_label for c in manifest.cases] == [True, False, True, False]
    assert np.array_equal(data.read_image(manifest.case("a_1")), np.stack([grey] * 3))
    assert np.array_equal(data.read_image(manifest.case("a_2")), colour.transpose(2, 0, 1))
    deep = data.read_image(manifest.case("b_1"))
    assert deep.dtype == np.float32
    assert np.array_equal(deep, colour.transpose(2, 0, 1).astype(np.float32) * 200)
    for name in ("a_1", "b_1"):
        assert np.array_equal(data.read_label(manifest.case(name)), mask // 255)
    write_manifest(manifest, folder / "m.json")
    again = ManifestFile(path=str(folder / "m.json"))
    assert again.manifest() == manifest
    assert np.array_equal(again.read_label(manifest.case("b_1")), mask // 255)


def test_colour_in_a_data_set_of_grey_becomes_luminance(tiles):
    folder, _, colour, _ = tiles
    write_manifest(Pictures(path=str(folder)).manifest(), folder / "m.json")
    plain = json.loads((folder / "m.json").read_text()) | {"channels": 1}
    (folder / "m.json").write_text(json.dumps(plain))
    data = ManifestFile(path=str(folder / "m.json"))
    found = data.read_image(data.manifest().case("a_2"))
    for y, x in np.ndindex(6, 7):
        r, g, b = (int(v) for v in colour[y, x])
        assert abs(int(found[0, y, x]) - (0.299 * r + 0.587 * g + 0.114 * b)) <= 0.5


def test_pages_of_a_tiff_file_are_channels(tmp_path):
    pages = np.random.default_rng(1).integers(0, 60000, (5, 6, 7)).astype(np.uint16)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a.tif", pages, photometric="minisblack")
    data = Pictures(path=str(tmp_path))
    manifest = data.manifest()
    assert manifest.channels == 5
    assert np.array_equal(data.read_image(manifest.cases[0]), pages.astype(np.float32))
    tifffile.imwrite(tmp_path / "images" / "a.tif", np.zeros((2, 3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="a TIFF file with axes"):
        data.manifest()


def test_what_is_no_label_picture_is_said(tiles):
    folder, grey, colour, mask = tiles
    data = Pictures(path=str(folder), values=(0, 255))
    Image.fromarray(colour).save(folder / "labels" / "a_1.png")
    with pytest.raises(DataError, match=r"case 'a_1': .*3 channels that differ"):
        data.read_label(data.manifest().case("a_1"))
    Image.fromarray(grey).save(folder / "labels" / "a_1.png")
    with pytest.raises(DataError, match=r"label value \d+ is unknown; values here are 0, 255"):
        data.read_label(data.manifest().case("a_1"))
    Image.fromarray(mask[:4]).save(folder / "labels" / "a_1.png")
    with pytest.raises(DataError, match=r"the label has shape \(4, 7\), the image \(6, 7\)"):
        data.read_label(data.manifest().case("a_1"))
    (folder / "labels" / "a_1.png").unlink()
    Image.fromarray(mask).save(folder / "labels" / "a_1.jpg")
    with pytest.raises(DataError, match="JPEG changes values"):
        data.read_label(data.manifest().case("a_1"))
    (folder / "images" / "a_2.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"case 'a_2': .*not a readable image"):
        data.read_image(data.manifest().case("a_2"))
    (folder / "images" / "a_2.png").unlink()
    picture(folder / "images" / "a_1.bmp", grey)
    with pytest.raises(DataError, match=r"a_1\.bmp is beside it|a_1\.png: a_1\.bmp"):
        data.manifest()


def test_palettes_hold_ids(tmp_path):
    ids = (np.arange(42).reshape(6, 7) % 3).astype(np.uint8)
    picture(tmp_path / "images" / "a.png", ids * 80)
    coloured = Image.fromarray(ids, "L")
    coloured = coloured.convert("P")
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [0] * 759)
    coloured.putdata(list(ids.ravel()))
    (tmp_path / "labels").mkdir()
    coloured.save(tmp_path / "labels" / "a.png")
    data = Pictures(path=str(tmp_path), classes=("background", "a", "b"))
    assert np.array_equal(data.read_label(data.manifest().cases[0]), ids)


@pytest.mark.parametrize("name", ["nnunet", "decathlon", "acdc", "acdc_h5", "pictures", "nifti"])
def test_an_empty_folder_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(DataError) as found:
        registry.build("dataset", name, path=str(tmp_path)).manifest()
    assert "\n" not in str(found.value)


def test_damaged_volumes_are_named_in_one_line(tmp_path):
    """A stream that is cut off or overwritten, a header of nonsense, a size that no memory holds."""
    path = save(tmp_path / "images" / "p.nii.gz", volume(0, shape=(20, 20, 20))[0])
    whole = path.read_bytes()
    data = Nifti(path=str(tmp_path))
    case = data.manifest().cases[0]
    middle = len(whole) // 2
    huge = bytearray(gzip.decompress(whole))
    huge[42:48] = b"\xff\x7f" * 3  # 32767 voxels along each axis
    nonsense = bytearray(gzip.decompress(whole))
    nonsense[70:72] = b"\x39\x30"  # a type of voxels that there is not
    for torn in (
        whole[:middle],
        gzip.compress(bytes(huge)),
        gzip.compress(bytes(nonsense)),
        b"",
        b"not a volume",
    ):
        path.write_bytes(torn)
        with pytest.raises(DataError, match="case 'p': ") as found:
            data.read_image(case)
        assert "\n" not in str(found.value)

"""Cityscapes, GTAV and SYNTHIA in their layouts, generated small."""

import csv
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from labeleff.batch import IGNORE
from labeleff.data.formats.streets import Cityscapes, Gtav, Synthia
from labeleff.errors import DataError
from labeleff.recipe_io import load_recipe
from labeleff.runner import run

# the 19 classes of the benchmark with their ids in label files and in training, from its definition
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
# those of them that the rendered city has, as ids of its files
SYNTHIA_IDS = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    1: 10,
    10: 11,
    17: 12,
    8: 13,
    19: 15,
    12: 17,
    11: 18,
}

IDS = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12) % 36
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def save_16_bits(path, array, filters):
    """Write [H, W, 3] uint16 as a PNG, each row by one of the filters 0 (none), 1 (left) and 2 (above)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = array.astype(">u2").tobytes()
    width = array.shape[1] * 6
    rows = [np.frombuffer(raw[i : i + width], np.uint8).astype(int) for i in range(0, len(raw), width)]
    lines = []
    for index, row in enumerate(rows):
        kind = filters[index % len(filters)]
        left = np.concatenate([np.zeros(6, int), row[:-6]])
        above = rows[index - 1] if index else np.zeros(width, int)
        lines.append(bytes([kind]) + ((row - [0, left, above][kind]) % 256).astype(np.uint8).tobytes())
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    path.write_bytes(content)


@pytest.fixture
def cityscapes(tmp_path):
    for turn, (part, city) in enumerate((("train", "aachen"), ("train", "ulm"), ("val", "munster"))):
        name = f"{city}_000000_000019"
        save(tmp_path / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", np.roll(COLOURS, turn, 0))
        save(tmp_path / "gtFine" / part / city / f"{name}_gtFine_labelIds.png", IDS)
    return tmp_path


def test_cityscapes(cityscapes):
    data = Cityscapes(path=str(cityscapes))
    manifest = data.manifest()
    assert [(c.id, c.role) for c in manifest.cases] == [
        ("aachen_000000_000019", "train"),
        ("ulm_000000_000019", "train"),
        ("munster_000000_000019", "test"),
    ]
    assert (len(manifest.classes), manifest.channels, manifest.axes) == (20, 3, 2)
    assert (manifest.classes[1], manifest.classes[14], manifest.classes[19]) == ("road", "car", "bicycle")
    case = manifest.cases[0]
    assert np.array_equal(data.read_image(case), COLOURS.transpose(2, 0, 1))
    label = data.read_label(case)
    for value in range(36):
        expected = TRAIN_IDS[value] + 1 if value in TRAIN_IDS else IGNORE
        assert (label[value == IDS] == expected).all()


def test_cityscapes_with_the_classes_of_synthia(cityscapes):
    data = Cityscapes(path=str(cityscapes), classes=16)
    label = data.read_label(data.manifest().cases[0])
    for value in (22, 27, 31):  # terrain, truck, train
        assert (label[value == IDS] == IGNORE).all()
    assert set(np.unique(label)) == {*range(1, 17), IGNORE}
    assert data.names[label[IDS == 33][0]] == "bicycle"


def test_size_and_exclude(cityscapes):
    data = Cityscapes(path=str(cityscapes), size=(16, 24), exclude=("ulm_000000_000019",))
    manifest = data.manifest()
    assert len(manifest.cases) == 2
    case = manifest.cases[0]
    assert data.read_image(case).shape == (3, 16, 24)
    plain = Cityscapes(path=str(cityscapes))
    assert np.array_equal(data.read_label(case), plain.read_label(case).repeat(2, 0).repeat(2, 1))
    assert data.fingerprint(case) != plain.fingerprint(case)


def test_gtav(tmp_path):
    palette = np.random.default_rng(1).integers(0, 256, 768).tolist()
    for number in (1, 2):
        save(tmp_path / "images" / f"{number:05d}.png", COLOURS)
    save(tmp_path / "labels" / "00001.png", IDS, palette)
    data = Gtav(path=str(tmp_path))
    manifest = data.manifest()
    assert [(c.id, c.role, c.has_label) for c in manifest.cases] == [
        ("00001", "train", True),
        ("00002", "train", False),
    ]
    label = data.read_label(manifest.case("00001"))
    assert (label[IDS == 26] == TRAIN_IDS[26] + 1).all()
    assert (label[IDS == 0] == IGNORE).all()
    save(tmp_path / "labels" / "00001.png", COLOURS)
    with pytest.raises(DataError, match=r"case '00001': .* is an image of mode RGB"):
        data.read_label(manifest.case("00001"))
    (tmp_path / "labels" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"labels: no \.png files"):
        data.manifest()


@pytest.mark.parametrize("inner", ["", "RAND_CITYSCAPES"])
def test_synthia(tmp_path, inner):
    instances = np.random.default_rng(2).integers(0, 65536, IDS.shape)
    stored = np.stack([IDS % 23, instances, instances[::-1]], -1)
    save(tmp_path / inner / "RGB" / "0000000.png", COLOURS)
    save_16_bits(tmp_path / inner / "GT" / "LABELS" / "0000000.png", stored, filters=(0, 1, 2))
    data, streets = Synthia(path=str(tmp_path)), Cityscapes(path=".", classes=19)
    manifest = data.manifest()
    assert manifest.classes == Cityscapes(path=".", classes=16).names
    label = data.read_label(manifest.cases[0])
    for value in range(23):
        found = np.unique(label[value == IDS % 23]).tolist()
        names = [streets.names[SYNTHIA_IDS[value] + 1]] if value in SYNTHIA_IDS else []
        assert [manifest.classes[i] for i in found if i != IGNORE] == names
    save(tmp_path / inner / "GT" / "LABELS" / "0000000.png", IDS)
    with pytest.raises(DataError, match="is not a colour image of 16 bits"):
        data.read_label(manifest.cases[0])


def test_from_gtav_to_cityscapes(cityscapes, cache):
    """Images of different sizes and three channels go through a run; what is unknown is measured nowhere."""
    for number in range(2):
        save(cityscapes / "gtav" / "images" / f"{number}.png", np.roll(COLOURS, number, 1).repeat(4, 0).repeat(3, 1))
        save(cityscapes / "gtav" / "labels" / f"{number}.png", IDS.repeat(4, 0).repeat(3, 1))
    recipe = {
        "name": "streets",
        "data": {
            "dataset": {
                "name": "union",
                "parts": {
                    "source": {"name": "gtav", "path": str(cityscapes / "gtav")},
                    "target": {"name": "cityscapes", "path": str(cityscapes)},
                },
            },
            "source": ["source"],
            "target": ["target"],
            "labelled": 2,
            "patch": [16, 16],
        },
        "backbone": {"name": "unet", "channels": [4, 8]},
        "stages": [{"strategy": "supervised", "steps": 1, "batch": 2}],
        "evaluation": {"pictures": False},
    }
    summary = run(load_recipe(recipe), cityscapes / "run", cache=cache)
    assert summary["dataset"] == "gtav_to_cityscapes"
    with (cityscapes / "run" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"target_munster_000000_000019"}
    assert len({row["class"] for row in rows}) == 19


def test_errors(cityscapes, tmp_path):
    data = Cityscapes(path=str(cityscapes))
    case = data.manifest().cases[0]
    whole = case.image[0].path.read_bytes()
    case.image[0].path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"case 'aachen_000000_000019': .*leftImg8bit\.png: the image cannot be decoded"
    ):
        data.read_image(case)
    case.image[0].path.write_bytes(b"torn")
    with pytest.raises(DataError, match="not a readable image"):
        data.read_image(case)
    case.label.path.unlink()
    with pytest.raises(DataError, match="the label is missing; unpack gtFine"):
        data.manifest()
    with pytest.raises(DataError, match="no images; expected <city>"):
        Cityscapes(path=str(tmp_path / "gtFine")).manifest()
    with pytest.raises(ValueError, match="give 19 or 16"):
        Cityscapes(path=".", classes=13)
    with pytest.raises(ValueError, match="give height and width"):
        Gtav(path=".", size=(4, 4))

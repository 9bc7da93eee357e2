"""Counts, volumes and the sheet of ``labeleff inspect`` against values known beforehand."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from labeleff.data.manifest import Case, Manifest, Source, write_manifest
from labeleff.inspecting import COLUMNS, TILE, contact_sheet, inspect, per_class

from .data.layouts import AFFINES, save


def test_a_data_set_on_one_page(tmp_path):
    cases = []
    for number in range(5):
        image = np.full((8, 9, 10), 5, np.int16)
        image[0, 0, 0] = 40
        label = np.zeros((8, 9, 10), np.uint8)
        label[2 : 3 + number, 2:4, 3:5] = 1
        label[7, 8, 9] = 255
        path = save(tmp_path / f"i{number}.nii.gz", image, AFFINES["anisotropic"])
        given = Source(save(tmp_path / f"l{number}.nii.gz", label, AFFINES["anisotropic"])) if number != 3 else None
        role = "test" if number == 4 else "train"
        cases.append(Case(f"<c{number}>", f"p{number}", (Source(path),), given, "", role, (0.625, 0.625, 8.0)))
    manifest = Manifest("hearts & more", tuple(cases), ("background", "atrium", "other"), 3, slice_axis=2)
    write_manifest(manifest, tmp_path / "m.json")
    rows = inspect(str(tmp_path / "m.json"), tmp_path / "out", shown=3)
    for number in range(3):
        assert rows[number]["volume:atrium"] == pytest.approx((1 + number) * 4 * 0.625 * 0.625 * 8 / 1000)
        assert rows[number]["unlabelled"] == pytest.approx(1 / 720)
    assert rows[3]["volume:atrium"] is None
    assert rows[4]["volume:atrium"] is None  # a test label stays closed
    assert (rows[0]["min"], rows[0]["max"], rows[0]["shape"]) == (5, 40, "8 × 9 × 10")
    assert rows[0]["mean"] == pytest.approx((5 * 719 + 40) / 720)
    first, second = per_class(rows, manifest.classes)
    assert (first["cases"], first["of"], first["median"]) == (3, 3, rows[1]["volume:atrium"])
    assert (second["cases"], second["median"]) == (0, None)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "hearts &amp; more" in page
    assert "&lt;c1&gt;" in page
    assert "<c1>" not in page
    assert "The labels of 1 test cases stay closed" in page
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [case.id for case in cases]
    with Image.open(tmp_path / "out" / "contact.png") as sheet:
        assert sheet.size == (3 * TILE, TILE + 14)
    opened = inspect(str(tmp_path / "m.json"), tmp_path / "out", test_labels=True)
    assert opened[4]["volume:atrium"] == pytest.approx(5 * 4 * 0.625 * 0.625 * 8 / 1000)


def test_the_sheet_is_filled_row_by_row():
    tiles = [Image.new("RGB", (4, 3), (n, 0, 0)) for n in range(COLUMNS + 2)]
    with Image.open(io.BytesIO(contact_sheet(tiles))) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (6, 4 * COLUMNS, 3)
    assert [int(pixels[0, 4 * n, 0]) for n in range(COLUMNS)] == list(range(COLUMNS))
    assert [int(pixels[3, 4 * n, 0]) for n in range(3)] == [COLUMNS, COLUMNS + 1, 255]

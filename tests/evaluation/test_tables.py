"""Means, counts, intervals and pictures."""

import csv
import math
import warnings

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from labeleff.evaluation.tables import read_cases_csv, rich_comparison, rich_table, summarise, write_cases_csv
from labeleff.report import pictures


def row(case, name, dice, *, patient=None, predictor="student", **flags):
    distances = (
        {"hd95": 10 * (1 - dice), "assd": 2 * (1 - dice)} if not math.isnan(dice) else {"hd95": dice, "assd": dice}
    )
    return {
        "case": case, "patient": patient or case, "domain": "", "predictor": predictor, "selection": "last", "class": name,
        "dice": dice, "iou": dice / 2, **distances, "unit": "mm", "missed": False, "spurious": False, "absent": False,
        "reference_voxels": 5, "predicted_voxels": 4,
    } | flags  # fmt: skip


ROWS = [
    row("a", "liver", 0.8), row("a", "spleen", 0.2),
    row("b", "liver", 0.6), row("b", "spleen", math.nan, absent=True),
    row("c", "liver", 0.0, missed=True), row("c", "spleen", 0.4),
]  # fmt: skip


def test_means_run_from_cases_to_classes():
    liver, spleen, mean = summarise(ROWS)
    assert liver["dice"] == pytest.approx(1.4 / 3)
    assert spleen["dice"] == pytest.approx(0.3)
    assert mean["dice"] == pytest.approx((1.4 / 3 + 0.3) / 2)
    assert (liver["missed"], spleen["absent"], mean["missed"], mean["absent"], mean["cases"]) == (1, 1, 1, 1, 3)
    assert mean["dice_interval"] is None  # three patients are too few


def test_tables_from_before_there_were_further_metrics_are_read(tmp_path):
    rows = [one | {"nsd": 0.5, "volume_error": -0.25} for one in ROWS]
    write_cases_csv(tmp_path / "new.csv", rows)
    lines = (tmp_path / "new.csv").read_text().splitlines()
    (tmp_path / "old.csv").write_text("".join(",".join(line.split(",")[:-2]) + "\n" for line in lines))
    new, old = read_cases_csv(tmp_path / "new.csv"), read_cases_csv(tmp_path / "old.csv")
    assert [(r["nsd"], r["volume_error"]) for r in new] == [(0.5, -0.25)] * len(ROWS)
    assert all(math.isnan(r["nsd"]) and math.isnan(r["volume_error"]) for r in old)
    assert [r["dice"] for r in new][:3] == [r["dice"] for r in old][:3]
    assert [entry["nsd"] for entry in summarise(new)] == [0.5] * 3
    assert [entry["nsd"] for entry in summarise(old)] == [None] * 3


def test_intervals_are_over_patients():
    rows = [row(f"p{i}{f}", "liver", 0.1 * i, patient=f"p{i}") for i in range(8) for f in "xy"]
    entry = summarise(rows)[0]
    assert entry["patients"] == 8
    low, high = entry["dice_interval"]
    assert low < 0.35 < high
    generator = np.random.default_rng(1)
    means = [generator.choice(0.1 * np.arange(8), 8).mean() for _ in range(4000)]
    assert (low, high) == (
        pytest.approx(np.percentile(means, 2.5), abs=0.02),
        pytest.approx(np.percentile(means, 97.5), abs=0.02),
    )


def test_csv(tmp_path):
    write_cases_csv(tmp_path / "cases.csv", ROWS)
    with (tmp_path / "cases.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6
    assert (found[0]["dice"], found[3]["dice"], found[4]["missed"]) == ("0.800000", "nan", "1")


def test_tables_print_counts_and_mark_oracles():
    console = Console(width=160, record=True)
    console.print(rich_table("run", summarise([*ROWS, *[r | {"selection": "oracle"} for r in ROWS]])))
    console.print(rich_comparison({"one": summarise(ROWS), "two": summarise(ROWS)}))
    text = console.export_text()
    assert "not a result" in text
    assert "0.383" in text
    assert "side by side" in text


def test_cases_are_chosen_by_their_mean():
    rows = [row(c, "liver", d) for c, d in (("a", 0.3), ("b", 0.9), ("c", 0.1))] + [row("d", "liver", math.nan)]
    assert pictures.select_cases(rows) == {"best": "b", "median": "a", "worst": "c"}
    assert pictures.select_cases([row("d", "liver", math.nan)]) == {}


@pytest.mark.parametrize("shape", [(40, 30), (12, 40, 30)])
def test_pictures_are_written_and_repeatable(tmp_path, shape):
    generator = np.random.default_rng(0)
    image, reference = generator.normal(size=shape), np.zeros(shape, np.uint8)
    reference[..., 10:20, 10:20] = 1
    for name in ("one", "two"):
        pictures.draw_case(
            tmp_path / f"{name}.png", image, reference, {"ours": reference * 0, "theirs": reference},
            title="case", classes=("background", "organ"),
        )  # fmt: skip
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert Image.open(tmp_path / "one.png").size[0] > 800
    grid = pictures.overlay_grid(image, [reference, reference])
    assert grid.shape == (3, 40, 90)
    assert grid.dtype == np.uint8


@pytest.mark.parametrize("shape", [(40, 30), (12, 40, 30)])
def test_disputes_are_drawn_and_repeatable(tmp_path, shape):
    image, votes = np.random.default_rng(0).normal(size=shape), np.zeros((3, *shape), np.uint8)
    votes[:, ..., 10:20, 10:20] = 1
    votes[2, ..., 10:24, 10:20] = 2
    votes[1, ..., :3, :] = 255
    for name in ("one", "two"):
        pictures.draw_raters(tmp_path / f"{name}.png", image, votes, title="case", classes=("background", "a", "b"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    drawn = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    contours = drawn[:, drawn.shape[1] // 3 : 2 * drawn.shape[1] // 3]
    for rater in (1, 2, 3):  # everybody's colour is there
        assert (np.abs(contours - np.round(pictures.COLOURS[rater] * 255)).sum(-1) < 12).sum() > 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_raters(
            tmp_path / "full.png", image, votes * 0 + 1, title="no border", classes=("background", "a")
        )


def test_overlays_show_the_label_and_nothing_else():
    image, label = np.full((8, 8), 0.5), np.zeros((8, 8), np.uint8)
    label[2:5, 2:5] = 1
    shown = pictures.overlay(image, label)
    assert np.allclose(shown[label == 0], 0.5)
    assert not np.allclose(shown[label == 1], 0.5)

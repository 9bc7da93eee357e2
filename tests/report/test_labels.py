"""What runs did to their labels reaches the tables and the page, by numbers written by hand."""

import json
import re

import pytest

from labeleff.errors import RunError
from labeleff.report.analysis import analyse
from labeleff.report.corrections import COLUMNS
from labeleff.report.label_figures import memorisation, training_iou
from labeleff.report.labels import points
from labeleff.report.page import write_report
from labeleff.sweep.collect import collect, run_folder

from ..sweep.fake import fake_sweep


def described(curve, since):
    one = {"iou/1": curve, "due_since/1": since, "skipped/1": 0.0}
    return {"windows": 4.0, **one, "iou/2": [None] * len(curve), "due_since/2": -1.0, "skipped/2": 0.0}


def diagnosed(early, memorised):
    return {
        f"{what}/{c}": value
        for c in (1, 2)
        for what, value in zip(
            ("early_learning", "memorisation", "label_iou"), (early, memorised if c == 1 else None, 0.8), strict=True
        )
    }


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods; the runs of one have curves, corrections and diagnostics."""
    folder = fake_sweep(tmp_path_factory.mktemp("labels"), methods=("supervised", "adele"), budgets=(2,), draws=2)
    for record in collect(folder).records:
        if record.method == "adele":
            lines = [
                {"stage": 0, "step": 10, "loss": 1.0, "lr": 0.1},
                {"stage": 0, "step": 10, "annotator": described([0.25], -1.0)},
                {"stage": 0, "step": 10, "diagnostics": diagnosed(0.4, 0.1)},
                {"stage": 0, "step": 20, "annotator": described([0.25, 0.5], 2.0)},
                {"stage": 0, "step": 20, "diagnostics": diagnosed(0.3, 0.6)},
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": 0, "annotator"'
            (record.folder / "metrics.jsonl").write_text(text)
            rows = [
                (1, 0, 10, "label_correction", "large", "background", 2, 30, 100, 0.3, 0.9),
                (2, 0, 20, "label_correction", "large", "background", 1, 10, 100, 0.1, 0.7),
                (2, 0, 20, "label_correction", "background", "small", 1, 5, 100, 0.05, ""),
            ][: 3 if record.draw else 2]
            lines = [",".join(map(str, row)) for row in (COLUMNS, *rows)]
            (record.folder / "corrections.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tables(sweep):
    return analyse(collect(sweep)).tables


def test_corrections_are_summed_over_runs(tables):
    head = {"dataset": "phantom", "method": "adele", "labelled": "2", "labels": 2}
    one, two = tables["corrections"]
    assert one["confidence"] == pytest.approx((30 * 0.9 + 10 * 0.7) / 40)
    one = one | {"confidence": None}
    steps = {"first_step": 10, "last_step": 20}
    changes = {"from": "large", "to": "background", "runs": 2, "voxels": 80, "share": 0.4, "confidence": None}
    assert one == head | changes | steps
    changes = {"from": "background", "to": "small", "runs": 1, "voxels": 5, "share": 0.05, "confidence": None}
    assert two == head | changes | {"first_step": 20, "last_step": 20}


def test_curves_are_those_told_last(tables):
    rows = [(row["draw"], row["class"], row["due_since"], row["curve"]) for row in tables["training_iou"]]
    assert rows == [(d, *rest) for d in (0, 1) for rest in (("large", 2, "0.25 0.5"), ("small", None, "- -"))]
    assert points("0.25 - 0.5")[::2] == [0.25, 0.5]
    assert points("-") != points("-"), "NaN"
    rows = [row for row in tables["diagnostics"] if row["draw"] == 1]
    assert [(r["step"], r["class"], r["early_learning"], r["memorisation"], r["label_iou"]) for r in rows] == [
        (10, "large", 0.4, 0.1, 0.8),
        (10, "small", 0.4, None, 0.8),
        (20, "large", 0.3, 0.6, 0.8),
        (20, "small", 0.3, None, 0.8),
    ]


def test_the_page_shows_them(sweep, tables, tmp_path):
    analysis = analyse(collect(sweep))
    text = write_report(analysis, tmp_path).read_text()
    assert 'href="#labels"' in text
    shown = re.findall(r'data-table="corrections" data-row="(\d)" data-column="voxels" data-value="(\d+)"', text)
    assert shown == [("0", "80"), ("1", "5")]
    for kind in ("training_iou", "memorisation"):
        drawn = (tmp_path / "figures" / f"{kind}-phantom.svg").read_text()
        assert "adele: large" in drawn
        assert "adele: small" in drawn
        assert "supervised" not in drawn
    assert analysis.tables == tables


def test_a_panel_has_a_line_per_run(tables):
    from labeleff.report.figures import drawing, styles

    looks = styles(["supervised", "adele"], "supervised")
    with drawing("x"):
        large, small = (axes for axes in training_iou(tables["training_iou"], looks).axes if axes.get_visible())
        curves, fits = ([line for line in large.lines if (line.get_linestyle() == ":") == fit] for fit in (False, True))
        assert [list(line.get_ydata()) for line in curves] == [[0.25, 0.5], [0.5]] * 2
        assert [list(line.get_xdata()) for line in curves] == [[1, 2], [2]] * 2
        assert [(line.get_xdata()[[0, -1]].tolist(), line.get_ydata()[0]) for line in fits] == [([1.0, 2.0], 0.0)] * 2
        assert len(small.lines) == 2, "nothing to fit"
        large, _ = (axes for axes in memorisation(tables["diagnostics"], looks).axes if axes.get_visible())
        assert [list(line.get_ydata()) for line in large.lines] == [[0.4, 0.3], [0.1, 0.6]] * 2
        assert [line.get_linestyle() for line in large.lines] == ["-", ":"] * 2
    assert training_iou([], looks) is None


def test_sweeps_without_them_do_not_speak_of_labels(tmp_path):
    folder = fake_sweep(tmp_path, methods=("supervised", "bcp"), budgets=(2,), draws=1)
    text = write_report(analyse(collect(folder)), tmp_path / "report").read_text()
    assert 'href="#labels"' not in text
    assert 'id="labels"' not in text


def test_a_damaged_table_is_named(tmp_path):
    folder = fake_sweep(tmp_path, methods=("supervised",), budgets=(2,), draws=1)
    (record,) = collect(folder).records
    (run_folder(folder, record.name) / "corrections.csv").write_text("from,to\na,b\n")
    with pytest.raises(RunError, match=r"corrections\.csv: damaged"):
        analyse(collect(folder))

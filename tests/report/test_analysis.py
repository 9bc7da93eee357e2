"""Tables against values worked out by hand, and words that claim no more than the design allows."""

import math
from pathlib import Path

import numpy as np
import pytest

from labeleff.report.analysis import analyse
from labeleff.report.words import number, verdict
from labeleff.sweep.collect import MEAN, Collected, LeftOut, Record

CLASSES = ("background", "a", "b")


def record(method, labels, draw, score, *, fold=None, patients=("p", "q"), axes=None, seconds=10.0, dataset=""):
    """Return a run in which class a scores ``score`` (by patient) and class b 0.1 less."""
    by_patient = dict(zip(patients, score, strict=True))
    scores = {}
    for metric, sign in (("dice", 1), ("iou", 1), ("hd95", -10), ("assd", -5)):
        a = {p: sign * v + (20 if sign < 0 else 0) for p, v in by_patient.items()}
        b = {p: sign * (v - 0.1) + (20 if sign < 0 else 0) for p, v in by_patient.items()}
        scores |= {("a", metric): a, ("b", metric): b, (MEAN, metric): {p: (a[p] + b[p]) / 2 for p in a}}
    entries = [
        {"predictor": "student", "selection": "last", "class": name, "missed": 1, "spurious": 0}
        for name in ("a", "b", MEAN)
    ]
    summary = {
        "dataset": "set", "classes": CLASSES, "predictor": "student", "selection": "last", "results": entries,
        "steps": [10, 20], "images_per_step": [{"with_gradient": 4, "without": 0}, {"with_gradient": 8, "without": 2}],
        "training_seconds": seconds, "parameters": 7, "split": "0123",
    }  # fmt: skip
    name = f"{method}-{labels}-{draw}-{fold}-{axes}"
    return Record(name, Path(name), dataset, method, str(labels), draw, 0, fold, axes or {}, labels, scores, summary)


def collected(records, left_out=(), references=()):
    jobs = [{"dataset": r.dataset, "fold": r.fold} for r in records]
    plan = {"baseline": "supervised", "jobs": jobs, "benchmark": {"published": [], "references": list(references)}}
    return Collected("toy", Path(), plan, tuple(records), tuple(left_out), {"set (test)": len(records)})


def rows(analysis, table, **wanted):
    return [row for row in analysis.tables[table] if all(row[key] == value for key, value in wanted.items())]


def sweep(gain=0.05, draws=3, budgets=(2, 4, 8), patients=8, noise=0.01, seed=0):
    generator = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(patients)]
    records = []
    for draw in range(draws):
        for labels in budgets:
            base = 0.5 + 0.1 * math.log2(labels) + generator.normal(0, noise, patients)
            records.append(record("supervised", labels, draw, base, patients=names))
            other = base + gain + generator.normal(0, noise, patients)
            records.append(record("clever", labels, draw, other, patients=names, seconds=20.0))
    return analyse(collected(records))


def test_means_go_from_cases_to_patients_to_classes():
    found = analyse(collected([record("supervised", 2, d, (0.6 + d / 10, 0.8)) for d in range(2)]))
    (row,) = rows(found, "curves", **{"class": "a", "metric": "dice"})
    assert row["mean"] == pytest.approx((0.6 + 0.7 + 0.8 + 0.8) / 4)
    (row,) = rows(found, "curves", **{"class": MEAN, "metric": "dice"})
    assert row["mean"] == pytest.approx((0.6 + 0.7 + 0.8 + 0.8) / 4 - 0.05)
    assert (row["draws"], row["seeds"], row["patients"], row["missed"]) == (2, 1, 2, 1.0)
    assert found.answers["set"] == (
        "Only supervised was run, so nothing is compared.",
        "Only one budget was run, so nothing can be said about how many labels are needed.",
    )


def test_differences_are_paired_by_draw_and_patient():
    base = [(0.5, 0.9), (0.6, 0.7), (0.7, 0.8)]
    gains = [(0.02, 0.04), (0.03, 0.05), (0.01, 0.03)]
    records = [record("supervised", 2, d, base[d]) for d in range(3)]
    records += [record("clever", 2, d, np.add(base[d], gains[d])) for d in (2, 1, 0)]
    (row,) = rows(analyse(collected(records)), "differences", **{"class": MEAN, "metric": "dice"})
    assert row["difference"] == pytest.approx(np.mean(gains))
    assert row["p"] is None
    assert row["draws"] == 3
    patients = np.mean(gains, axis=0)
    assert row["effect_size"] == pytest.approx(patients.mean() / patients.std(ddof=1))


def test_only_draws_that_both_have_are_compared():
    records = [record("supervised", 2, d, (0.5 + d / 10, 0.6 + d / 10)) for d in range(4)]
    records += [record("clever", 2, d, (0.6 + d / 10, 0.7 + d / 10)) for d in (1, 3)]
    (row,) = rows(analyse(collected(records)), "differences", **{"class": MEAN, "metric": "dice"})
    assert (row["draws"], row["difference"]) == (2, pytest.approx(0.1))


def test_folds_are_joined_and_an_incomplete_draw_is_left_out_by_name():
    records = []
    for draw in range(3):
        for fold, patients in enumerate((("p", "q"), ("r", "s"))):
            if (draw, fold) != (2, 1):
                records.append(record("supervised", 2, draw, (0.5, 0.7), fold=fold, patients=patients))
    plan_only = record("supervised", 2, 2, (0.5, 0.7), fold=1, patients=("r", "s"))
    whole = collected([*records, plan_only])
    found = analyse(Collected(whole.name, Path(), whole.plan, tuple(records), (), {}))
    (row,) = rows(found, "curves", **{"class": MEAN, "metric": "dice"})
    assert (row["draws"], row["patients"], row["mean"]) == (2, 4, pytest.approx(0.55))
    assert found.notes == ("supervised at 2 labels, draw 2, seed 0: fold 1 is missing",)


def test_a_variant_is_compared_with_the_baseline_at_the_same_values():
    records = []
    for share in (0.0, 0.5):
        records += [record("supervised", 2, d, (0.5 + share, 0.6), axes={"data.x": share}) for d in range(2)]
        axes = {"data.x": share, "strategy.y": 1}
        records += [record("clever", 2, d, (0.6 + share, 0.7), axes=axes) for d in range(2)]
    own = rows(analyse(collected(records)), "differences", **{"class": MEAN, "metric": "dice"})
    assert {row["method"]: (row["baseline"], round(row["difference"], 6)) for row in own} == {
        "clever (x=0.0, y=1)": ("supervised (x=0.0)", 0.1),
        "clever (x=0.5, y=1)": ("supervised (x=0.5)", 0.1),
    }


def test_savings_areas_and_costs_by_hand():
    records = [record("supervised", n, d, (s, s)) for n, s in ((2, 0.5), (4, 0.6), (8, 0.7)) for d in range(2)]
    records += [record("clever", n, d, (s, s), seconds=30.0) for n, s in ((2, 0.65), (8, 0.75)) for d in range(2)]
    found = analyse(collected(records))
    (row,) = rows(found, "savings", labels=2)
    assert row["factor"] == pytest.approx(2**2.5 / 2)  # half way between 4 and 8 on the log scale
    assert row["gap_closed"] == pytest.approx(0.15 / 0.2)
    (row,) = rows(found, "savings", labels=8)
    assert (row["factor"], row["censored"], row["limit"], row["gap_closed"]) == (math.inf, "above", 1.0, None)
    (row,) = rows(found, "areas", method="clever", scale="log")
    assert row["area"] == pytest.approx(0.65)  # class b scores 0.1 less
    assert row["difference"] == pytest.approx((0.15 + 0.05) / 2)
    (row,) = rows(found, "cost", method="clever", labels=2)
    assert (row["steps"], row["images_with_gradient"], row["images_without"]) == (30, 200, 40)
    assert row["seconds"] == 30.0


def test_a_supported_gain_is_said_with_its_numbers_and_the_labels_it_saves():
    help_, many = sweep(draws=8).answers["set"]
    assert help_.startswith("With ")
    assert "clever gains over supervised (+0.0" in help_
    assert "after Holm" in help_
    assert "too few" not in help_
    assert "times as many labels" in many


def test_a_score_beyond_the_largest_budget_saves_an_unknown_number_of_labels():
    names, records = [f"p{i}" for i in range(8)], []
    for draw in range(8):
        for labels in (2, 8):
            base = np.linspace(0.4, 0.5, 8) + 0.05 * labels + draw / 100
            records.append(record("supervised", labels, draw, base, patients=names))
            gain = 0.05 * (labels == 8) + draw % 2 / 1000
            records.append(record("clever", labels, draw, base + gain, patients=names))
    help_, many = analyse(collected(records)).answers["set"]
    assert help_.startswith("With 8 labelled patients, clever gains")
    assert many.startswith(
        "Supervised does not reach that score with the most labels it was given; supervised reaches "
    )


def test_a_reference_is_in_the_tables_but_is_no_answer():
    found = sweep(draws=8)
    marked = analyse(collected(found.collected.records, references=["clever"]))
    assert marked.tables["differences"] == found.tables["differences"]
    assert "clever" in found.answers["set"][0]
    assert "clever" not in " ".join(marked.answers["set"])


def test_few_draws_are_said_to_be_few():
    found = sweep(draws=3)
    assert "There are too few draws for a test." in found.answers["set"][0]
    assert all(row["p"] is None for row in found.tables["differences"])
    assert all("too few draws for a test" in row["verdict"] for row in found.tables["differences"])


def test_no_gain_is_said_in_words_and_a_loss_too():
    assert sweep(gain=0.0, draws=8).answers["set"][0].startswith("No evidence of a gain over supervised")
    worse = sweep(gain=-0.05, draws=8).answers["set"][0]
    assert worse.startswith("No evidence of a gain")
    assert "clever loses with" in worse


@pytest.mark.parametrize(
    ("low", "high", "p", "draws", "lower", "expected"),
    [
        (0.01, 0.05, 0.01, 8, False, "gain"),
        (0.01, 0.05, 0.20, 8, False, "no evidence of a gain"),
        (0.01, 0.05, None, 3, False, "gain by the interval; too few draws for a test"),
        (-0.05, -0.01, 0.01, 8, False, "loss"),
        (-0.05, -0.01, 0.01, 8, True, "gain"),
        (-0.01, 0.05, 0.01, 8, False, "no evidence of a gain"),
        (None, None, None, 1, False, "fewer than 3 draws: no interval"),
    ],
)
def test_verdicts(low, high, p, draws, lower, expected):
    middle = 0.0 if low is None else (low + high) / 2
    row = {"low": low, "high": high, "p_holm": p, "draws": draws, "difference": middle}
    assert verdict(row, lower_is_better=lower) == expected


def test_p_values_are_adjusted_within_a_class_and_metric():
    found = sweep(draws=8, noise=0.05, gain=0.01)
    own = rows(found, "differences", **{"class": MEAN, "metric": "dice"})
    p = sorted(row["p"] for row in own)
    assert sorted(row["p_holm"] for row in own)[0] == pytest.approx(min(1, 3 * p[0]))


def test_what_was_left_out_reaches_the_tables():
    found = collected([record("supervised", 2, 0, (0.5, 0.6))], [LeftOut("x", "corrupt: torn")])
    assert analyse(found).tables["left_out"] == [{"run": "x", "reason": "corrupt: torn"}]


def test_numbers_for_readers():
    assert [number(None), number(math.inf), number(0.12345), number(0.1, signed=True)] == ["–", "∞", "0.123", "+0.100"]

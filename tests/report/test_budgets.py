"""Curves over what was told on request, and areas under them, against values worked out by hand."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from labeleff.evaluation.tables import read_cases_csv, write_cases_csv
from labeleff.files import file_digest, write_json
from labeleff.report.analysis import analyse, write_export
from labeleff.report.page import exact, write_report
from labeleff.report.terminal import say
from labeleff.sweep.collect import collect

from ..sweep.fake import fake_sweep
from .test_page import Page, check_cells

STEPS = (0, 80, 160, 240, 320)
"""Revisions of the last stage of phantom/ripu."""
RISING = (0.50, 0.60, 0.65, 0.70, 0.72, 0.74)
"""Mean Dice before every revision, and at the end."""


def told(step, labelled, *, foreground=0, boundary=0, slices=None, seconds=None, stage=1):
    """Return a round as summaries have it."""
    return {
        "round": 0, "stage": stage, "step": step, "regions": labelled // 10, "voxels": labelled + 1, "slices": slices,
        "answered": labelled // 10, "labelled": labelled, "foreground": foreground, "boundary": boundary,
        "seconds": seconds, "authors": ["oracle"],
    }  # fmt: skip


def ask(record, dice, rounds):
    """Give a run evaluations and rounds. Patient p scores 0.01 p more than ``dice``; classes lie 0.1 apart."""
    rows = [row for row in read_cases_csv(record.folder / "cases.csv") if row["selection"] == "last"]
    own = []
    for number, mean in enumerate(dice):
        for row in rows:
            patient = int(row["patient"].removeprefix("patient"))
            value = mean + 0.01 * patient + (0.05 if row["class"] == "large" else -0.05)
            selection = "last" if number == len(dice) - 1 else f"round_{number}"
            own.append(row | {"selection": selection, "dice": value})
    write_cases_csv(record.folder / "cases.csv", own)
    summary = json.loads((record.folder / "summary.json").read_text())
    digest = file_digest(record.folder / "cases.csv")
    write_json(record.folder / "summary.json", summary | {"rounds": rounds, "cases_sha256": digest})


def make(folder, methods, *, draws=3, patients=3, **options):
    """Return a sweep in which ``methods`` by name give (dice, rounds) of a draw, or None where they never ask."""
    fake_sweep(
        folder, methods=tuple(methods), budgets=(20,), draws=draws, patients=patients, base="phantom/ripu", **options
    )
    for record in collect(folder).records:
        given = methods[record.method](record.draw)
        if given is not None:
            ask(record, *given)
    return folder


def plain(draw):
    """A baseline: 100 voxels in every round, better draws by 0.01."""
    return [value + 0.01 * draw for value in RISING], [told(step, 100, foreground=10, boundary=5) for step in STEPS]


def uneven(draw):
    """Asks a lot first and nothing in the third round; 0.03 better than the baseline from the second evaluation on."""
    dice = [value + 0.01 * draw + 0.03 * (n > 0) for n, value in enumerate(RISING)]
    amounts = {0: 200, 80: 100, 240: 100, 320: 100}
    return dice, [told(step, n, foreground=n // 2, boundary=n // 4) for step, n in amounts.items()]


def once(draw):
    return [value + 0.01 * draw for value in RISING], [told(0, 500, foreground=125, boundary=50)]


def never(draw):
    return None


def mean_of_patients(value, draws=3, patients=3):
    """Return a mean at draw 0 and patient 0 as the mean over draws and patients."""
    return value + 0.01 * (draws - 1) / 2 + 0.01 * (patients - 1) / 2


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    methods = {"random_foreground": plain, "uneven": uneven, "once": once, "never": never}
    return make(tmp_path_factory.mktemp("rounds"), methods)


@pytest.fixture(scope="module")
def analysis(sweep):
    return analyse(collect(sweep))


def rows(analysis, table, method):
    return [row for row in analysis.tables[table] if row["method"] == method]


def test_costs_are_what_was_told_by_then(analysis):
    own = rows(analysis, "rounds", "uneven")
    assert [row["round"] for row in own] == [0, 1, 2, 3, 4, 5]
    assert [row["voxels"] for row in own] == [0, 200, 300, 300, 400, 500], "nothing was asked in the third round"
    assert [row["regions"] for row in own] == [0, 20, 30, 30, 40, 50]
    assert [row["foreground"] for row in own] == [None, *[0.5] * 5]
    assert [row["boundary"] for row in own] == [None, *[0.25] * 5]
    assert {row["slices"] for row in own} == {row["seconds"] for row in own} == {None}
    for row, value in zip(own, RISING, strict=True):
        assert row["dice"] == pytest.approx(mean_of_patients(value + 0.03 * (row["round"] > 0)))
        assert row["low"] < row["dice"] < row["high"]
        assert (row["draws"], row["patients"]) == (3, 3)
    assert not rows(analysis, "rounds", "never")


def test_the_last_row_is_the_curve_s(analysis):
    for method in ("random_foreground", "uneven", "once"):
        (final,) = (r for r in rows(analysis, "curves", method) if (r["class"], r["metric"]) == ("mean", "dice"))
        last = rows(analysis, "rounds", method)[-1]
        assert (last["dice"], last["low"], last["high"]) == (final["mean"], final["low"], final["high"])


def test_areas_by_hand(analysis):
    (base,), (other,) = rows(analysis, "budget_areas", "random_foreground"), rows(analysis, "budget_areas", "uneven")
    trapezoids = (0.55 + 0.625 + 0.675 + 0.71 + 0.73) / 5
    assert base["area"] == pytest.approx(mean_of_patients(trapezoids))
    assert base["area_low"] < base["area"] < base["area_high"]
    assert (base["baseline"], base["difference"], base["p"], base["verdict"]) == (None, None, None, "")
    # amounts 0, 200, 300, 400, 500; of the two evaluations at 300 the later one, 0.70 + 0.03, counts
    ours = (200 * (0.50 + 0.63) + 100 * (0.63 + 0.73) + 100 * (0.73 + 0.75) + 100 * (0.75 + 0.77)) / 2 / 500
    assert other["area"] == pytest.approx(mean_of_patients(ours))
    assert (other["amounts"], base["amounts"]) == (5, 6)
    assert other["difference"] == pytest.approx(ours - trapezoids)
    assert (other["baseline"], other["draws"], other["patients"]) == ("random_foreground", 3, 3)
    assert other["verdict"] == "gain by the interval; too few draws for a test"
    assert (other["regions"], other["voxels"], other["slices"]) == (50, 500, None)
    assert (other["foreground"], base["foreground"]) == (0.5, 0.1)
    assert base["area_steps"] == pytest.approx(mean_of_patients(sum(RISING) / 6))
    assert other["area_steps"] == pytest.approx(mean_of_patients(sum(RISING) / 6 + 0.03 * 5 / 6))


def test_who_asks_once_has_no_curve(analysis):
    (row,) = rows(analysis, "budget_areas", "once")
    assert [row[key] for key in ("area", "area_low", "difference", "low", "p", "p_holm")] == [None] * 6
    assert (row["amounts"], row["verdict"]) == (2, "asks once: no curve")
    assert row["area_steps"] == pytest.approx(mean_of_patients(sum(RISING) / 6))
    assert (row["voxels"], row["foreground"], row["boundary"]) == (500, 0.25, 0.1)
    assert not rows(analysis, "budget_areas", "never")


def test_each_run_is_measured_over_its_own_budget(tmp_path):
    def stingy(
        draw,
    ):  # a tenth of what the baseline is told in the first draw: the same curve, as steep in its own terms
        return plain(draw)[0], [told(step, 10 if draw == 0 else 100) for step in STEPS]

    found = analyse(collect(make(tmp_path, {"random_foreground": plain, "stingy": stingy})))
    (row,) = rows(found, "budget_areas", "stingy")
    assert row["difference"] == pytest.approx(0)
    assert row["voxels"] == pytest.approx((50 + 500 + 500) / 3)
    assert row["foreground"] == 0, "nothing was foreground, but something was told"


def test_volumes_have_slices_and_people_take_time(tmp_path):
    def volumes(draw):
        rounds = [told(s, 100, foreground=draw, slices=4, seconds=30.0 if s else None) for s in STEPS]
        return plain(draw)[0], [told(10, 300, foreground=3, slices=2, stage=0), *rounds]

    found = analyse(collect(make(tmp_path, {"random_foreground": volumes})))
    own = rows(found, "rounds", "random_foreground")
    assert [row["slices"] for row in own] == [2, 6, 10, 14, 18, 22], "an earlier stage asked, too"
    assert [row["voxels"] for row in own] == [300, 400, 500, 600, 700, 800]
    assert [row["seconds"] for row in own] == [0, 0, 30, 60, 90, 120]
    assert own[0]["foreground"] == pytest.approx(0.01)
    assert own[-1]["foreground"] == pytest.approx((3 + 5 * 1) / 800), "over all runs: their mean is 1 voxel a round"
    (row,) = rows(found, "budget_areas", "random_foreground")
    assert row["slices"] == 22
    assert row["area"] == pytest.approx(mean_of_patients((0.55 + 0.625 + 0.675 + 0.71 + 0.73) / 5))


def test_only_draws_that_both_have_are_compared(tmp_path):
    def better(draw):
        return [value + (0.1, 0.2, 0.3, 9.9)[draw] for value in plain(draw)[0]], plain(draw)[1]

    folder = make(tmp_path, {"random_foreground": plain, "better": better}, draws=4, left_out=("better-n20-d3",))
    found = analyse(collect(folder))
    (row,) = rows(found, "budget_areas", "better")
    assert (row["draws"], row["difference"]) == (3, pytest.approx(0.2))
    assert rows(found, "budget_areas", "random_foreground")[0]["draws"] == 4
    assert [entry["draws"] for entry in rows(found, "rounds", "better")] == [3] * 6


def test_p_values_are_adjusted_over_the_methods_that_are_compared(tmp_path):
    def shifted(by):
        # patients and draws agree only roughly, or there would be no spread to test against
        return lambda draw: ([v + by + 0.01 * (-1) ** draw for v in plain(draw)[0]], plain(draw)[1])

    methods = {"random_foreground": plain, "better": shifted(0.03), "same": shifted(0.001), "once": once}
    found = analyse(collect(make(tmp_path, methods, draws=6)))
    (better,), (same,) = rows(found, "budget_areas", "better"), rows(found, "budget_areas", "same")
    assert better["p"] < 0.025 < 0.05 < same["p"]
    assert better["p_holm"] == pytest.approx(2 * better["p"])
    assert same["p_holm"] == pytest.approx(same["p"])
    assert (better["verdict"], same["verdict"]) == ("gain", "no evidence of a gain")
    last = found.answers["phantom"][-1]
    assert last.startswith(
        "Over the whole budget of questions, better beats random_foreground (area under the budget curve +0.030 Dice"
    )
    assert "same" not in last


def test_a_baseline_that_is_not_beaten_heads_the_answer(tmp_path):
    def worse(draw):
        return [value - 0.1 + 0.001 * draw for value in plain(draw)[0]], plain(draw)[1]

    found = analyse(collect(make(tmp_path / "a", {"random_foreground": plain, "worse": worse})))
    first = found.answers["phantom"][0]
    assert first.startswith(
        "No evidence that any method beats random_foreground over the budget of questions (the largest difference"
    )
    assert first.count("worse") == 2, "as the largest difference, and as a loss"
    assert len(found.answers["phantom"]) == 3
    few = analyse(collect(make(tmp_path / "b", {"random_foreground": plain, "worse": worse}, draws=2)))
    assert few.answers["phantom"][0].startswith("With fewer than 3 draws")
    alone = analyse(collect(make(tmp_path / "c", {"once": once, "uneven": uneven})))
    assert alone.answers["phantom"][0] == "No budget curve is compared with one of once."
    assert rows(alone, "budget_areas", "uneven")[0]["verdict"] == ""


def test_runs_without_evaluations_per_round_have_no_curve(tmp_path):
    folder = make(tmp_path, {"random_foreground": lambda draw: ((0.7,), plain(draw)[1])})
    tables = analyse(collect(folder)).tables
    assert tables["rounds"] == tables["budget_areas"] == []


def test_the_page_the_terminal_and_the_figure_show_them(analysis, tmp_path, capsys):
    text = write_report(analysis, tmp_path).read_text()
    assert 'href="#budget"' in text
    check_cells(tmp_path, Page(text))
    for name, column in (
        ("budget_areas", "area"),
        ("budget_areas", "area_steps"),
        ("rounds", "voxels"),
        ("rounds", "dice"),
    ):
        shown = re.findall(rf'data-table="{name}" data-row="(\d+)" data-column="{column}" data-value="([^"]*)"', text)
        assert sorted(shown) == sorted((str(i), exact(row[column])) for i, row in enumerate(analysis.tables[name]))
    assert "asks once: no curve" in text
    assert "Slices" not in text, "these are images"
    drawn = (tmp_path / "figures" / "budget-phantom.svg").read_text()
    assert ElementTree.fromstring(drawn).get("role") == "img"
    say(analysis)
    said = " ".join(capsys.readouterr().out.split())
    assert "Over the whole budget of questions, uneven beats random_foreground" in said
    assert "asks once: no curve" in said


def test_curves_markers_and_lines(analysis):
    from labeleff.report.figures import budget_curves, drawing, styles

    tables = analysis.tables
    main = [row for row in tables["curves"] if (row["class"], row["metric"]) == ("mean", "dice")]
    looks = styles(["random_foreground", "uneven", "once", "never"], "random_foreground")
    with drawing("x"):
        (axes,) = budget_curves(tables["rounds"], tables["budget_areas"], main, looks).axes
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    own = {row["voxels"]: row["dice"] for row in rows(analysis, "rounds", "uneven")}
    assert list(own.items()) in lines, "of two evaluations at 300 voxels the later one"
    assert [(500, rows(analysis, "rounds", "once")[-1]["dice"])] in lines, "a marker at its end"
    flat = next(row["mean"] for row in main if row["method"] == "never")
    assert [(0, flat), (1, flat)] in lines
    assert len(axes.collections) == 3, "two bands, and the interval of who asks once"
    assert budget_curves([], [], main, looks) is None


def test_sweeps_without_rounds_do_not_speak_of_a_budget(tmp_path, capsys):
    found = analyse(collect(fake_sweep(tmp_path, methods=("supervised", "bcp"), budgets=(2,), draws=3)))
    text = write_report(found, tmp_path / "report").read_text()
    assert "#budget" not in text
    assert "budget curve" not in text
    assert len(found.answers["phantom"]) == 2
    say(found)
    assert "budget curve" not in capsys.readouterr().out


def test_the_table_of_the_readme(analysis, tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "tables.py"
    specification = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    write_export(analysis, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    lines = tables.compared("queries_phantom", result)
    (once_,) = (line for line in lines if line.startswith("| once |"))
    assert once_ == "| once | 50 | 25 |  |  | asks once: no curve |"
    (base,) = (row for row in result["tables"]["budget_areas"] if row["method"] == "random_foreground")
    interval = f"{base['area']:.3f} [{base['area_low']:.3f}, {base['area_high']:.3f}]"
    assert f"| random_foreground | 50 | 10 | {interval} |  |  |" in lines
    assert not any("slices" in line for line in lines)
    volumes = [row | {"slices": 12.0} for row in result["tables"]["budget_areas"]]
    assert "| once | 50 | 12 | 25 |  |  | asks once: no curve |" in tables.asked(volumes, "random_foreground")
    del result["tables"]["budget_areas"]  # older results
    assert not any("budget curve [" in line for line in tables.compared("queries_phantom", result))

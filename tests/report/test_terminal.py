"""What sweeps and runs say on the terminal and in TensorBoard."""

import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from labeleff.errors import RunError
from labeleff.report.analysis import analyse
from labeleff.report.terminal import compare_runs, forecast, say, write_tensorboard
from labeleff.sweep.collect import collect, run_folder

from ..sweep.fake import fake_sweep


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    fake_sweep(folder, methods=["supervised", "bcp"], budgets=[1, 2, 4, 8], draws=4, gain={"bcp": 0.05}, noise=0.01)
    return collect(folder)


def test_the_answer_and_the_table_are_printed(found, capsys):
    say(analyse(found))
    said = capsys.readouterr().out
    assert "bcp gains over supervised" in said
    assert "too few draws for a test" in said


def test_tensorboard_holds_every_run_and_a_curve_per_method(found, tmp_path):
    analysis = analyse(found)
    write_tensorboard(analysis, tmp_path / "board")
    write_tensorboard(analysis, tmp_path / "board")  # again: replaced, not added to
    assert len(list((tmp_path / "board" / "runs").iterdir())) == len(found.records)
    (curve,) = (tmp_path / "board" / "curves").glob("*-bcp")
    events = EventAccumulator(str(curve))
    events.Reload()
    points = events.Scalars("dice by labelled patients")
    expected = {
        row["labels"]: row["mean"]
        for row in analysis.tables["curves"]
        if (row["method"], row["class"], row["metric"]) == ("bcp", "mean", "dice")
    }
    assert {point.step: point.value for point in points} == pytest.approx(expected)


def test_runs_side_by_side(found, capsys):
    one, two = (
        next(r for r in found.records if (r.method, r.labels, r.draw) == (m, 4, 0)) for m in ("supervised", "bcp")
    )
    rows = compare_runs([one.folder, two.folder])
    ours, theirs = (list(record.scores["mean", "dice"].values()) for record in (two, one))
    assert rows[1]["difference"] == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    assert "no ranking can be read from this" in capsys.readouterr().out


def test_a_torn_run_is_not_compared(found, tmp_path):
    record = found.records[0]
    shutil.copytree(record.folder, tmp_path / "run")
    (tmp_path / "run" / "cases.csv").write_text("")
    with pytest.raises(RunError, match="corrupt"):
        compare_runs([record.folder, tmp_path / "run"])
    with pytest.raises(RunError, match="missing"):
        compare_runs([run_folder(tmp_path, "nothing")])


def test_forecasts_say_what_they_stand_on_or_why_there_is_none(found, capsys):
    (result,) = forecast(found, 0.7, upto=4)
    assert set(result["checked"]) == {8}
    said = capsys.readouterr().out
    assert "from 3 budgets, 1 to 4" in said
    assert "at 8: forecast" in said
    (refused,) = forecast(found, 0.7, upto=2)
    assert "at least 3 label budgets" in refused["refused"]
    assert "no forecast" in capsys.readouterr().out
    (unknown,) = forecast(found, 0.7, method="nobody")
    assert "refused" in unknown

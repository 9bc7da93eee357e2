"""The shipped smoke benchmark from the command line: three methods, one budget, one draw; then its page."""

import csv

from typer.testing import CliRunner

from labeleff.cli import app


def test_smoke(tmp_path, monkeypatch):
    few = ["labelled=[2]", "draws=1", "steps=10", "methods=[supervised, mean_teacher, bcp]"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sweep", "smoke", *few, "--cache", "cache", "--workers", "2"])
    assert done.exit_code == 0, done.output
    told = CliRunner().invoke(app, ["report"])
    assert told.exit_code == 0, told.output
    assert "no interval can be given" in told.output
    page = tmp_path / "runs" / "sweeps" / "smoke" / "report"
    assert (page / "index.html").stat().st_size > 10_000
    with (page / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3

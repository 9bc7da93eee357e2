"""The shipped smoke benchmark from the command line: three methods, one budget, one draw; then its page."""

import csv
import subprocess
import sys

from typer.testing import CliRunner

from labeleff.cli import app


def test_smoke(tmp_path, monkeypatch):
    few = ["labelled=[2]", "draws=1", "steps=10", "methods=[supervised, mean_teacher, bcp]"]
    command = [sys.executable, "-m", "labeleff", "sweep", "smoke", *few, "--cache", "cache", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["report"])
    assert told.exit_code == 0, told.output
    assert "no interval can be given" in told.output
    page = tmp_path / "runs" / "sweeps" / "smoke" / "report"
    assert (page / "index.html").stat().st_size > 10_000
    with (page / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3

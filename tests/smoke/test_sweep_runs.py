"""The shipped smoke benchmark from the command line: three methods, one budget, one draw; then its page."""

import csv
import subprocess
import sys


def labeleff(*arguments, folder):
    command = [sys.executable, "-m", "labeleff", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_smoke(tmp_path):
    few = ["labelled=[2]", "draws=1", "steps=10", "methods=[supervised, mean_teacher, bcp]"]
    done = labeleff("sweep", "smoke", *few, "--cache", "cache", "--workers", "2", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = labeleff("report", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no interval can be given" in done.stdout
    page = tmp_path / "runs" / "sweeps" / "smoke" / "report"
    assert (page / "index.html").stat().st_size > 10_000
    with (page / "runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3

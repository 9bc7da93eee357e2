"""The way from a folder to a first result that docs/your_data.md shows: its commands run, and print what it says they print."""

import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
from typer.testing import CliRunner

from labeleff.cli import app

PAGE = (Path(__file__).parent.parent / "docs" / "your_data.md").read_text()
SHORT = {"run": ["stages.0.steps=2", "stages.1.steps=2", "baseline.0.steps=2"]}
"""What a command gets beside the page's words, since the training shown there takes minutes."""


def shown():
    """Yield the commands of the transcript, each with the lines shown below it."""
    (transcript,) = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for part in transcript.split("$ labeleff ")[1:]:
        command, *lines = part.strip().splitlines()
        yield shlex.split(command), [line for line in lines if line != "…"]


def test_the_transcript_of_the_page(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (script,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "phantom.generate" in code]
    exec(compile(script, "your_data.md", "exec"), {})
    commands = list(shown())
    assert len(commands) <= 6
    for words, lines in commands:
        more = [*SHORT[words[0]], "--cache", str(cache)] if words[0] in SHORT else []
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, *more])
        assert done.exit_code == 0, (words, done.output)
        if words[0] not in SHORT:
            said = " ".join(done.output.split())
            for line in lines:
                assert re.sub(r"[\d.]+ s\b", "", " ".join(line.split())) in re.sub(r"[\d.]+ s\b", "", said), line
    scan, label = (nib.load(name) for name in ("new/scan12.nii.gz", "scan12_label.nii.gz"))
    assert label.shape == scan.shape
    assert np.array_equal(label.affine, scan.affine)

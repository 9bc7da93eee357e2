"""What the doctor sees, on machines that are well and on those that are not."""

import shutil
from collections import namedtuple
from importlib import metadata

import torch
from typer.testing import CliRunner

from labeleff import doctor
from labeleff.cli import app

Usage = namedtuple("Usage", "total used free")


def states(found, what):
    return [(one.state, one.words) for one in found if one.what == what]


def test_versions_with_known_faults_are_named_with_the_remedy(monkeypatch):
    real = metadata.version
    wrong = {"torch": "2.9.0", "pytorch-lightning": "2.6.2", "omegaconf": "2.3.0"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: wrong.get(name) or real(name))
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda name: [
            "torch!=2.9.0,>=2.6", "pytorch-lightning!=2.6.2,!=2.6.3,>=2.5", "omegaconf>=2.4", "numpy>=2.0",
            "no-such-package-here>=1", "ray>=2.40; extra == 'ray'",
        ],
    )  # fmt: skip
    found = states(doctor.examine(), "packages")
    assert {state for state, _ in found} == {"bad"}
    named = [words.split(" ")[0] for _, words in found]
    assert named == ["torch", "pytorch-lightning", "omegaconf", "no-such-package-here"]
    assert "pip install 'torch!=2.9.0,>=2.6'" in found[0][1]


def test_folders_data_and_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABELEFF_DATA", str(tmp_path / "gone"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * 2**30, 0, 2**30))
    found = doctor.examine(cache=tmp_path / "a" / "b")
    assert states(found, "data")[0][0] == "bad"
    assert "which is no folder" in states(found, "data")[0][1]
    assert states(found, "prepared images") == [
        ("bad", f"{tmp_path / 'a' / 'b'}, 1.0 GiB free: too little for checkpoints and prepared images; make room")
    ]
    monkeypatch.setenv("LABELEFF_DATA", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * 2**30, 0, 50 * 2**30))
    (tmp_path / "set").mkdir()
    found = doctor.examine(cache=tmp_path)
    assert states(found, "data") == [("good", f"LABELEFF_DATA is {tmp_path}, with 1 folder(s)")]
    assert states(found, "this folder")[0][0] == "good"
    monkeypatch.delenv("LABELEFF_DATA")
    assert states(doctor.examine(cache=tmp_path), "data")[0][0] == "note"
    (tmp_path / "file").write_text("")
    bad = doctor.examine(cache=tmp_path / "file")
    assert states(bad, "prepared images")[0][0] == "bad"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("set", "file")]


def test_a_gpu_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    ((state, words),) = states(doctor.examine(), "gpu")
    assert state == "bad"
    assert words.startswith("Card (cuda:0) fails")
    assert "\n" not in words


def test_the_exit_code_says_whether_something_is_wrong(monkeypatch):
    for state, code in (("note", 0), ("bad", 1)):
        monkeypatch.setattr(doctor, "examine", lambda cache=None, state=state: [doctor.Finding(state, "x", "words")])
        result = CliRunner().invoke(app, ["doctor"])
        assert (result.exit_code, result.output.strip()) == (code, f"{state:<4}  x: words")

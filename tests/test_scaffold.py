"""What ``labeleff new`` writes runs and keeps the contract."""

import ast
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.testing import checks


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_new_strategy_keeps_its_contract_and_runs(tmp_path, cache, own_registry, monkeypatch):
    done = invoke("new", "strategy", "my_idea", "--folder", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_idea.py", "my_idea.yaml", "test_my_idea.py"]
    assert f"labeleff run {tmp_path / 'my_idea.yaml'} --plugin {tmp_path / 'my_idea.py'}" in done.output

    text = (tmp_path / "my_idea.py").read_text()
    described = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    lines = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in described]
    assert len(lines) < 25

    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_idea", "test_my_idea"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    contract = import_module("test_my_idea").test_contract
    for check in checks():
        contract(check)

    short = [f"{part}.0.steps=2" for part in ("stages", "baseline")]
    small = ["data.dataset.patients=4", "data.dataset.test=1", "evaluation.pictures=false"]
    run = ["run", tmp_path / "my_idea.yaml", *short, *small, "--folder", tmp_path / "run", "--cache", cache]
    done = invoke(*run, "--plugin", tmp_path / "my_idea.py")
    assert done.exit_code == 0, done.stderr
    assert "entropy" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-idea", "lower-case letters"),
        ("class", "lower-case letters"),
        ("bcp", "is a strategy of labeleff"),
        ("random", "the name of a Python module"),
        ("mine", "is there already"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path, name, message):
    (tmp_path / "test_mine.py").write_text("mine")
    refused = invoke("new", "strategy", name, "--folder", tmp_path)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]

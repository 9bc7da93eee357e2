"""The command line as a stranger meets it."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from labeleff.checking import estimate
from labeleff.cli import app
from labeleff.cli.shared import complete_recipe
from labeleff.errors import SplitError
from labeleff.recipe_io import load_recipe

from .conftest import tiny


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny(stages=[{"strategy": "supervised", "steps": 2, "batch": 2}])))
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_run_then_run_again(recipe, tmp_path, cache):
    first = invoke("run", recipe, "--folder", tmp_path / "run", "--cache", cache)
    assert first.exit_code == 0, first.output
    assert (tmp_path / "run" / "summary.json").exists()
    again = invoke("run", recipe, "--folder", tmp_path / "run", "--cache", cache)
    assert again.exit_code == 0
    changed = invoke("run", recipe, "seed=5", "--folder", tmp_path / "run", "--cache", cache)
    assert changed.exit_code == 2
    assert "seed: 0 -> 5" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_check_estimates_without_opening_test_labels(recipe, cache, monkeypatch, tmp_path):
    from labeleff.data.formats.phantom import Phantom

    opened = []
    plain = Phantom.read_label
    monkeypatch.setattr(Phantom, "read_label", lambda self, case: opened.append(case.role) or plain(self, case))
    monkeypatch.chdir(tmp_path)
    done = invoke("check", recipe, "--cache", cache)
    assert done.exit_code == 0, done.output
    assert set(opened) == {"train"}
    assert list(tmp_path.iterdir()) == [recipe]  # nothing is left behind


def test_show_and_diff(recipe):
    assert "labelled: 2" in invoke("show", recipe).output
    assert invoke("show", recipe, "seed=3", "--diff", recipe).output.strip() == "seed: 0 -> 3"


def test_list():
    assert "bcp_pretrain" in invoke("list", "strategies").output
    assert "decay" in invoke("list", "strategies", "bcp").output
    assert "quickstart" in invoke("list", "recipes").output
    for kind, name in (("annotators", "pseudo_labels"), ("backbones", "segresnet"), ("datasets", "phantom")):
        assert name in invoke("list", kind).output
    wrong = invoke("list", "strategy")
    assert wrong.exit_code == 2
    assert "Did you mean 'strategies'?" in wrong.stderr


def test_one_line_and_exit_code_2(recipe):
    wrong = invoke("run", recipe, "stages.0.stepz=1")
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: tiny.yaml: stages.0.stepz: unknown key. Did you mean 'steps'?")
    assert wrong.stderr.count("\n") == 1
    debugged = invoke("run", recipe, "stages.0.stepz=1", "--debug")
    assert type(debugged.exception).__name__ == "RecipeError"


def test_plugin_from_the_command_line_only(tmp_path, recipe, own_registry):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from labeleff import register\n"
        "from labeleff.strategies.supervised import Supervised\n"
        "@register('strategy', 'mine')\n"
        "class Mine(Supervised):\n"
        "    '''Mine.'''\n"
    )
    show = ("show", recipe, "stages.0.strategy=mine")
    refused = invoke(*show)
    assert refused.exit_code == 2
    assert "unknown strategy 'mine'" in refused.stderr
    taken = invoke(*show, "--plugin", plugin)
    assert taken.exit_code == 0, taken.stderr
    assert "mine" in taken.output
    assert invoke(*show, "--plugin", tmp_path / "none.py").exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "strategies"]])
def test_help_and_lists_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom labeleff.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'omegaconf', 'monai'} & set(sys.modules), 'heavy import'\n"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    assert taken < 3  # far above the quarter of a second of CPU that it takes, however busy the machine


def test_completion_knows_the_shipped_recipes():
    assert "quickstart" in list(complete_recipe("quick"))


def test_check_counts_the_networks_of_all_parts(cache):
    folded = {"strategy": "supervised", "annotator": "confident_learning", "folds": 2, "start": "fresh", "steps": 5}
    after = {"strategy": "supervised", "start": "fresh", "steps": 3}
    data = tiny()["data"] | {"labelled": 4}
    cost = estimate(load_recipe(tiny(data=data, stages=[after], baseline=[folded, after])), cache=cache)
    assert list(cost["steps"].values()) == [5, 5, 3, 3]
    many = tiny(data=data, stages=[after], baseline=[folded | {"folds": 5}, after])
    with pytest.raises(SplitError, match="4 patients are labelled"):
        estimate(load_recipe(many), cache=cache)


def test_check_where_nothing_is_evaluated(cache):
    data = tiny()["data"] | {"evaluate_on": "none"}
    stage = {"strategy": "supervised", "annotator": "label_quality", "folds": 2, "start": "fresh", "steps": 5}
    cost = estimate(load_recipe(tiny(data=data, stages=[stage])), cache=cache)
    assert cost["evaluation_seconds"] == 0
    assert cost["notes"] == ["nothing was evaluated (data.evaluate_on: none)"]  # and nothing of wide intervals
    assert list(cost["steps"].values()) == [5, 5]

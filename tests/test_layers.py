"""Imports go downwards; heavy libraries stay where they belong. Read from the syntax trees, nothing is imported."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "labeleff"
LAYERS = {
    1: ("errors", "files", "machine", "batch", "edits", "registry", "plugins", "functional"),
    2: ("data", "backbones", "evaluation"),
    3: ("strategies", "annotators"),
    4: ("recipe", "convert", "recipe_io", "learner", "testing", "index", "pages"),
    5: (
        "rundir",
        "runlog",
        "signals",
        "process",
        "labels",
        "prepared",
        "prepare",
        "describing",
        "results",
        "asking",
        "reviewing",
        "folds",
        "diagnostics",
        "runner",
        "checking",
        "evaluating",
        "doctor",
        "predictor",
        "predict",
        "unseen",
        "export",
        "export_onnx",
        "parity",
        "export_labels",
        "corruption",
        "inspecting",
        "suspects",
        "scaffold",
        "proposing",
        "report",
        "bundle",
        "sweep",
    ),
    6: ("cli", "__main__", "__init__"),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


@cache
def imports(path, *, top_only=False):
    """Return every module that a file imports."""
    tree, found = ast.parse(path.read_text()), []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name):
    mine = LAYER_OF[name.split(".")[0]]
    for target in imports(MODULES[name]):
        if target.startswith("labeleff."):
            head = target.split(".")[1]
            if head in LAYER_OF and name != "__init__":
                assert LAYER_OF[head] <= mine, f"{name} (layer {mine}) imports {target} (layer {LAYER_OF[head]})"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("pytorch_lightning", {"learner", "runner"}),
        ("omegaconf", {"recipe_io"}),
        ("typer", {name for name in MODULES if name.startswith("cli.")}),
        ("ray", {"sweep.cluster"}),
        ("onnxruntime", {"export_onnx"}),
        (
            "monai",
            {
                "backbones.monai",
                "backbones.transformers",
                "export",
                "evaluation.inference",
                "evaluation.metrics",
                "sweep.preload",
            },
        ),
    ],
)
def test_libraries_stay_where_they_belong(library, allowed):
    users = {name for name, path in MODULES.items() if any(t.split(".")[0] == library for t in imports(path))}
    assert users <= allowed


def test_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "numpy", "omegaconf", "monai", "pytorch_lightning", "scipy"}
    for name in [*(name for name in MODULES if name.startswith("cli.")), "__init__", "errors", "__main__"]:
        found = {target.split(".")[0] for target in imports(MODULES[name], top_only=True)}
        assert not found & heavy


def test_methods_do_not_import_one_another():
    for kind in ("strategies", "annotators"):
        for name, path in MODULES.items():
            if name.startswith(kind + "."):
                others = [
                    t
                    for t in imports(path)
                    if t.startswith(f"labeleff.{kind}.") and not t.startswith(f"labeleff.{kind}.base")
                ]
                assert not others, f"{name} imports {others}"


def test_there_is_no_cycle():
    graph = {
        name: {t.removeprefix("labeleff.") for t in imports(path, top_only=True)} & MODULES.keys()
        for name, path in MODULES.items()
    }
    done, walking = set(), []

    def visit(name):
        assert name not in walking, f"cycle: {' -> '.join([*walking, name])}"
        if name not in done:
            walking.append(name)
            for other in graph[name]:
                visit(other)
            done.add(walking.pop())

    for name in graph:
        visit(name)

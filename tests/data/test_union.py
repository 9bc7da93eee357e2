"""Data sets side by side: domains, prefixes, and recipes that name them."""

import json

import numpy as np
import pytest

from labeleff import registry
from labeleff.data.formats.phantom import Phantom
from labeleff.errors import DataError, RecipeError
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.registry import Component
from labeleff.runner import run
from labeleff.sweep.grid import told
from tests.conftest import tiny

SMALL = {"patients": 3, "test": 1, "size": (32, 32), "slices": 2}


def union(**parts):
    return registry.build("dataset", "union", parts=parts)


def test_cases_keep_their_roles_and_get_a_domain():
    data = union(one=Component("phantom", SMALL), two=Component("phantom", {**SMALL, "seed": 7}))
    manifest = data.manifest()
    assert {c.domain for c in manifest.cases} == {"one", "two"}
    plain = Phantom(**SMALL, seed=7)
    for case in plain.manifest().cases:
        mine = manifest.case(f"two_{case.id}")
        assert (mine.patient, mine.role, mine.spacing) == (f"two_{case.patient}", case.role, case.spacing)
        assert np.array_equal(data.read_image(mine), plain.read_image(case))
        assert np.array_equal(data.read_label(mine), plain.read_label(case))
        assert data.fingerprint(mine) == plain.fingerprint(case)


def test_raters_are_those_of_the_part():
    data = union(one=Component("phantom", {**SMALL, "raters": 3}))
    plain = Phantom(**SMALL, raters=3)
    case, own = data.manifest().cases[0], plain.manifest().cases[0]
    assert np.array_equal(data.read_votes(case), plain.read_votes(own))


def test_official_orders_follow_one_another(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "train.list").write_text("x\ny\n")
        (tmp_path / part / "test.list").write_text("z\n")
    manifest = union(**{p: Component("compact", {"path": str(tmp_path / p)}) for p in ("a", "b")}).manifest()
    assert manifest.official == ("a_x", "a_y", "b_x", "b_y")


def test_parts_must_agree(tmp_path):
    (tmp_path / "train.list").write_text("x\n")
    (tmp_path / "test.list").write_text("z\n")
    with pytest.raises(DataError, match="union: the classes of two"):
        union(one=Component("phantom", SMALL), two=Component("compact", {"path": str(tmp_path)})).manifest()
    with pytest.raises(
        DataError, match=r"union: the axes of two \(phantom\) are 3, those of one \(phantom\) 2; choose options"
    ):
        union(one=Component("phantom", SMALL), two=Component("phantom", {"ndim": 3})).manifest()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "parts names no data set"),
        ({"../a": {"name": "phantom"}}, "becomes part of file names"),
        ({"a": {"name": "os.system"}}, r"data\.dataset\.parts\.a: unknown dataset 'os\.system'"),
        ({"a": {"name": "phantom", "colour": 1}}, r"data\.dataset\.parts\.a\.colour: phantom has no such option"),
        ({"a": {"name": "phantom", "patients": "many"}}, r"data\.dataset\.parts\.a\.patients: 'many' is not a whole"),
        ({"a": {"name": "phantom", "ndim": 7}}, r"data\.dataset\.parts\.a: .*ndim is 2 or 3"),
        ({"a": {"path": "x"}}, r"data\.dataset\.parts\.a: write a name"),
    ],
)
def test_bad_parts_are_one_clear_line(parts, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny(data={"dataset": {"name": "union", "parts": parts}}))


def recipe(**changes):
    small = {"name": "phantom", **SMALL, "size": [32, 32]}
    parts = {"source": small, "target": {**small, "seed": 5}}
    data = {
        "dataset": {"name": "union", "parts": parts}, "source": ["source"], "target": ["target"], "labelled": 2,
        "patch": [32, 32],
    }  # fmt: skip
    return load_recipe(tiny(data=data, stages=[{"strategy": "supervised", "steps": 2, "batch": 2}], **changes))


def test_recipes_spell_out_and_tell_apart_what_is_within():
    one = recipe()
    part = one.data.dataset.options["parts"]["source"]
    assert part.options["size"] == (32, 32)
    assert part.options["sites"] == 1  # a default, spelt out
    assert load_recipe(to_mapping(one)) == one
    kept = json.dumps(told(one.data))
    assert '"seed": 5' in kept
    assert '"sites"' not in kept
    changed = load_recipe(to_mapping(one), ["data.dataset.parts.target.seed=6"])
    assert changed.data.dataset.options["parts"]["target"].options["seed"] == 6


def test_a_run_over_two_parts(tmp_path, cache):
    summary = run(recipe(), tmp_path / "run", cache=cache)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert all(name.startswith("source_") for name in split["labelled"])
    assert all(name.startswith("target_") for name in split["unlabelled"] + split["test"])
    assert summary["dataset"] == "phantom"

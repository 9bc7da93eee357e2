"""Label noise asked for in a recipe: made once, stored, and nowhere near the test labels."""

import json

import numpy as np
import pytest
from PIL import Image

from labeleff import registry
from labeleff.data.annotations import AnnotationStore
from labeleff.errors import RecipeError, SplitError
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.runner import run
from tests.conftest import tiny

NOISE = {"name": "distance", "target_dice": 0.7, "seed": 5}
STAGES = [{"strategy": "supervised", "steps": 2, "batch": 2}]


def noisy(**changes):
    recipe = tiny(stages=STAGES)
    recipe["data"] = recipe["data"] | {"noise": NOISE} | changes
    return load_recipe(recipe)


def test_the_store_begins_with_the_wrong_labels_and_hides_the_right_ones(tmp_path, cache):
    data = prepare(noisy(), tmp_path, cache=cache)
    hidden, model = AnnotationStore.open(tmp_path / "hidden"), registry.build("noise", **NOISE)
    for case in data.split.labelled:
        clean = data.dataset.read_label(data.manifest.case(case))
        spacing = data.manifest.case(case).spacing
        expected = model.corrupt(clean, case=case, names=data.manifest.classes, spacing=spacing).label
        np.testing.assert_array_equal(data.annotations.read(case, revision=0), expected)
        np.testing.assert_array_equal(hidden.read(case, revision=0), clean)
        assert (expected != clean).any()
    found = json.loads((tmp_path / "noise.json").read_text())
    assert found["model"]["name"] == "distance"
    assert found["model"]["target_dice"] == 0.7
    assert found["cases"] == len(data.split.labelled)
    assert found["labels_sha256"] == data.annotations.digest()


def test_noise_of_a_case_does_not_depend_on_the_budget(tmp_path, cache):
    few, more = (prepare(noisy(labelled=n), tmp_path / str(n), cache=cache) for n in (1, 3))
    for case in few.split.labelled:
        np.testing.assert_array_equal(few.annotations.read(case, revision=0), more.annotations.read(case, revision=0))


def test_a_run_that_goes_on_keeps_its_labels(tmp_path, cache):
    digest = prepare(noisy(), tmp_path, cache=cache).annotations.digest()
    assert prepare(noisy(), tmp_path, cache=cache).annotations.digest() == digest


def test_noisy_cases_can_be_dropped(tmp_path, cache):
    model = registry.build("noise", **NOISE | {"share": 0.5})
    data = prepare(noisy(noise=NOISE | {"share": 0.5}, drop_noisy=True, labelled=6), tmp_path, cache=cache)
    gone = [i for i in data.split.unlabelled if model.touches(i)]
    assert not any(model.touches(i) for i in data.split.labelled)
    assert gone
    assert not any(data.annotations.known(i, 0) for i in gone)
    assert "wrong labels" in data.split.notes[-1]
    with pytest.raises(SplitError, match="every labelled case"):
        prepare(noisy(drop_noisy=True), tmp_path / "all", cache=cache)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": {"name": "distanse"}}, "Did you mean 'distance'"),
        ({"noise": {"name": "distance", "target": 0.8}}, "no such option"),
        ({"noise": {"name": "distance", "over": 2.0}}, "over"),
        ({"noise": None, "drop_noisy": True}, "no label noise"),
    ],
)
def test_mistakes_are_named(changes, said):
    with pytest.raises(RecipeError, match=said):
        noisy(**changes)


def test_a_recipe_with_noise_survives_writing(tmp_path):
    recipe = noisy(noise=NOISE | {"per_class": {"small": {"target_dice": 0.5}}})
    assert load_recipe(to_mapping(recipe)) == recipe


def test_what_noise_did_is_drawn(tmp_path, cache):
    recipe = to_mapping(noisy(labelled=3, slices=None)) | {"evaluation": {"pictures": True}}
    run(load_recipe(recipe), tmp_path / "run", cache=cache)
    drawn = sorted(path.name for path in (tmp_path / "run" / "pictures" / "noise").iterdir())
    assert drawn == ["best.png", "median.png", "worst.png"]
    assert Image.open(tmp_path / "run" / "pictures" / "noise" / "worst.png").size[0] > 300


def test_only_labelled_slices_are_known_after_noise(tmp_path, cache):
    data = tiny(stages=STAGES)["data"]
    recipe = tiny(stages=STAGES)
    recipe["data"] = data | {
        "dataset": {"name": "phantom", "patients": 4, "test": 2, "ndim": 3, "size": [12, 32, 32]},
        "dimensions": 2,
        "slice_axis": 0,
        "slices": 3,
        "noise": NOISE,
    }
    found = prepare(load_recipe(recipe), tmp_path, cache=cache)
    label = found.annotations.read(found.split.labelled[0], revision=0)
    assert (label != 255).any(axis=(1, 2)).sum() == 3

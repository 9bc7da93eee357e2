"""Cross-validation from the recipe: every labelled patient tested once, by a run that never saw it."""

import json

import pytest

from labeleff.errors import RecipeError, RunError
from labeleff.evaluating import evaluate
from labeleff.evaluation.tables import read_cases_csv
from labeleff.recipe_io import load_recipe
from labeleff.runner import run
from labeleff.sweep.collect import unfinished

from .conftest import tiny


def test_a_recipe_with_folds_runs_them_all_and_pools_them(tmp_path, cache):
    summary = run(
        load_recipe(tiny(), ["evaluation.folds=2", "stages.0.steps=2", "stages.1.steps=2"]), tmp_path, cache=cache
    )
    tested = []
    for fold in range(2):
        split = json.loads((tmp_path / f"fold-{fold}" / "split.json").read_text())
        assert not set(split["test"]) & set(split["labelled"] + split["unlabelled"])
        tested += split["test"]
    rows = read_cases_csv(tmp_path / "cases.csv")
    assert sorted({row["case"] for row in rows}) == sorted(tested)
    assert len(tested) == 8 * 2  # all training patients, two slices each; the test list is not touched
    assert summary["test_patients"] == 8
    assert not unfinished(tmp_path)
    again = run(
        load_recipe(tiny(), ["evaluation.folds=2", "stages.0.steps=2", "stages.1.steps=2"]), tmp_path, cache=cache
    )
    assert again == summary
    with pytest.raises(RunError, match="this run has folds; evaluate one of them"):
        evaluate(tmp_path, on="development", cache=cache)
    kept = (tmp_path / "cases.csv").read_bytes()
    (tmp_path / "cases.csv").unlink()
    assert evaluate(tmp_path, cache=cache) == summary
    assert (tmp_path / "cases.csv").read_bytes() == kept


@pytest.mark.parametrize("override", ["evaluation.folds=1", "evaluation.fold=0"])
def test_impossible_folds_are_refused(override):
    with pytest.raises(RecipeError, match=r"evaluation\.fold"):
        load_recipe(tiny(), [override])
    assert load_recipe(tiny(), ["evaluation.folds=2", "evaluation.fold=1"]).evaluation.fold == 1
    with pytest.raises(RecipeError, match=r"0 … evaluation\.folds - 1"):
        load_recipe(tiny(), ["evaluation.folds=2", "evaluation.fold=2"])


def test_only_some_slices_are_labelled_and_only_they_are_drawn(tmp_path, cache):
    import numpy as np

    from labeleff.batch import IGNORE
    from labeleff.prepare import prepare

    values = tiny(stages=[{"strategy": "supervised", "steps": 2, "batch": 4}])
    values["data"] = {
        "dataset": {"name": "phantom", "ndim": 3, "patients": 5, "test": 1, "size": [12, 32, 32]},
        "labelled": 2, "dimensions": 2, "patch": [32, 32], "slices": 3,
    }  # fmt: skip
    recipe = load_recipe(values)
    data = prepare(recipe, tmp_path, cache=cache)
    for case in data.split.labelled:
        label = data.annotations.read(case, revision=0)
        known = [z for z in range(12) if (label[z] != IGNORE).any()]
        assert known == [2, 6, 10]
        truth = data.dataset.read_label(data.manifest.case(case))
        assert np.array_equal(label[known], truth[known])
    from labeleff.strategies.supervised import Supervised

    loader = data.loader(recipe.stages[0], 0, Supervised(), first=0, last=2, revision=0)
    for batch in loader:
        assert (batch["labelled"].label != IGNORE).flatten(1).any(1).all()
        assert set(batch["labelled"].geometry.origin[:, 0].tolist()) <= {2, 6, 10}

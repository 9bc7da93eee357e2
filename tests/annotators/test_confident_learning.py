"""Labels that networks which never saw them contradict are forgotten or replaced."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labeleff import registry
from labeleff.annotators.confident_learning import ConfidentLearning
from labeleff.batch import IGNORE, Progress
from labeleff.data.annotations import AnnotationStore
from labeleff.edits import Reviewed
from labeleff.errors import RecipeError, RunError, SplitError
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.results import load_snapshot
from labeleff.runner import resolve, run
from labeleff.strategies.supervised import Supervised
from tests.conftest import tiny

FOLDED = {
    "strategy": "supervised",
    "annotator": "confident_learning",
    "folds": 2,
    "start": "fresh",
    "steps": 4,
    "batch": 2,
}
AFTER = {"strategy": "supervised", "start": "fresh", "steps": 3, "batch": 2}


def folded(**changes):
    recipe = tiny(stages=[FOLDED | changes.pop("stage", {}), AFTER])
    recipe["data"] = recipe["data"] | {"labelled": 4} | changes
    return recipe


def reviewed(name, label, sure_of):
    """Return a case whose network is sure of one map."""
    probs = torch.where(torch.arange(3).view(3, 1, 1) == torch.from_numpy(sure_of.astype(int)), 0.9, 0.05)
    return Reviewed(name, probs[None], label, label, (1.0, 1.0))


@pytest.mark.parametrize("action", ["ignore", "relabel"])
def test_what_is_contradicted_changes_and_nothing_else(action):
    clean = np.zeros((8, 8), np.uint8)
    clean[2:6, 2:6] = 1
    wrong = clean.copy()
    wrong[2:4, 2:4] = 2
    wrong[7] = IGNORE
    other = clean.copy()
    other[6:] = 2
    annotator = ConfidentLearning(action=action)
    seen = [reviewed("a", wrong, clean), reviewed("b", other, other)]
    (edit,) = annotator.revise(iter(seen), Progress(0, 1))
    assert edit.case == "a"
    np.testing.assert_array_equal(edit.mask, (wrong == 2))
    assert set(np.unique(edit.label[edit.mask])) == ({IGNORE} if action == "ignore" else {1})
    assert edit.confidence == pytest.approx(0.9)
    assert annotator.describe(Progress(0, 1))["flagged_share"] == pytest.approx(4 / (56 + 64))


def test_every_case_is_seen_by_the_network_that_never_saw_it(tmp_path, cache):
    recipe = load_recipe(folded())
    data = prepare(resolve(recipe), tmp_path / "look", cache=cache)
    stages = resolve(recipe).stages
    assert [s.fold for s in stages] == [0, 1, None]
    parts = [set(data.held_out(stage)) for stage in stages[:2]]
    patient = {i: data.manifest.case(i).patient for i in data.split.labelled}
    assert parts[0] | parts[1] == set(data.split.labelled)
    assert not {patient[i] for i in parts[0]} & {patient[i] for i in parts[1]}
    for stage, part in zip(stages, parts, strict=False):
        strategy = registry.build("strategy", "supervised")
        (plan,) = data.plans(stage, 0, strategy).values()
        assert set(plan.cases) == set(data.split.labelled) - part


def test_labels_of_a_part_change_nothing_in_the_network_that_reviews_it(tmp_path, cache, monkeypatch):
    """Shuffled labels of the part that is left out leave the weights of its network as they are."""
    from labeleff.data.formats.phantom import Phantom

    recipe = load_recipe(folded())
    run(recipe, tmp_path / "one", cache=cache)
    part = prepare(resolve(recipe), tmp_path / "look", cache=cache).held_out(resolve(recipe).stages[0])
    plain = Phantom.read_label
    monkeypatch.setattr(
        Phantom, "read_label", lambda self, case: 3 - plain(self, case) if case.id in part else plain(self, case)
    )
    run(recipe, tmp_path / "two", cache=cache)
    weights = [
        [load_file(tmp_path / name / "snapshots" / f"stage-{i:02d}-step-00000004.safetensors") for i in (0, 1)]
        for name in ("one", "two")
    ]
    assert all(torch.equal(weights[0][0][k], weights[1][0][k]) for k in weights[0][0])
    assert any(not torch.equal(weights[0][1][k], weights[1][1][k]) for k in weights[0][1])


def test_labels_are_revised_once_and_the_last_stage_learns_from_them(tmp_path, cache):
    run(load_recipe(folded()), tmp_path, cache=cache)
    store = AnnotationStore.open(tmp_path / "annotations")
    assert store.revision == 1
    assert {(c["by"], c["stage"], c["step"]) for c in store.history()} <= {("confident_learning", 1, 4)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    said = [line["annotator"] for line in lines if "annotator" in line]
    assert len(said) == 1
    assert 0 <= said[0]["flagged_share"] < 1
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == [4, 4, 3]


def test_the_annotator_is_shown_what_the_network_of_the_part_says(tmp_path, cache, monkeypatch):
    shown, revise = [], ConfidentLearning.revise

    def watched(self, cases, progress):
        shown.extend(cases)
        return revise(self, shown, progress)

    monkeypatch.setattr(ConfidentLearning, "revise", watched)
    recipe = load_recipe(folded())
    run(recipe, tmp_path, cache=cache)
    data = prepare(resolve(recipe), tmp_path, cache=cache)
    assert sorted(case.case for case in shown) == sorted(data.split.labelled)
    for number, stage in enumerate(resolve(recipe).stages[:2]):
        network, strategy = data.backbone(0), registry.build("strategy", "supervised")
        load_snapshot(tmp_path / "snapshots" / f"stage-{number:02d}-step-00000004.safetensors", network, strategy)
        mine = [case for case in shown if case.case in data.held_out(stage)]
        assert mine
        for case in mine:
            assert torch.equal(case.probs[0], data.viewer(network).probabilities(network, case.case))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"start": "previous"}, r"stages\.0\.start.*fresh"),
        ({"folds": 1}, r"stages\.0\.folds"),
        ({"folds": 3, "fold": 3}, r"stages\.0\.fold"),
        ({"revise_every": 2}, r"stages\.0\.revise_every"),
        ({"annotator": "pseudo_labels"}, r"stages\.0\.annotator"),
        ({"streams": {"labelled": {"role": "all"}}}, r"stages\.0\.streams\.labelled\.role"),
        ({"steps": 0}, r"stages\.0\.steps"),
        ({"optimiser_state": "previous"}, r"stages\.0\.optimiser_state: .* use fresh"),
        ({"fold": 1}, r"stages\.0\.fold: confident_learning needs the networks of all 2 parts; leave out fold"),
    ],
)
def test_folds_that_cannot_work_are_refused(stage, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(folded(stage=stage))


def test_a_network_of_one_part_is_no_result():
    with pytest.raises(
        RecipeError, match=r"stages\.0\.folds: the last stage would be measured by the network of one part"
    ):
        load_recipe(tiny(stages=[FOLDED]))
    assert load_recipe(tiny(stages=[FOLDED], data=tiny()["data"] | {"evaluate_on": "none"}))


def test_more_parts_than_patients_are_refused_before_anything_is_trained(tmp_path, cache):
    recipe = folded(stage={"folds": 5})
    recipe["stages"].insert(0, AFTER)
    with pytest.raises(SplitError, match=r"stages\.folds is 5, but 4 patients"):
        run(load_recipe(recipe), tmp_path, cache=cache)
    assert not (tmp_path / "checkpoints").exists()


def test_the_recipe_on_disk_is_what_was_asked_for(tmp_path, cache):
    recipe = load_recipe(folded())
    summary = run(recipe, tmp_path, cache=cache)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert run(recipe, tmp_path, cache=cache) == summary
    assert run(load_recipe(folded(), ["stages.1.steps=5"]), tmp_path, cache=cache, extend=True)["steps"] == [4, 4, 5]


def test_parts_cannot_be_made_longer(tmp_path, cache):
    recipe = tiny(stages=[FOLDED], data=tiny()["data"] | {"evaluate_on": "none"})
    run(load_recipe(recipe), tmp_path, cache=cache)
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run(load_recipe(recipe, ["stages.0.steps=6"]), tmp_path, cache=cache, extend=True)


@pytest.mark.parametrize("take", ["last", "val_best"])
def test_the_annotator_is_shown_what_the_chosen_network_of_the_part_says(take, tmp_path, cache, monkeypatch):
    """Against the kept weights, loaded by hand."""
    shown, revise = [], ConfidentLearning.revise

    def watched(self, cases, progress):
        shown.extend(cases)
        return revise(self, shown, progress)

    monkeypatch.setattr(ConfidentLearning, "revise", watched)
    values = folded(stage={"take": take, "optimiser": {"lr": 0.05}}, labelled=5, validation=1)
    recipe = load_recipe(values | {"evaluation": {"every": 2, "pictures": False}})
    history = run(recipe, tmp_path, cache=cache)["validation"]
    data = prepare(resolve(recipe), tmp_path / "look", cache=cache)
    assert sorted(case.case for case in shown) == sorted(data.split.labelled)
    chosen = []
    for index, stage in enumerate(resolve(recipe).stages[:2]):
        dice = {entry["step"]: entry["dice"] for entry in history if entry["stage"] == index}
        chosen.append(4 if take == "last" or dice[4] > dice[2] else 2)
        weights = load_file(tmp_path / "snapshots" / f"stage-{index:02d}-step-{chosen[-1]:08d}.safetensors")
        network = data.backbone(0)
        network.load_state_dict({key.removeprefix("backbone."): value for key, value in weights.items()})
        for case in (case for case in shown if case.case in data.held_out(stage)):
            assert torch.equal(case.probs[0], data.viewer(network).probabilities(network, case.case))
    assert take == "last" or 2 in chosen  # or the test says nothing


def test_no_part_inherits_from_another(tmp_path, cache, monkeypatch):
    inherited, plain = [], Supervised.inherit

    def inherit(self, previous):
        inherited.append(len(inherited))
        return plain(self, previous)

    monkeypatch.setattr(Supervised, "inherit", inherit)
    run(load_recipe(folded()), tmp_path, cache=cache)
    assert len(inherited) == 1  # the stage after the parts

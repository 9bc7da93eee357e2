"""Benchmark files: what they expand to, what they refuse, and equal terms."""

import json

import pytest
import yaml

from labeleff.errors import RecipeError
from labeleff.recipe_io import load_recipe, method_names
from labeleff.sweep.benchmark import Tuning, benchmark_names, load_benchmark, parse_benchmark
from labeleff.sweep.grid import expand, rescaled, result_key, terms, told
from labeleff.sweep.tuning import trials

from ..conftest import tiny


def values(**changes):
    plain = {
        "name": "few",
        "base": "phantom/supervised",
        "methods": ["supervised", "mean_teacher"],
        "labelled": [2, 4],
        "draws": 3,
        "steps": 20,
    }
    return plain | changes


def grid(**changes):
    return expand(parse_benchmark(values(**changes)))


@pytest.mark.parametrize("name", benchmark_names())
def test_every_shipped_benchmark_expands_on_equal_terms(name):
    benchmark = load_benchmark(name)
    found = expand(benchmark)
    assert found.jobs
    assert bool(found.deviations) == bool(benchmark.allow)


@pytest.mark.parametrize("paper", ["left_atrium", "acdc"])
def test_a_papers_benchmark_trains_as_the_papers_recipe(paper):
    job = next(job for job in expand(load_benchmark(f"paper_{paper}")).jobs if job.method == "bcp")
    assert job.recipe.stages == load_recipe(f"paper/bcp_{paper}").stages


def test_every_cell_is_there_once_and_is_what_it_says():
    found = grid(seeds=2)
    assert len(found.jobs) == 2 * 2 * 3 * 2
    assert len({job.key for job in found.jobs}) == len({job.name for job in found.jobs}) == len(found.jobs)
    for job in found.jobs:
        recipe = job.recipe
        assert (recipe.data.labelled, recipe.data.draw, recipe.seed) == (
            int(job.labelled),
            job.draw,
            1000 * job.seed + job.draw,
        )
        assert recipe.stages[-1].strategy.name == job.method
        assert sum(stage.steps for stage in recipe.stages) == 20
        assert not recipe.baseline
    # an early stop leaves whole comparisons
    assert {job.draw for job in found.jobs[:4]} == {0}


def test_methods_share_draws_and_seeds():
    own = {job.method: job.recipe for job in grid().jobs if (job.labelled, job.draw) == ("2", 1)}
    assert own["supervised"].data == own["mean_teacher"].data
    assert own["supervised"].seed == own["mean_teacher"].seed


def test_a_method_may_have_budgets_draws_and_settings_of_its_own():
    found = grid(
        methods={
            "supervised": {"labelled": [2, 4, "all"]},
            "mean_teacher": {"draws": 1, "set": ["stages.0.strategy.decay=0.9"]},
        }
    )
    own = [job for job in found.jobs if job.method == "mean_teacher"]
    assert {(job.labelled, job.draw) for job in own} == {("2", 0), ("4", 0)}
    assert {job.recipe.stages[0].strategy.options["decay"] for job in own} == {0.9}
    assert {job.labelled for job in found.jobs if job.method == "supervised"} == {"2", "4", "all"}


def test_axes_multiply_only_where_they_apply():
    axis = {"key": "data.unlabelled", "values": ["0x", "5x"], "methods": ["mean_teacher"], "labelled": [4]}
    found = grid(axes=[axis], draws=1)
    own = [(job.method, job.labelled, dict(job.axes)) for job in found.jobs]
    assert own.count(("mean_teacher", "2", {})) == 1
    assert [axes for method, labelled, axes in own if (method, labelled) == ("mean_teacher", "4")] == [
        {"data.unlabelled": "0x"},
        {"data.unlabelled": "5x"},
    ]
    assert ("supervised", "4", {}) in own


def test_folds_become_runs_and_data_sets_multiply():
    found = grid(
        draws=1,
        labelled=[2],
        set=["evaluation.folds=3"],
        datasets={"small": {"set": ["data.dataset.patients=12"]}, "large": {}},
    )
    assert len(found.jobs) == 2 * 2 * 3
    assert {job.recipe.evaluation.fold for job in found.jobs} == {0, 1, 2}
    assert {job.recipe.data.dataset.options["patients"] for job in found.jobs if job.dataset == "small"} == {12}


def test_unequal_terms_are_refused_unless_allowed_and_then_said():
    more = {"supervised": {}, "mean_teacher": {"set": ["stages.0.batch=32"]}}
    with pytest.raises(RecipeError, match=r"not on equal terms: labelled images per step \[32\] instead of \[16\]"):
        grid(methods=more)
    found = grid(methods=more, allow=["labelled images per step"])
    assert found.deviations == ("mean_teacher: labelled images per step [32] instead of [16]",)
    with pytest.raises(RecipeError, match="backbone differs in channels"):
        grid(methods={"supervised": {}, "mean_teacher": {"set": ["backbone.channels=[4,8,16]"]}})
    with pytest.raises(RecipeError, match="steps 800 instead of 400"):
        grid(methods={"supervised": {"set": ["stages.0.steps=400"]}, "mean_teacher": {}}, steps=None)


def test_a_stream_that_is_left_out_shows_no_labelled_image():
    left_out = {"strategy": "ripu", "steps": 4, "batch": 8, "streams": {"labelled": {"batch": 0}}}
    recipe = load_recipe(
        tiny(stages=[left_out, left_out | {"streams": {}}, left_out | {"streams": {"labelled": {"batch": 3}}}])
    )
    assert terms(recipe)["labelled images per step"] == [3, 8]


def test_the_key_knows_what_matters():
    recipe = load_recipe(tiny())
    same = load_recipe(tiny(name="other", trainer={"log_every": 5, "workers": 1}, evaluation={"pictures": True}))
    assert result_key(recipe) == result_key(same)
    assert result_key(recipe) != result_key(load_recipe(tiny(seed=1)))
    assert result_key(recipe) != result_key(load_recipe(tiny(), ["stages.1.strategy.decay=0.5"]))


def test_the_key_leaves_out_what_is_the_default():
    spelt = load_recipe(
        tiny(), ["data.contamination=0.0", "stages.1.strategy.decay=0.99", "stages.0.optimiser.nesterov=false"]
    )
    assert result_key(spelt) == result_key(load_recipe(tiny()))
    kept = told(load_recipe(tiny()))
    assert "evaluation" in kept
    assert "contamination" not in kept["data"]
    assert kept["stages"][1]["strategy"] == ["bcp", {}]
    assert set(kept["data"]["dataset"][1]) == {"patients", "test", "size", "slices"}


def test_stages_keep_their_proportions():
    stages = load_recipe("phantom/bcp").stages
    for steps in (1, 7, 101, 1600):
        found = rescaled(stages, steps)
        assert sum(stage.steps for stage in found) == steps
        assert abs(found[0].steps - steps / 2) <= 1
    assert terms(load_recipe("phantom/bcp"))["labelled images per step"] == [16]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methods": ["mean_teacher"]}, "baseline: 'supervised' is none of the methods"),
        ({"methods": ["supervised", "bpc"]}, "method bpc: .*there is no 'methods/bpc'. Did you mean 'methods/bcp'"),
        ({"labelled": []}, "at least one of each"),
        ({"labelled": [2, 2]}, "names the same one twice"),
        ({"draws": 0}, "at least one of each"),
        ({"budgets": [1]}, "budgets: unknown key"),
        ({"name": "../up"}, "becomes part of folder names"),
        ({"axes": [{"key": "data.unlabeled", "values": ["0x"]}]}, "unlabeled: unknown key. Did you mean 'unlabelled'"),
        ({"axes": [{"key": "data.unlabelled", "values": ["0x"], "methods": ["mt"]}]}, "'mt' is none of the methods"),
        ({"allow": ["luck"]}, "allow.0: 'luck' is not one of"),
        ({"set": ["${oc.env:HOME}=1"]}, "refused|override"),
    ],
)
def test_mistakes_are_named(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        grid(**changes)


def test_overrides_reach_the_benchmark_or_every_recipe(tmp_path):
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump(values()))
    found = load_benchmark(path, ["draws=1", "labelled=[2]", "data.dataset.patients=9"])
    assert (found.draws, found.labelled) == ((0,), (2,))
    assert {job.recipe.data.dataset.options["patients"] for job in expand(found).jobs} == {9}
    with pytest.raises(RecipeError, match="Did you mean 'smoke'"):
        load_benchmark("smok")
    with pytest.raises(RecipeError, match="no such benchmark file"):
        load_benchmark(tmp_path / "none.yaml")


def test_recipe_files_are_found_beside_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny()))
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(values(base="own.yaml", datasets={"one": {"base": "own.yaml"}})))
    monkeypatch.chdir("/")
    assert {job.recipe.data.patch for job in expand(load_benchmark(tmp_path / "few.yaml")).jobs} == {(32, 32)}


def test_all_methods_are_those_that_ship():
    assert list(parse_benchmark(values(methods="all")).methods) == method_names()


def test_every_method_gets_as_many_trials_the_first_as_it_stands():
    space = {"stages.0.optimiser.lr": (1e-3, 4e-3), "stages.0.strategy.decay": (0.9, 0.99, 0.999)}
    found = trials(Tuning(4, 2, 5, {"mean_teacher": space}), "mean_teacher")
    assert len(found) == 4
    assert found[0] == []
    assert len({json.dumps(settings) for settings in found}) == 4
    assert trials(Tuning(4, 2, 5, {}), "supervised") == [[]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"set": ["data.draw=3"]}, "set: data.draw is what the sweep sets in every run"),
        (
            {"methods": {"supervised": {}, "all": {"stages": "methods/supervised", "set": ["data.labelled=23"]}}},
            r"methods\.all\.set: data.labelled is what the sweep sets .* use labelled \(a method may have its own\)",
        ),
    ],
)
def test_what_the_grid_sets_is_refused_as_a_setting(values, message):
    """It used to be lost without a word: a reference with all labels was the run with the fewest."""
    plain = {"name": "x", "base": "phantom/supervised", "methods": ["supervised"], "labelled": [2], **values}
    with pytest.raises(RecipeError, match=message):
        parse_benchmark(plain)

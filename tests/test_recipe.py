"""Recipes: what is refused and how it is said, overrides, references, round trips."""

import copy

import pytest
import yaml

from labeleff.errors import RecipeError
from labeleff.recipe_io import diff, find_recipe, load_recipe, recipe_names, to_mapping, to_yaml

from .conftest import tiny


def changed(path, value):
    """Return the tiny recipe with one key set."""
    recipe = copy.deepcopy(tiny())
    here = recipe
    *parents, last = path.split(".")
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return recipe


BAD = [
    ("stage", [], "stage: unknown key. Did you mean 'stages'?"),
    ("data.labeled", 3, "data.labeled: unknown key. Did you mean 'labelled'?"),
    ("stages.0.step", 3, "stages.0.step: unknown key. Did you mean 'steps'?"),
    ("stages.1.strategy", {"name": "bpc"}, "unknown strategy 'bpc'. Did you mean 'bcp'?"),
    ("stages.1.strategy", {"name": "bcp", "ratoi": 0.5}, "stages.1.strategy.ratoi: bcp has no such option. Did you mean 'ratio'?"),
    ("stages.1.strategy", {"name": "bcp", "ratio": 2.0}, "must lie in (0, 1]"),
    ("stages.1.strategy", {"name": "bcp", "ratio": "big"}, "stages.1.strategy.ratio: 'big' is not a number"),
    ("stages.1.strategy", {"name": "bcp", "pairing": "acdd"}, "paper, la, acdc, pancreas. Did you mean 'acdc'?"),
    ("stages.1.strategy", {"ratio": 0.5}, "write a name, or {name: NAME, option: value}"),
    ("stages.1.strategy", {"name": "os.system"}, "unknown strategy 'os.system'"),
    ("backbone", {"name": "unets"}, "unknown backbone 'unets'. Did you mean 'unet'?"),
    ("backbone", {"name": "unet", "channels": 5}, "backbone.channels: 5 is not a list"),
    ("data.dataset", {"name": "phantoms"}, "unknown dataset 'phantoms'. Did you mean 'phantom'?"),
    ("data.dataset", {"name": "phantom", "ndim": 4}, "ndim is 2 or 3"),
    ("data.dataset", {"name": "compact"}, "data.dataset.path: compact needs this option"),
    ("data.patch", [32, -1], "data.patch: [32, -1] is out of range"),
    ("data.patch", "32", "data.patch: '32' is not a list"),
    ("data.foreground", 1.5, "data.foreground: 1.5 is out of range"),
    ("data.labelled", -2, "data.labelled: -2 is out of range"),
    ("data.window", [240, -160], "data.window: [240.0, -160.0] is out of range; two finite intensities, the smaller one first"),
    ("data.window", [0, 0], "data.window: [0.0, 0.0] is out of range"),
    ("data.window", [0, float("inf")], "data.window: [0.0, inf] is out of range"),
    ("data.window", [float("nan"), 1], "data.window: [nan, 1.0] is out of range"),
    ("data.window", [100], "data.window: 2 values are needed, not 1"),
    ("data.normalise", "z", "data.normalise: 'z' is not one of zscore, minmax, none"),
    ("stages.0.steps", -1, "stages.0.steps: -1 is out of range"),
    ("stages.0.steps", "many", "stages.0.steps: 'many' is not a whole number"),
    ("stages.0.steps", 2.5, "stages.0.steps: 2.5 is not a whole number"),
    ("stages.0.steps", True, "stages.0.steps: True is not a whole number"),
    ("stages.0.batch", 0, "stages.0.batch: 0 is out of range"),
    ("stages.0.optimiser", {"lr": 0}, "stages.0.optimiser.lr: 0.0 is out of range"),
    ("stages.0.optimiser", {"name": "adam"}, "'adam' is not one of sgd, adamw. Did you mean 'adamw'?"),
    ("stages.0.schedule", {"name": "cosin"}, "Did you mean 'cosine'?"),
    ("stages.0.augment", {"probability": 2}, "stages.0.augment.probability: 2.0 is out of range"),
    ("stages.0.augment", {"flip": [5]}, "stages.0.augment.flip: 5 is out of range"),
    ("stages.0.revise_every", 3, "there is no annotator to revise labels"),
    ("stages.0.annotator", "pseudo_labels", "annotator 'pseudo_labels' would never revise a label"),
    ("stages.0.take", "best", "stages.0.take: 'best' is not one of last, val_best"),
    ("stages", [], "at least one stage"),
    ("trainer.precision", "8", "trainer.precision: '8' is not one of 32, bf16, 16"),
    ("trainer.devices", 0, "trainer.devices: 0 is out of range"),
    ("evaluation.overlap", 1.0, "evaluation.overlap: 1.0 is out of range"),
    ("name", "../evil", "becomes a folder"),
    ("name", "", "becomes a folder"),
    ("seed", "${oc.env:HOME}", "only plain references"),
    ("seed", "${oc.${name}:SECRET}", "only plain references"),
    ("name", "${now:}", "only plain references"),
    ("seed", "${nothing.here}", "a reference cannot be resolved"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{p}={v}"[:60] for p, v, _ in BAD])
def test_bad_recipes_get_one_clear_line(path, value, message):
    with pytest.raises(RecipeError) as found:
        load_recipe(changed(path, value))
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert str(found.value).startswith("recipe: ")


PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in PAIRS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1, 2", "not valid YAML at line"),
        ("- 1\n- 2", "top level of a recipe is a mapping"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML at line 1"),
        (BOMB, ""),
        ("x" * (1 << 21), "larger than 1 MiB"),
        ("name: a\nname: b", "duplicate key"),
    ],
    ids=["syntax", "list", "object", "alias bomb", "huge", "duplicate"],
)  # fmt: skip
def test_files_that_are_no_recipes(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as found:
        load_recipe(path)
    assert message in str(found.value)
    assert "bad.yaml" in str(found.value)


def test_overrides():
    recipe = load_recipe(
        tiny(),
        [
            "stages.1.strategy.decay=0.5",
            "seed=3",
            "data.patch=[16,32]",
            "stages.0.optimiser.lr=1e-2",
            "data.labelled=first:3",
        ],
    )
    assert recipe.stages[1].strategy.options["decay"] == 0.5
    assert (recipe.seed, recipe.data.patch, recipe.stages[0].optimiser.lr) == (3, (16, 32), 0.01)
    assert recipe.data.labelled == "first:3"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write key=value"),
        ("stages.7.steps=1", "the list has the positions 0 … 1"),
        ("stages.x.steps=1", "the list has the positions 0 … 1"),
        ("name.deep=1", "nothing below it"),
        ("stages.0.strategy.decya=1", "has no such option"),
        ("data.labelled=[", "not valid YAML"),
        ("stages=methods/../../etc", "write methods/NAME"),
        ("stages=methods/bpc", "Did you mean 'methods/bcp'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError, match="recipe: ") as found:
        load_recipe(tiny(), [override])
    assert message in str(found.value)


def test_plain_references_are_filled_in():
    recipe = load_recipe(changed("stages.1.steps", "${stages.0.steps}") | {"seed": "${data.labelled}"})
    assert recipe.stages[1].steps == 6
    assert recipe.seed == 2


def test_a_file_that_is_read_again_is_what_it_was_or_has_become(tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(tiny()))
    assert load_recipe(path, ["stages.0.steps=7", "data.patch=[16, 32]"]).stages[0].steps == 7
    assert load_recipe(path) == load_recipe(tiny())
    path.write_text(yaml.safe_dump(tiny(seed=3)))
    assert load_recipe(path).seed == 3


def test_methods_are_lists_of_stages():
    recipe = load_recipe(tiny(stages="methods/bcp"), ["stages.0.steps=5"])
    assert [stage.strategy.name for stage in recipe.stages] == ["bcp_pretrain", "bcp"]
    assert recipe.stages[0].steps == 5


@pytest.mark.parametrize("name", recipe_names())
def test_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert load_recipe(to_mapping(recipe)) == recipe
    assert yaml.safe_load(path.read_text())["name"] == recipe.name


def test_every_default_is_spelt_out():
    mapping = to_mapping(load_recipe(tiny()))
    assert mapping["stages"][1]["strategy"]["unlabelled_weight"] == 0.5
    assert mapping["trainer"]["precision"] == "32"


def test_numbers_that_name_a_precision():
    assert load_recipe(changed("trainer.precision", 16)).trainer.precision == "16"


def test_diff_names_what_differs():
    one, two = load_recipe(tiny()), load_recipe(tiny(), ["seed=4", "stages.1.strategy.decay=0.5"])
    assert diff(one, one) == []
    assert diff(one, two) == ["stages.1.strategy.decay: 0.99 -> 0.5", "seed: 0 -> 4"]


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(RecipeError, match=r"Did you mean 'quickstart'\?"):
        find_recipe("quikstart")
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="unknown recipe"):
        find_recipe("../pyproject")

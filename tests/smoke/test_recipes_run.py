"""Every shipped recipe is valid, and runs for two steps per stage where its data are at hand."""

import pytest

from labeleff.errors import DataError
from labeleff.recipe_io import load_recipe, recipe_folder, recipe_names
from labeleff.runner import run

FOR_A_GPU = "paper/"
ANY_FOLDER = {"compact", "nifti", "pictures", "manifest"}
DRAWN = ("quickstart", "noisy/phantom", "phantom/bcp_3d")  # pictures take longer than two steps
ON_THE_TEST_LIST = (
    "supervised",
    "nuclei/sfda",
)  # of every data set one recipe; of the others two patients for development


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs(name, tmp_path, cache):
    recipe = load_recipe(name)
    overrides = [f"stages.{i}.steps=2" for i in range(len(recipe.stages))]
    overrides += [f"baseline.{i}.steps=2" for i in range(len(recipe.baseline))]
    if name.startswith(FOR_A_GPU):
        assert sum(stage.steps for stage in recipe.stages) > 10000  # its schedule is the paper's
        parts = recipe.data.dataset.options.get("parts", {"": recipe.data.dataset})
        assert not {part.name for part in parts.values()} & ANY_FOLDER  # and so are its data, as they are downloaded
        return
    if recipe.data.dataset.name in ("phantom", "phantom_sites"):
        overrides += ["data.dataset.patients=20", "data.dataset.test=2"]
        if name not in DRAWN:
            overrides += ["evaluation.pictures=false"]
    elif not name.endswith(ON_THE_TEST_LIST):
        overrides += ["data.evaluate_on=development", "data.development=2", "evaluation.pictures=false"]
    if name.startswith(("noisy/acdc", "noisy/left_atrium")):
        overrides += ["data.labelled=6"]  # labels to make wrong; those of all patients take most of the time
    small = load_recipe(name, [*overrides, "data.unlabelled=3"])
    try:
        run(small, tmp_path, cache=cache)
    except DataError as error:
        if "no such folder" in str(error):
            pytest.skip(str(error))
        raise
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("path", sorted((recipe_folder() / "methods").glob("*.yaml")), ids=lambda p: p.stem)
def test_methods_are_lists_of_stages(path):
    recipe = load_recipe("phantom/supervised", [f"stages=methods/{path.stem}"])
    last = recipe.stages[-1].strategy
    annotators = [stage.annotator.name for stage in recipe.stages if stage.annotator]
    # a method, a loss of the supervised one, or what changes labels before it
    assert path.stem in (last.name, last.options.get("loss"), *annotators)


def test_methods_in_folders_are_lists_of_stages():
    folder = recipe_folder() / "methods"
    for path in sorted(folder.glob("*/*.yaml")):
        recipe = load_recipe("phantom/supervised", [f"stages=methods/{path.parent.name}/{path.stem}"])
        assert sum(stage.steps for stage in recipe.stages) > 0, path

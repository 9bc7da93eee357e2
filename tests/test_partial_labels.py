"""Labels that know little reach every strategy as they are: nnU-Net's ignore label, and slices labelled one by one.

That unknown voxels then move neither a loss nor a gradient is ``check_unknown_voxels``, which test_contracts runs.
"""

import nibabel as nib
import numpy as np
import pytest

from labeleff import registry
from labeleff.batch import IGNORE
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe

from .conftest import tiny
from .data import layouts

LEARNING = [
    name
    for name in registry.names("strategy")
    if any(stream.role == "labelled" for stream in registry.build("strategy", name).streams().values())
]


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """Four volumes of nnU-Net's layout, a third of whose voxels are to be ignored; of two, three slices are labelled."""
    place = tmp_path_factory.mktemp("partly")
    folder = layouts.nnunet(place / "set", channels=1, cases=("a", "b", "c", "d"))
    data = {
        "dataset": {"name": "nnunet", "path": str(folder)},
        "labelled": 2,
        "slices": 3,
        "patch": [8, 8, 8],
        "evaluate_on": "none",
    }
    recipe = load_recipe(tiny(data=data, stages=[{"strategy": "supervised", "steps": 1, "batch": 4}]))
    return folder, recipe.stages[0], prepare(recipe, place / "run", cache=place / "cache")


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_unknown_reaches_the_strategy_as_unknown(partly, name):
    folder, stage, prepared = partly
    (batch,) = prepared.loader(stage, 0, registry.build("strategy", name), first=0, last=1, revision=0)
    share = batch["labelled"]
    assert share.given is share.label
    stored = [np.asarray(nib.load(folder / "labelsTr" / f"{case}.nii.gz").dataobj) for case in prepared.split.labelled]
    for label, valid in zip(share.label.numpy(), share.valid.numpy(), strict=True):
        seen = label[valid[0]].reshape(layouts.SHAPE)
        told = [z for z in range(layouts.SHAPE[2]) if (seen[..., z] != IGNORE).any()]
        assert len(told) == 3
        expected = [np.full(layouts.SHAPE, IGNORE) for _ in stored]
        for one, whole in zip(expected, stored, strict=True):
            one[..., told] = np.where(whole == 2, IGNORE, whole)[..., told]  # dataset.json calls 2 ignore
        assert any(np.array_equal(seen, one) for one in expected)


def test_strategies_that_learn_from_unknown_voxels_on_purpose():
    """Cross pseudo supervision over labelled images too, and nothing else, is excused from the check."""
    assert not any(registry.build("strategy", name).uses_unknown for name in registry.names("strategy"))
    assert registry.build("strategy", "cross_pseudo", on="both").uses_unknown

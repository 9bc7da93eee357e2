"""The public contract checks over everything registered, on three backbones, in 2-D and 3-D."""

import pytest

from labeleff import registry
from labeleff.backbones.taps import find_taps
from labeleff.batch import Task
from labeleff.errors import RecipeError
from labeleff.strategies import glcl_global, glcl_local, masked_autoencoder, voco
from labeleff.testing import (
    Subject,
    ToyNet,
    check_annotator,
    check_ignore,
    check_options_matter,
    check_same_seed,
    check_soft_labels,
    check_streams,
    check_submodules_matter,
    check_unknown_voxels,
    checks,
)

BACKBONES = {
    "unet": {"channels": (4, 8, 8), "norm": "batch", "dropout": 0.2},
    "segresnet": {"filters": 8, "blocks_down": (1, 1), "dropout": 0.2},
    "dynunet": {"filters": (4, 8, 8), "norm": "batch"},
}
TASKS = {"2d": Task(("background", "one", "two"), 2), "3d": Task(("background", "one"), 3)}
SIZES = {"2d": (16, 24), "3d": (8, 16, 16)}

# what these ask of a strategy is the same on any network, and the toy network has both dropout and statistics; that two runs
# are one is asked by check_resume, too
OF_STRATEGIES = (
    check_submodules_matter, check_options_matter, check_same_seed, check_streams, check_ignore, check_soft_labels,
    check_unknown_voxels,
)  # fmt: skip

# in three steps from scratch no teacher is sure by the paper's threshold, so that nothing of the consistency would matter;
# two predictions under dropout are drawn as ten are
SMALL = {"channels": (4, 8), "embedding": 8, "grid": 2}
OPTIONS = {
    "uncertainty_mean_teacher": {"threshold": 0.99, "samples": 2},
    "umct": {"samples": 2},
    "label_autoencoder": SMALL,
    "anatomical_uncertainty": SMALL,
    "glcl_global": {"partitions": 2},
    "glcl_local": {"partitions": 2},
}
# of a network without levels there is nothing to pretrain; a batch is volumes times partitions
LEVELS = {"glcl_global": 8, "glcl_local": 8}
# the toy network has no bottleneck that could be found
NAMED = {"voco": {"layers": ("norm",)}, "masked_autoencoder": {"layer": "norm"}}


TAPS = {}


@pytest.fixture(scope="module", autouse=True)
def taps_of_a_network_are_found_once():
    """A dry run each time that a strategy is built would cost as much as the check; what it leaves alone is asked elsewhere."""

    def found_once(network, task, **named):
        key = (repr(network), task, repr(named))
        if key not in TAPS:
            TAPS[key] = find_taps(network, task, **named)
        return TAPS[key]

    with pytest.MonkeyPatch.context() as patch:
        for strategy in (glcl_global, glcl_local, masked_autoencoder, voco):
            patch.setattr(strategy, "find_taps", found_once)
        yield


def build(name):
    if name == "toy":
        return ToyNet
    return lambda task: registry.get("backbone", name)(task, **BACKBONES[name])


def toy(strategy, options, task):
    """Return a strategy on the smallest network that it can work on."""
    backbone = build("unet" if strategy in LEVELS else "toy")
    factory = registry.get("strategy", strategy)
    size = None if strategy in LEVELS else SIZES[f"{task.ndim}d"]
    return Subject(factory, options, task=task, backbone=backbone, batch=LEVELS.get(strategy, 4), size=size)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", registry.names("strategy"))
@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__)
def test_toy_network(check, strategy, task):
    options = OPTIONS.get(strategy, {}) | NAMED.get(strategy, {})
    check(toy(strategy, options, TASKS[task]))


OVERLAPPING = [name for name in registry.names("strategy") if registry.get("strategy", name).supports_regions]


@pytest.mark.parametrize("strategy", OVERLAPPING)
@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__)
def test_overlapping_regions(check, strategy):
    task = Task(("background", "one", "two", "three"), 2, exclusive=False)
    options = {"loss": "dice_ce"} if strategy == "supervised" else OPTIONS.get(strategy, {})
    check(toy(strategy, options, task))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("strategy", registry.names("strategy"))
def test_backbones(strategy, backbone, task):
    options, batch = OPTIONS.get(strategy, {}), LEVELS.get(strategy, 4) // 2
    kind, size = registry.get("strategy", strategy), None if strategy in LEVELS else SIZES[task]
    subject = Subject(kind, options, task=TASKS[task], backbone=build(backbone), batch=batch, size=size)
    if strategy in LEVELS and (backbone == "unet" or (backbone == "segresnet" and task == "3d")):
        return  # the first is the toy network of these; finding the levels of the other takes seconds
    if strategy == "adabn" and backbone == "segresnet":
        with pytest.raises(RecipeError, match="has no batch norm"):
            subject.make()
        return
    for check in checks():
        if check not in OF_STRATEGIES:
            check(subject)


@pytest.mark.parametrize("name", registry.names("annotator"))
@pytest.mark.parametrize("shape", [(12, 16), (8, 8, 10)])
def test_annotators(name, shape):
    check_annotator(registry.build("annotator", name), shape=shape)


@pytest.mark.parametrize("name", registry.names("strategy"))
def test_file_is_named_like_the_strategy(name):
    assert registry.get("strategy", name).__module__ == f"labeleff.strategies.{name}"


@pytest.mark.parametrize("kind", list(registry.PACKAGES))
def test_every_option_is_explained(kind):
    for name in registry.names(kind):
        for option in registry.options(registry.get(kind, name)).values():
            assert option.help, f"{kind} {name}: option {option.name} is not described under Args:"

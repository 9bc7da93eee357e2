"""Source and target: whose labels, whose images, and what a stage of adaptation cannot reach."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE, Stream
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.data.split import make_split
from labeleff.edits import Edit
from labeleff.errors import RecipeError, SplitError, StoreError
from labeleff.prepare import prepare
from labeleff.recipe import StreamBinding
from labeleff.recipe_io import load_recipe
from labeleff.registry import build
from labeleff.strategies.base import Strategy

from ..conftest import tiny


def manifest(pairs=False):
    """Return six training and two test patients per site; ``pairs``: every patient was seen at both sites."""
    cases = []
    for number in range(8 if pairs else 16):
        role = "test" if number % 8 >= 6 else "train"
        for site in ("mr", "ct") if pairs else (("mr", "ct")[number // 8],):
            source = Source(Path(f"/data/p{number:02d}{site}.npz"))
            cases.append(Case(f"p{number:02d}{site}", f"p{number:02d}", (source,), source, site, role))
    return Manifest("two", tuple(cases), ("background", "organ"), 2)


def sites(ids):
    return {name[3:] for name in ids}


def test_labels_are_of_the_source_and_everything_else_of_the_target():
    split = make_split(manifest(), labelled=4, validation=1, source=("mr",), target=("ct",))
    assert sites(split.labelled + split.validation) == {"mr"}
    assert len(split.labelled) == 3
    assert sites(split.unlabelled) == sites(split.test) == {"ct"}
    assert (len(split.unlabelled), len(split.test)) == (6, 2)
    assert "labels from mr, adapted to and evaluated on ct" in split.notes


def test_the_oracle_learns_from_the_target_and_is_tested_on_the_same_cases():
    adapted = make_split(manifest(), labelled=4, source=("mr",), target=("ct",))
    oracle = make_split(manifest(), labelled=4, source=("ct",), target=("ct",))
    assert sites(oracle.labelled) == {"ct"}
    assert oracle.test == adapted.test
    assert len(oracle.unlabelled) == 2
    assert not set(oracle.labelled) & set(oracle.unlabelled)


def test_a_patient_seen_at_both_sites_is_labelled_in_one_of_them():
    split = make_split(manifest(pairs=True), labelled="all", source=("mr",), target=("ct",))
    assert {name[:3] for name in split.labelled} == {name[:3] for name in split.unlabelled}
    validating = make_split(manifest(pairs=True), labelled="all", validation=2, source=("mr",), target=("ct",))
    assert not {n[:3] for n in validating.validation} & {n[:3] for n in validating.unlabelled}


def test_what_is_not_labelled_at_the_source_can_be_learnt_from_too():
    given = {"labelled": 2, "source": ("mr",), "target": ("ct",), "unlabelled_from": ("mr", "ct")}
    split = make_split(manifest(), **given)
    assert sites(split.labelled) == {"mr"}
    assert sites(split.test) == {"ct"}
    train = {f"p{n:02d}mr" for n in range(6)} | {f"p{n:02d}ct" for n in range(8, 14)}
    assert set(split.unlabelled) == train - set(split.labelled)
    assert "unlabelled images from mr and ct" in split.notes
    some = make_split(manifest(), **given, unlabelled=4)  # as many of each site, labelled ones counted
    assert sorted(name[3:] for name in some.unlabelled) == ["ct", "ct", "ct", "mr"]
    both = make_split(manifest(pairs=True), **given)  # whoever is labelled at one site is not at the other
    assert set(both.unlabelled) == {f"p{n:02d}{s}" for n in range(6) for s in ("mr", "ct")} - set(both.labelled)
    validating = make_split(manifest(pairs=True), **given | {"labelled": 3, "validation": 1})
    assert not {n[:3] for n in validating.validation} & {n[:3] for n in validating.unlabelled}
    with pytest.raises(SplitError, match=r"data\.unlabelled_from: two has no domain 'us'"):
        make_split(manifest(), labelled=2, unlabelled_from=("us",))


def test_parts_that_are_cut_from_the_training_list_are_of_the_target():
    given = {"labelled": 2, "source": ("mr",), "target": ("ct",)}
    cut = make_split(manifest(), evaluate_on="development", development=2, **given)
    assert sites(cut.test) == {"ct"}
    assert len(cut.unlabelled) == 4
    parts = [make_split(manifest(), folds=3, fold=i, **given) for i in range(3)]
    assert sorted(i for p in parts for i in p.test) == sorted(f"p{n:02d}ct" for n in range(8, 14))
    assert all(not set(p.test) & set(p.unlabelled) for p in parts)


def test_no_labels_at_all():
    split = make_split(manifest(), labelled="none", target=("ct",), source=("mr",))
    assert split.labelled == ()
    assert len(split.unlabelled) == 6


def test_a_domain_that_is_not_there():
    with pytest.raises(SplitError, match=r"data\.target: two has no domain 'cct'\. Did you mean 'ct'"):
        make_split(manifest(), labelled=2, target=("cct",))


# -- streams ------------------------------------------------------------------------------------------------------------


def adaptation(**data):
    """Return a recipe on two sites with a stage that binds unlabelled images of the target alone."""
    found = {"dataset": {"name": "phantom", "patients": 8, "test": 4, "size": [40, 32], "slices": 2, "sites": 2}}
    values = tiny(
        data=found | {"labelled": 2, "patch": [32, 32], "source": ["site0"], "target": ["site1"]} | data,
        stages=[{"strategy": "mean_teacher", "steps": 3, "batch": 4}],
    )
    return load_recipe(values)


def prepared(tmp_path, cache, **data):
    return prepare(adaptation(**data), tmp_path / "run", cache=cache)


def loaded(data, **changes):
    stage = replace(data.recipe.stages[0], **changes)
    strategy = build("strategy", stage.strategy.name, **stage.strategy.options)
    return data.loader(stage, 0, strategy, first=0, last=3, revision=data.annotations.revision)


def test_domains_of_the_generated_data(tmp_path, cache):
    data = prepared(tmp_path, cache)
    assert {c.domain for c in data.manifest.cases} == {"site0", "site1"}
    assert {data.manifest.case(i).domain for i in data.split.unlabelled} == {"site1"}


def test_what_a_stage_does_not_bind_is_out_of_reach(tmp_path, cache):
    data = prepared(tmp_path, cache)
    steps = loaded(data, streams={"labelled": StreamBinding(role="unlabelled"), "unlabelled": StreamBinding()}).dataset
    source, target = data.split.labelled[0], data.split.unlabelled[0]
    assert steps.store.read(target).shape == (1, 40, 32)
    assert (steps.annotations.read(target, revision=0) == IGNORE).all()
    for reach in (
        steps.store.read,
        steps.store.shape,
        steps.store.index,
        lambda case: steps.annotations.read(case, revision=0),
        steps.annotations.read_given,
        lambda case: steps.annotations.labelled_voxels(case, 0),
        lambda case: steps.annotations.edited(case, 0),
        lambda case: steps.annotations.read_votes(case, revision=0),
    ):
        with pytest.raises(StoreError, match="bound to no stream of this stage"):
            reach(source)
    with pytest.raises(StoreError, match="bound to no stream"):
        steps.store.read(data.split.test[0])
    assert data.store.index(target) == steps.store.index(target)  # cases keep their numbers


class Whole(Strategy):
    """Asks for whole images."""

    def streams(self):
        return {"unlabelled": Stream("unlabelled", kind="slice")}

    def step(self, backbone, batch, progress):
        raise AssertionError


def test_whole_images_are_padded_to_lengths_that_the_network_takes(tmp_path, cache):
    data = prepared(tmp_path, cache, patch=[16, 16])
    loader = data.loader(data.recipe.stages[0], 0, Whole(), first=0, last=2, revision=0)
    share = next(iter(loader))["unlabelled"]
    assert tuple(share.image.shape) == (4, 1, 48, 32)  # 40 by 32, in multiples of 16
    assert (share.valid.sum((1, 2, 3)) == 40 * 32).all()
    assert share.valid[:, :, 4:44].all()
    for image, number in zip(share.image, share.geometry.case.tolist(), strict=True):
        assert np.array_equal(image[:, 4:44].numpy(), data.store.read(data.store.ids[number]))


def test_an_optional_stream_can_be_left_out(tmp_path, cache):
    data = prepared(tmp_path, cache)
    with pytest.raises(RecipeError, match="needs the stream 'labelled', but no case is bound"):
        loaded(data, streams={"labelled": StreamBinding(batch=0)})


def test_samples_are_centred_on_what_somebody_has_labelled(tmp_path, cache):
    data = prepared(tmp_path, cache, patch=[16, 16])
    case = data.split.unlabelled[1]
    data.annotations.apply(
        [Edit(case, np.ones((2, 3), np.uint8), "person", origin=(20, 9))], step=0, stage=0, author="test"
    )
    always = list(loaded(data, streams={"unlabelled": StreamBinding(known=1.0)}))
    for batch in always:
        assert (batch["unlabelled"].label[:, 8, 8] == 1).all()
        assert (batch["unlabelled"].geometry.case == data.store.index(case)).all()
    never = list(loaded(data))
    assert any((batch["unlabelled"].label == IGNORE).all() for batch in never)


def test_priors_reach_the_batch(tmp_path, cache):
    prior = {"name": "constant", "sizes": {"large": 0.2, "small": 0.03, "tube": 0.02}}
    names = prepared(tmp_path, cache).task.classes
    prior["sizes"] = dict.fromkeys(names[1:], 0.05)
    data = prepare(adaptation(prior=prior), tmp_path / "with", cache=cache)
    batch = next(iter(loaded(data)))
    assert "prior" not in batch["labelled"].extras
    expected = torch.tensor([1 - 0.05 * (len(names) - 1), *[0.05] * (len(names) - 1)])
    torch.testing.assert_close(batch["unlabelled"].extras["prior"], expected.expand(4, -1))
    again = prepare(adaptation(prior=prior), tmp_path / "with", cache=cache)
    assert {k: v.tolist() for k, v in again.priors.items()} == {k: v.tolist() for k, v in data.priors.items()}

"""Annotators that ask: an oracle answers from hidden labels, or the run stops until people have."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labeleff import registry
from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE
from labeleff.data.annotations import AnnotationStore
from labeleff.data.rounds import Rounds
from labeleff.edits import Edit, Question
from labeleff.errors import RecipeError, RunError, StoreError, Waiting
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.runner import run

from .conftest import tiny


class Corners(Annotator):
    """Asks about one box per case and round, beside those of earlier rounds.

    Args:
        edits: Make a change of its own as well, which is not allowed.
        dropped: Want so many samples with dropout.
    """

    seen = []  # noqa: RUF012  what tests look at

    def __init__(self, *, edits: bool = False, dropped: int = 1) -> None:
        super().__init__()
        self.edits, self.samples = edits, dropped

    def revise(self, cases, progress):
        for case in cases:
            Corners.seen.append((progress.step, progress.round, case))
            yield Question(case.case, (8 * len(case.asked) + 4, -2), (6, 8), score=progress.round)
            if self.edits:
                yield Edit(case.case, np.zeros((1, 1), np.uint8), "corrected")

    def describe(self, progress):
        return {"rounds": float(progress.round)}


class Cheat(Corners):
    """Chooses by hidden labels."""

    oracle = True


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry.names("annotator")
    for name, kind in (("corners", Corners), ("cheat", Cheat)):
        monkeypatch.setitem(registry._registered["annotator"], name, kind)
    Corners.seen.clear()


def recipe(answers="oracle", annotator="corners", **changes):
    data = tiny()["data"] | {"unlabelled": 3}
    stage = {
        "strategy": "mean_teacher",
        "annotator": annotator,
        "steps": 6,
        "batch": 4,
        "answers": answers,
        "revise_at_start": True,
        "revise_every": 2,
    }
    first = {"strategy": "supervised", "steps": 2, "batch": 4}
    return load_recipe(tiny(data=data, stages=[first, stage | changes]))


def weights(folder):
    return load_file(folder / "predictor.safetensors")


def test_an_oracle_answers_and_training_goes_on(tmp_path, cache):
    summary = run(recipe(), tmp_path, cache=cache)
    rounds, store = Rounds(tmp_path), AnnotationStore.open(tmp_path / "annotations")
    rounds.verify()
    store.verify()
    assert store.revision == len(rounds.numbers()) == 3
    data = prepare(recipe(), tmp_path, cache=cache)
    for number in (1, 2, 3):
        asked = rounds.get(number)
        assert len(asked.regions) == len(data.split.unlabelled) == 6
        for region in asked.regions:
            assert (region.origin, region.size) == ((8 * number - 4, 0), (6, 6))  # cut at the border
            truth = data.hidden_label(region.case)[region.box]
            assert np.array_equal(store.read(region.case, region.box, revision=number), truth)
            assert (store.read(region.case, region.box, revision=number - 1) == IGNORE).all()
    known = sum((store.read(c, revision=3) != IGNORE).sum() for c in data.split.unlabelled)
    assert known == sum(line["labelled"] for line in rounds.ledger()) == 3 * 6 * 36
    assert [(row["regions"], row["voxels"], row["labelled"]) for row in summary["rounds"]] == [(6, 216, 216)] * 3
    assert [(step, number) for step, number, _ in Corners.seen[::6]] == [(0, 0), (2, 1), (4, 2)]
    assert [len(case.asked) for _, _, case in Corners.seen[::6]] == [0, 1, 2]


def test_labels_are_replayed_from_an_empty_store(tmp_path, cache):
    run(recipe(), tmp_path, cache=cache)
    store, rounds = AnnotationStore.open(tmp_path / "annotations"), Rounds(tmp_path)
    data = prepare(recipe(), tmp_path, cache=cache)
    labelled = [(c, store.read_given(c)) for c in data.split.labelled]
    shapes = {c: data.store.shape(c) for c in data.split.labelled + data.split.unlabelled}
    again = AnnotationStore.create(tmp_path / "again", shapes, labelled)
    for number in rounds.numbers():
        again.apply(rounds.edits(number), step=rounds.get(number).step, stage=1, author="corners")
    assert again.digest() == store.digest()


def test_people_are_waited_for_and_the_result_is_that_of_the_oracle(tmp_path, cache):
    run(recipe(), tmp_path / "oracle", cache=cache)
    folder = tmp_path / "people"
    asked_by = recipe("person")
    data = prepare(asked_by, tmp_path / "other", cache=cache)
    for number in (1, 2, 3):
        for _ in range(2):  # asking again changes nothing
            with pytest.raises(Waiting, match=rf"round {number} waits for labels of 6 of 6 regions: `labeleff query"):
                run(asked_by, folder, cache=cache)
        rounds = Rounds(folder)
        regions = rounds.get(number).regions
        assert rounds.prediction(number, regions[0].case).shape == (32, 32)
        labels = {r.number: data.hidden_label(r.case)[r.box].copy() for r in regions}
        rounds.answer(number, {k: v for k, v in labels.items() if k <= 2}, author="person", by="ann")
        with pytest.raises(Waiting, match="labels of 4 of 6"):
            run(asked_by, folder, cache=cache)
        rounds.answer(number, {k: v for k, v in labels.items() if k > 2}, author="person", by="bob", seconds=30)
    summary = run(asked_by, folder, cache=cache)
    one, two = weights(tmp_path / "oracle"), weights(folder)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert summary["rounds"][0]["authors"] == ["person"]
    assert summary["rounds"][2]["seconds"] == 30
    metrics = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("oracle", "people")]
    assert metrics[0] == metrics[1]
    with pytest.raises(RunError, match="people have labelled 18 regions of this run"):
        run(asked_by, folder, cache=cache, fresh=True)


def test_a_round_is_found_again_after_a_crash(tmp_path, cache, monkeypatch):
    run(recipe(), tmp_path / "whole", cache=cache)
    real = Rounds.answer

    def dying(self, number, *args, **kwargs):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *args, **kwargs)

    monkeypatch.setattr(Rounds, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "torn", cache=cache)
    assert Rounds(tmp_path / "torn").numbers() == [1, 2]
    monkeypatch.setattr(Rounds, "answer", real)
    run(recipe(), tmp_path / "torn", cache=cache)
    assert (tmp_path / "torn" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "torn")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [
        [{k: v for k, v in line.items() if k not in ("time", "previous")} for line in Rounds(tmp_path / n).ledger()]
        for n in ("whole", "torn")
    ]
    assert lines[0] == lines[1]


def test_nobody_to_answer(tmp_path, cache):
    with pytest.raises(RecipeError, match=r"stages\.1: corners asks for labels, but nobody is there.*answers: oracle"):
        run(recipe("nobody"), tmp_path, cache=cache)


def test_asking_and_editing_at_once(tmp_path, cache):
    with pytest.raises(RecipeError, match="either asks or makes changes itself"):
        run(recipe(annotator={"name": "corners", "edits": True}), tmp_path, cache=cache)


def test_samples_are_drawn_with_dropout(tmp_path, cache):
    run(recipe(annotator={"name": "corners", "dropped": 3}), tmp_path, cache=cache)
    probs = Corners.seen[0][2].probs
    assert probs.shape[0] == 3
    assert not torch.equal(probs[0], probs[1])
    torch.testing.assert_close(probs.sum(1), torch.ones(3, 32, 32))
    dry = tiny()["backbone"] | {"dropout": 0.0}
    asking = {"annotator": {"name": "corners", "dropped": 2}, "answers": "oracle", "revise_at_start": True}
    plain = load_recipe(tiny(backbone=dry, stages=[{"strategy": "mean_teacher", "steps": 2, "batch": 4} | asking]))
    with pytest.raises(RecipeError, match=r"needs a network with dropout.*backbone\.dropout"):
        run(plain, tmp_path / "dry", cache=cache)


def test_hidden_labels_are_shown_to_none_but_a_marked_oracle(tmp_path, cache):
    run(recipe(), tmp_path / "one", cache=cache)
    assert all(case.truth is None for _, _, case in Corners.seen)
    Corners.seen.clear()
    summary = run(recipe(annotator="cheat"), tmp_path / "two", cache=cache)
    assert all(case.truth is not None for _, _, case in Corners.seen)
    assert any("hidden labels" in note for note in summary["notes"])
    with pytest.raises(RecipeError, match="chooses by hidden labels; it needs answers: oracle"):
        run(recipe("person", annotator="cheat"), tmp_path / "three", cache=cache)


class Everyone(Corners):
    """Would like to see all training cases."""

    role = "all"


def test_a_stage_without_the_source_shows_an_annotator_nothing_of_it(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(registry._registered["annotator"], "everyone", Everyone)
    stage = {
        "strategy": "ripu",
        "annotator": "everyone",
        "steps": 2,
        "batch": 4,
        "answers": "oracle",
        "revise_at_start": True,
    }
    sites = {"dataset": {"name": "phantom_sites", "patients": 3, "test": 2, "size": [32, 32], "slices": 1}}
    data = tiny()["data"] | sites | {"source": ["source"], "target": ["target"]}
    for streams, domains in (({}, {"source", "target"}), ({"labelled": {"batch": 0}}, {"target"})):
        Corners.seen.clear()
        values = load_recipe(tiny(data=data, stages=[stage | {"streams": streams}]))
        run(values, tmp_path / str(len(domains)), cache=cache)
        manifest = prepare(values, tmp_path / str(len(domains)), cache=cache).manifest
        assert {manifest.case(case.case).domain for _, _, case in Corners.seen} == domains


def test_test_labels_cannot_be_asked_for(tmp_path, cache):
    data = prepare(recipe(), tmp_path, cache=cache)
    with pytest.raises(StoreError, match="no training case"):
        data.hidden_label(data.split.test[0])


def test_the_curve_over_rounds(tmp_path, cache):
    values = recipe()
    summary = run(replace(values, evaluation=replace(values.evaluation, rounds=True)), tmp_path, cache=cache)
    found = [r["selection"] for r in summary["results"] if r["class"] == "mean" and r["predictor"] == "student"]
    assert found == ["last", "round_0", "round_1", "round_2"]
    openings = [
        json.loads(line)["selection"] for line in Path(tmp_path / "test_openings.jsonl").read_text().splitlines()
    ]
    assert openings == ["last", "round_0", "round_1", "round_2"]
    run(values, tmp_path / "plain", cache=cache)
    one, two = weights(tmp_path), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], two[name]) for name in one)

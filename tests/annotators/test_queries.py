"""What annotators ask: within the budget, never twice, and by the score they promise."""

import itertools
import math

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE, Progress
from labeleff.edits import Reviewed
from labeleff.errors import RecipeError
from labeleff.functional.ripu import pixel_score, region_score, select_regions
from labeleff.registry import build

METHODS = ("region_query", "random", "random_foreground", "random_foreground_oracle", "entropy", "bald", "clasp_pe")


def case(name="a", shape=(20, 30), classes=3, seed=0, asked=(), label=None, samples=2):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(samples, classes, *shape, generator=generator).mul(2).softmax(1)
    unknown = np.full(shape, IGNORE, np.uint8)
    truth = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    return Reviewed(
        name, probs, unknown if label is None else label, unknown, (1.0,) * len(shape), asked=asked, truth=truth
    )


def progress(number=0):
    return Progress(100 * number, 1000, 1, 7, round=number)


def ask(method, cases, number=0, **options):
    annotator = build("annotator", method, **options)
    return list(annotator.revise(cases, progress(number))), annotator


def boxes(questions, name=None):
    return tuple((q.origin, q.size) for q in questions if name in (None, q.case))


def cover(questions, shape, name):
    found = np.zeros(shape, int)
    for origin, size in boxes(questions, name):
        found[tuple(slice(o, o + s) for o, s in zip(origin, size, strict=True))] += 1
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per", ["image", "all"])
@pytest.mark.parametrize(
    ("unit", "budget"), [("share", 0.3), ("voxels", 150.0), ("regions", 9.0), ("seconds", 600.0), ("slices", 12.0)]
)
def test_the_budget_is_never_exceeded_and_nothing_is_asked_twice(method, per, unit, budget):
    shapes = {"a": (20, 30), "b": (16, 12)}
    asked = dict.fromkeys(shapes, ())
    options = {"per": per, "unit": unit, "budget": budget, "rounds": 3, "most": 50, "seconds": 50.0}
    spent = []
    for number in range(4):
        cases = [case(name, shape, seed=number, asked=asked[name]) for name, shape in shapes.items()]
        questions, annotator = ask(method, cases, number, **options)
        assert all(q.score >= p.score for q, p in itertools.pairwise(questions))
        if number == 3:
            assert not questions
            assert "nothing was asked" in annotator.said
        asked = {name: asked[name] + boxes(questions, name) for name in shapes}
        price = {
            "share": lambda own: sum(math.prod(s) for _, s in own),
            "voxels": lambda own: sum(math.prod(s) for _, s in own),
            "regions": len,
            "seconds": lambda own: 50.0 * len(own),
            "slices": lambda own: len({p for o, s in own for p in range(o[0], o[0] + s[0])}),
        }[unit]
        cost = {name: price(asked[name]) for name in shapes}
        limit = {name: budget * (math.prod(shape) if unit == "share" else 1) for name, shape in shapes.items()}
        due = (min(number, 2) + 1) / 3
        if per == "image":
            assert all(cost[name] <= limit[name] * due + 1e-6 for name in shapes)
        else:
            whole = sum(limit.values()) if unit == "share" else budget
            assert sum(cost.values()) <= whole * due + 1e-6
        spent.append(sum(cost.values()))
    assert spent[0] > 0
    assert spent[2] > spent[0]
    for name, shape in shapes.items():
        found = np.zeros(shape, int)
        for origin, size in asked[name]:
            found[tuple(slice(o, o + s) for o, s in zip(origin, size, strict=True))] += 1
        assert found.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_questions_are_a_function_of_the_progress(method):
    cases = [case("a"), case("b", seed=1)]
    one, two = (ask(method, cases, budget=0.2)[0] for _ in range(2))
    assert one == two
    if method.startswith("random") or method == "clasp_pe":
        assert boxes(ask(method, cases, 1, budget=0.2)[0]) != boxes(one)


def test_regions_are_those_of_the_region_score():
    own = case(shape=(30, 40), samples=1)
    questions, _ = ask("region_query", [own], budget=0.1, rounds=1, radius=[2])
    logits = own.probs.log()
    centres = select_regions(region_score(logits, 2)[0], 2, int(0.1 * 1200 / 25))
    expected = [tuple(max(0, c - 2) for c in centre) for centre in centres.tolist()]
    assert [q.origin for q in questions] == expected


def test_the_pixel_form_asks_for_single_voxels_outside_one_anothers_windows():
    own = case(shape=(30, 40), samples=1)
    questions, _ = ask("region_query", [own], form="pixel", window=[5], unit="regions", budget=12, rounds=1)
    centres = select_regions(pixel_score(own.probs.log(), 5)[0], 0, 12, suppress=5)
    assert [q.origin for q in questions] == [tuple(c) for c in centres.tolist()]
    assert {q.size for q in questions} == {(1, 1)}


def test_the_authors_round_up_in_every_round():
    """N = ceil(H W (ratio / R) / (2 k + 1)^2) regions a round, clipped ones not paid back."""
    shape, asked = (37, 41), ()
    for number in range(3):
        own = case(shape=shape, asked=asked, seed=number)
        questions, _ = ask("region_query", [own], number, budget=0.06, rounds=3, rounding="up")
        assert len(questions) == math.ceil(37 * 41 * 0.02 / 9)
        asked += boxes(questions)


def test_anisotropic_regions_and_single_slices():
    own = case(shape=(1, 12, 14))
    questions, _ = ask("entropy", [own], radius=[1, 2, 1], budget=0.3, rounds=1)
    assert {q.size for q in questions} <= {(1, a, b) for a in (3, 4, 5) for b in (2, 3)}
    assert questions


def test_known_voxels_are_no_centres():
    label = np.full((20, 30), IGNORE, np.uint8)
    label[:, :20] = 0
    questions, _ = ask("random", [case(label=label)], budget=0.9, rounds=1, radius=[0])
    assert questions
    assert min(q.origin[1] for q in questions) == 20


def test_exhaustion_stops_and_is_said():
    questions, _ = ask("random", [case(shape=(6, 6))], budget=1.0, rounds=1)
    asked = boxes(questions)
    more, annotator = ask("random", [case(shape=(6, 6), asked=asked)], 0, budget=1.0, rounds=1)
    for _ in range(5):
        asked += boxes(more)
        more, annotator = ask("random", [case(shape=(6, 6), asked=asked)], 0, budget=1.0, rounds=1)
    assert not more
    assert "nothing was asked" in annotator.said


def test_foreground_shares():
    """Two thirds of the regions lie on what is seen as foreground, every class with equal odds."""
    shape = (60, 60)
    probs = torch.zeros(1, 3, *shape)
    probs[:, 0] = 1
    probs[:, :, 10:20, 10:50] = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    probs[:, :, 40:50, 10:50] = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    own = case(shape=shape)._replace(probs=probs, truth=probs[0].flip(1).argmax(0).numpy().astype(np.uint8))
    questions, _ = ask("random_foreground", [own], unit="regions", budget=30, rounds=1, radius=[0])
    classes = [int(probs[0].argmax(0)[q.origin]) for q in questions]
    assert classes.count(1) >= 9
    assert classes.count(2) >= 9
    assert classes.count(0) >= 5
    oracle, _ = ask("random_foreground_oracle", [own], unit="regions", budget=30, rounds=1, radius=[0])
    assert [int(own.truth[q.origin]) for q in oracle].count(1) >= 9


@pytest.mark.parametrize(("budget", "each"), [(1, 1), (4, 4)])
def test_shares_of_few_regions_are_right_on_average(budget, each):
    """Of one region per image and round, two thirds still go to the foreground: rounding down would leave it none."""
    shape, count = (24, 24), 300
    probs = torch.zeros(1, 3, *shape)
    probs[:, 0] = 1
    probs[:, :, 2:6] = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    probs[:, :, 16:20] = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    many = [case(f"c{n}", shape)._replace(probs=probs) for n in range(count)]
    questions, _ = ask("random_foreground", many, unit="regions", budget=budget, rounds=1, radius=[0])
    assert len(questions) == each * count
    found = np.bincount([int(probs[0].argmax(0)[q.origin]) for q in questions], minlength=3) / len(questions)
    by_chance = 0.34 * 4 / 24  # the rest is drawn anywhere, on a class of four rows of 24 too
    expected = np.array([1 - 2 * (0.33 + by_chance), 0.33 + by_chance, 0.33 + by_chance])
    np.testing.assert_allclose(found, expected, atol=4 * math.sqrt(0.25 / len(questions)))


def test_a_round_that_cannot_pay_one_region_says_so():
    questions, annotator = ask("random", [case()], unit="voxels", budget=40, rounds=5, radius=[1])
    assert not questions
    assert "take a smaller radius" in annotator.said


def test_bald_looks_where_samples_differ():
    probs = torch.full((4, 2, 20, 20), 0.5)
    probs[::2, 0, 5:8, 5:8] = probs[1::2, 1, 5:8, 5:8] = 1.0
    probs[::2, 1, 5:8, 5:8] = probs[1::2, 0, 5:8, 5:8] = 0.0
    own = case(shape=(20, 20))._replace(probs=probs)
    (first,), _ = ask("bald", [own], unit="regions", budget=1, rounds=1)
    assert first.origin == (5, 5)


def test_best_regions_of_all_cases():
    sure, torn = case("sure"), case("torn", seed=1)
    sure = sure._replace(probs=torch.tensor([0.999, 0.0005, 0.0005]).view(1, 3, 1, 1).expand(1, 3, 20, 30))
    questions, _ = ask("entropy", [sure, torn], per="all", unit="regions", budget=10, rounds=1)
    assert {q.case for q in questions} == {"torn"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "at most 1"),
        ({"radius": [-1]}, "at least 0"),
        ({"rounds": 0}, "at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(RecipeError, match=message):
        build("annotator", "entropy", **options)

"""The probe sees what features know, on patients it has not seen, and says when they know nothing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from labeleff.batch import Task
from labeleff.errors import ShapeError
from labeleff.evaluation.probe import (
    Course,
    Labelled,
    Probe,
    course_of,
    flatness,
    held_out_dice,
    principal_colours,
    spread_of,
)
from labeleff.recipe_io import load_recipe
from labeleff.registry import get
from labeleff.runner import run

from ..conftest import tiny

RANDOM = np.random.default_rng(0)


def test_spread_against_sums():
    x = RANDOM.normal(size=(30, 4)).astype(np.float32) + 1
    found = spread_of(x)
    values = np.sqrt(np.linalg.eigvalsh(np.cov(x.T.astype(float), bias=True) * 30))
    shares = values / values.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-5)
    cosines = [
        x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i in range(30) for j in range(30) if i != j
    ]
    assert found["mean_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)


def test_collapse_is_said_with_numbers():
    same = np.tile(RANDOM.normal(size=(1, 8)), (50, 1)).astype(np.float32)
    line = same + RANDOM.normal(size=(50, 1)) * np.ones((1, 8))
    rich = RANDOM.normal(size=(50, 8))
    assert spread_of(same) == {"effective_rank": 0.0, "mean_cosine": pytest.approx(1)}
    assert spread_of(line.astype(np.float32))["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert "effective rank 0.00" in flatness(spread_of(same))
    assert "effective rank 1.0" in flatness(spread_of(line.astype(np.float32)))
    assert not flatness(spread_of(rich.astype(np.float32)))
    assert not flatness({})


def test_the_head_is_measured_on_patients_it_has_not_seen():
    labels = RANDOM.integers(0, 3, 600).astype(np.uint8)
    patients = np.repeat([f"p{i}" for i in range(6)], 100)
    good = np.eye(3, dtype=np.float32)[labels] + 0.01 * RANDOM.normal(size=(600, 3)).astype(np.float32)
    assert held_out_dice(good, labels, patients, 3) == [1.0, 1.0]
    # features that know which patient they come from, whose labels are all of one class, know nothing of another's
    own = np.repeat(np.arange(6), 100)
    told = held_out_dice(np.eye(6, dtype=np.float32)[own], (own % 3).astype(np.uint8), patients, 3)
    assert max(told) < 0.7
    assert held_out_dice(good[:100], labels[:100], patients[:100], 3) == [None, None]
    assert held_out_dice(good, np.zeros(600, np.uint8), patients, 3) == [None, None]


@pytest.mark.parametrize("level", ["encoder", "decoder", "bottleneck"])
def test_features_of_a_network_that_sees_the_label(level):
    """The image is the label, somewhere in a larger one: what passes through untrained convolutions tells it apart."""
    torch.manual_seed(0)
    task = Task(("background", "one"), 2)
    network = get("backbone", "unet")(task, channels=(8, 16, 16))  # whose bottleneck has four voxels to a place
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cases = []
    for patient in range(6):
        label = np.zeros((90, 5, 110), np.uint8)
        for z in range(1, 4):
            row, column = RANDOM.integers(60), RANDOM.integers(80)
            label[row : row + 30, z, column : column + 30] = 1
        label[:4] = 255
        cases.append(Labelled(f"c{patient}", f"p{patient}", (3.0 * (label == 1))[None].astype(np.float32), label))
    probe = Probe(network, task, (48, 64), 1, level=level)
    values = probe.measure(network.train(), cases)
    assert values["dice"] == values["dice/1"] > 0.9
    blind = probe.measure(network, [replace(case, image=np.zeros_like(case.image)) for case in cases])
    assert blind["dice"] < values["dice"] - 0.1
    assert values == probe.measure(network, cases)
    assert network.training
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    picture = probe.picture(network, cases[0])
    assert picture.shape == (3, 48, 128)
    assert picture.dtype == np.uint8


def test_three_axes():
    task = Task(("background", "one"), 3)
    network = get("backbone", "unet")(task, channels=(4, 8, 8))
    label = np.zeros((20, 24, 30), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    case = Labelled("c", "p", RANDOM.normal(size=(1, 20, 24, 30)).astype(np.float32), label)
    probe = Probe(network, task, (16, 16, 32))
    values = probe.measure(network, [case])
    assert values["dice"] is None  # nobody is left to be measured on
    assert values["effective_rank"] > 1
    assert probe.picture(network, case).shape == (3, 16, 64)


def test_colours():
    """The first component goes along the larger difference, from one end of the colour to the other."""
    features = np.zeros((5, 4, 6), np.float32)
    features[2] = np.arange(6)
    features[4] = 0.1 * np.arange(4)[:, None]
    colours = principal_colours(features)
    assert np.allclose(colours[0], colours[0][:1])
    assert colours[0, 0, 0] < 0.05
    assert colours[0, 0, -1] > 0.95
    assert np.allclose(colours[1], colours[1][:, :1])
    assert np.allclose(principal_colours(np.ones((2, 3, 3), np.float32)), 0.5)


def looks_of(*scores):
    return [(10 * number, {"dice": dice}) for number, dice in enumerate(scores, start=1)]


def test_features_that_have_flattened_are_said_to_have():
    course = course_of(looks_of(0.2, 0.4, 0.5, 0.509, 0.49, 0.505))
    assert course == Course(0.2, 0.509, 40, 0.505, 30)
    assert "0.200 at first, 0.509 at best (step 40), 0.505 at last; no better since step 30" in course.said
    assert course_of(looks_of(0.2, 0.4, 0.5, 0.52)).flat_since is None  # the last is better than all before it
    assert course_of(looks_of(0.2, 0.5, 0.5)).flat_since is None  # one look after it is too few
    assert course_of(looks_of(0.5, 0.3, 0.2)).flat_since == 10  # what was known is being lost
    assert course_of(looks_of(None, None)) is None
    assert course_of(looks_of(None, 0.3)) == Course(0.3, 0.3, 20, 0.3, None)


def test_a_run_that_is_looked_at_is_the_run_that_is_not(tmp_path, cache, capsys):
    values = tiny()
    values["data"] |= {"labelled": 3}
    looked = values | {"evaluation": {"probe": 4}}
    run(load_recipe(values), tmp_path / "one", cache=cache)
    run(load_recipe(looked), tmp_path / "two", cache=cache)
    said = " ".join(capsys.readouterr().out.split())
    one, two = (load_file(tmp_path / name / "predictor.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "two" / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = board.Images("probe/features")  # the principal components, beside the slice
    assert [picture.step for picture in shown] == [4, 6, 10, 12]
    assert all((picture.width, picture.height) == (64, 32) for picture in shown)
    assert [point.step for point in board.Scalars("probe/effective_rank")] == [4, 6, 10, 12]
    courses = json.loads((tmp_path / "two" / "summary.json").read_text())["probe"]
    assert [course["stage"] for course in courses] == [0, 1]
    noted = [(line["stage"], line["step"], line["probe"]) for line in lines if "probe" in line]
    assert [(stage, step) for stage, step, _ in noted] == [(0, 4), (0, 6), (1, 4), (1, 6)]
    assert all(0 <= values["dice"] <= 1 and values["effective_rank"] > 1 for _, _, values in noted)
    assert (tmp_path / "two" / "pictures" / "probe_stage_1.png").exists()
    for course in courses:
        dice = [values["dice"] for stage, _, values in noted if stage == course["stage"]]
        assert [course["first"], course["last"], course["best"]] == [*dice, max(dice)]
        assert f"stage {course['stage']}: Dice of a linear head on the features: {dice[0]:.3f} at first" in said


def test_a_network_without_a_bottleneck_is_refused():
    with pytest.raises(ShapeError, match="no bottleneck"):
        Probe(nn.Conv2d(1, 2, 3, padding=1), Task(("background", "one"), 2), (16, 16))


def test_layers_can_be_named():
    network, task = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1)), Task(("background", "one"), 2)
    assert [tap.module for tap in Probe(network, task, (16, 16), layers=("0",)).taps] == ["0"]
    with pytest.raises(ShapeError, match="no module 'nothing'"):
        Probe(network, task, (16, 16), layers=("0", "nothing"))

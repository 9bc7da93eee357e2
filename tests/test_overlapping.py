"""Regions that overlap: bits, losses against loops of Python floats, whole runs, and what refuses them."""

import json
import math

import numpy as np
import pytest
import torch

from labeleff.data import chest
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError, RecipeError, ShapeError
from labeleff.evaluation.inference import segment
from labeleff.evaluation.metrics import measure
from labeleff.functional.losses import overlapping_losses, probability_mse, segmentation_loss
from labeleff.functional.regions import bits_of, regions_of
from labeleff.recipe_io import load_recipe
from labeleff.report.pictures import overlay
from labeleff.results import read_prediction
from labeleff.runner import run

SHAPES = [(5, 4), (3, 2, 4)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2)


def test_bits_and_regions():
    bits = torch.tensor([[[0, 1, 2, 3], [4, 7, 255, 5]]])
    regions = regions_of(bits, 3)
    assert regions[0, :, 0].tolist() == [[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert regions[0, :, 1].tolist() == [[0, 1, 255, 1], [0, 1, 255, 0], [1, 1, 255, 1]]
    back = bits_of(regions == 1)
    assert back[0].tolist() == [[0, 1, 2, 3], [4, 7, 0, 5]]
    assert bits_of(torch.ones(1, 7, 2, dtype=torch.bool)).tolist() == [[127, 127]]
    with pytest.raises(ShapeError, match="at most 7"):
        bits_of(torch.ones(1, 8, 2, dtype=torch.bool))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dice", ["squared", "linear"])
def test_losses(shape, dice):
    logits = randn(2, 3, *shape)
    label = (randn(2, 3, *shape, seed=1) > 0.3).long()
    label[0, 1, :2] = 255
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    total, count, sums = 0.0, 0, np.zeros((2, 3, 3))
    for b, r, *voxel in np.ndindex(2, 3, *shape):
        y, value = int(label[(b, r, *voxel)]), p[(b, r, *voxel)]
        if y == 255:
            continue
        total, count = total - math.log(value if y else 1 - value), count + 1
        sums[b, r] += [value * y, value * value if dice == "squared" else value, y]
    if dice == "squared":
        ratios = [(2 * s[0] + 1e-10) / (s[1] + s[2] + 1e-10) for s in sums.sum(0)]
    else:
        ratios = [(2 * s[0] + 1e-5) / (s[1] + s[2] + 1e-5) for s in sums.reshape(-1, 3)]
    found = [float(loss) for loss in overlapping_losses(logits, label, dice=dice)]
    assert found == pytest.approx([total / count, 1 - sum(ratios) / len(ratios)], rel=1e-5)
    assert float(segmentation_loss(logits, label, dice=dice)) == pytest.approx(sum(found) / 2)


def test_consistency_has_sigmoids():
    logits, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1).sigmoid()
    valid = randn(2, 1, 4, 4, seed=2) > 0
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    squares = (p - target.double().numpy()) ** 2 * valid.numpy()
    found = float(probability_mse(logits, target, valid, exclusive=False))
    assert found == pytest.approx(squares.sum() / (3 * int(valid.sum())), rel=1e-5)


def test_segmentation_and_metrics():
    probs = torch.zeros(2, 6, 8)
    probs[0, :, :4] = 0.9
    probs[1, 2:5, 2:] = 0.5
    probs[1, 0, 0] = 0.8
    found = segment(probs, exclusive=False)
    assert found[3].tolist() == [1, 1, 3, 3, 2, 2, 2, 2]
    assert found[0, 0] == 3
    clean = segment(probs, exclusive=False, largest_component=True)
    assert clean[0, 0] == 1
    reference = found.copy()
    reference[5] = 255
    reference[3, 2:] &= 1
    rows = measure(found, reference, classes=("background", "a", "b"), spacing=(1.0, 1.0), exclusive=False)
    a, b = rows
    assert (a["class"], a["dice"], a["reference_voxels"]) == ("a", 1.0, 20)
    assert (b["predicted_voxels"], b["reference_voxels"]) == (19, 13)
    assert b["dice"] == pytest.approx(2 * 13 / 32)


def test_pictures_lay_regions_over_one_another():
    image, label = np.zeros((20, 20)), np.zeros((20, 20), np.uint8)
    label[2:12, 2:12] |= 1
    label[6:18, 6:18] |= 2
    label[0] = 255
    shown = overlay(image, label, exclusive=False)
    one, two, both, none = shown[4, 4], shown[15, 15], shown[9, 9], shown[1, 15]
    assert not np.allclose(one, two)
    assert not np.allclose(both, one)
    assert not np.allclose(both, two)
    assert none.tolist() == [0, 0, 0]
    assert not shown[0].any()


def test_the_phantom_overlaps_and_is_a_function_of_its_patient():
    image, label = chest.generate(1, 3, shape=(64, 64))
    again, _ = chest.generate(1, 3, shape=(64, 64))
    assert np.array_equal(image, again)
    assert not np.array_equal(image, chest.generate(1, 4, shape=(64, 64))[0])
    masks = [(label >> bit) & 1 for bit in range(5)]
    assert all(mask.sum() > 20 for mask in masks)
    assert (masks[1] & masks[2]).sum() > 20  # the heart lies over the left lung
    assert sum((masks[side] & masks[3 + side]).sum() for side in (0, 1)) > 5


def test_manifests_hold_as_many_regions_as_fit():
    cases = (Case("a", "a", (Source("a"),)),)
    names = tuple(str(n) for n in range(9))
    assert Manifest("x", cases, names[:8], 2, overlapping=True).overlapping
    with pytest.raises(DataError, match=r"8 regions that may overlap; there are 1 … 7"):
        Manifest("x", cases, names, 2, overlapping=True)


def recipe(**changes):
    values = {
        "name": "chest",
        "data": {"dataset": {"name": "phantom_chest", "patients": 8, "test": 4, "size": [48, 48]}, "labelled": 3},
        "backbone": {"name": "unet", "channels": [8, 16]},
        "stages": [{"strategy": "mean_teacher", "steps": 60, "batch": 4, "optimiser": {"lr": 1e-2}}],
    }
    values["data"]["patch"] = [48, 48]
    return load_recipe({**values, **changes})


def test_a_run_scores_every_region(tmp_path, cache):
    summary = run(recipe(), tmp_path, cache=cache)
    scores = {row["class"]: row["dice"] for row in summary["results"] if row["predictor"] == "student"}
    assert list(scores) == [*chest.CLASSES[1:], "mean"]
    assert scores["right lung"] > 0.7
    assert scores["heart"] > 0.4
    maps = [read_prediction(tmp_path, name) for name in ("p0008", "p0009", "p0010", "p0011")]
    assert any(((label & 2 > 0) & (label & 4 > 0)).any() for label in maps)  # a lung and the heart at one place
    assert json.loads((tmp_path / "summary.json").read_text())["classes"] == list(chest.CLASSES)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "pictures").glob("*.png")) == [
        "best",
        "median",
        "worst",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": [{"strategy": "bcp", "steps": 1}]},
            r"stages\.0\.strategy: bcp needs classes that exclude one another",
        ),
        (
            {"stages": [{"strategy": "supervised", "steps": 2, "annotator": "pseudo_labels", "revise_every": 1}]},
            r"stages\.0\.annotator: pseudo_labels needs classes that exclude",
        ),
        ({"evaluation": {"probe": 5}}, r"evaluation\.probe: needs classes that exclude"),
        (
            {"stages": [{"strategy": {"name": "supervised", "loss": "noise_robust_dice"}, "steps": 1}]},
            "loss noise_robust_dice is for classes that exclude",
        ),
    ],
)
def test_what_cannot_do_regions_says_so(tmp_path, cache, changes, message):
    with pytest.raises(RecipeError, match=message):
        run(recipe(**changes), tmp_path, cache=cache)

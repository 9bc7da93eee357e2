"""Forecasts against curves whose end is known, and refusal where nothing is known."""

import math

import numpy as np
import pytest

from labeleff.evaluation.forecasting import FARTHEST, Forecast, NoGround


def curve(budgets, *, end=0.9, gap=0.35, rate=0.7, noise=0.01, draws=4, patients=15, seed=0):
    """Return scores [draw, 1, patient] at each budget, of a power law."""
    generator = np.random.default_rng(seed)
    person = generator.normal(0, 0.03, (1, 1, patients))
    return [
        end
        - gap * n**-rate
        + person
        + generator.normal(0, noise, (draws, 1, 1))
        + generator.normal(0, 0.02, (draws, 1, patients))
        for n in budgets
    ]


@pytest.mark.slow
def test_the_truth_lies_in_the_interval_and_the_middle_is_near():
    hits, errors = 0, []
    for seed in range(20):
        found = Forecast([1, 2, 4, 8], curve([1, 2, 4, 8], seed=seed), seed=seed).at(32)
        truth = 0.9 - 0.35 * 32**-0.7
        hits += found.low <= truth <= found.high
        errors.append(abs(found.value - truth))
    assert hits >= 18
    assert np.mean(errors) < 0.02


def test_labels_needed_are_those_of_the_curve():
    found = Forecast([1, 2, 4, 8], curve([1, 2, 4, 8], noise=0.002, patients=60)).needed(0.85)
    truth = (0.35 / 0.05) ** (1 / 0.7)
    assert found.low <= truth <= found.high
    assert truth / 1.6 < found.labels < truth * 1.6


def test_a_score_out_of_reach_is_said_to_be():
    found = Forecast([1, 2, 4, 8], curve([1, 2, 4, 8], end=0.8, noise=0.002)).needed(0.97)
    assert math.isinf(found.labels)
    assert found.reached < 0.2
    assert found.limit == FARTHEST * 8


def test_a_score_inside_what_was_run_is_read_off():
    found = Forecast([1, 2, 4, 8], curve([1, 2, 4, 8], noise=0.002)).needed(0.9 - 0.35 * 4**-0.7)
    assert found.labels == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize(
    ("budgets", "options", "reason"),
    [
        ([2, 8], {}, "three|3 label budgets"),
        ([1, 2, 4], {"draws": 2}, "fewer than 3 draws"),
        ([1, 2, 4], {"gap": 0.0, "noise": 0.03}, "no trend"),
        ([1, 2, 4], {"gap": -0.2}, "no trend"),
    ],
)
def test_no_ground_no_forecast(budgets, options, reason):
    with pytest.raises(NoGround, match=reason):
        Forecast(budgets, curve(budgets, **options))


def test_no_forecast_far_beyond_what_was_run():
    with pytest.raises(NoGround, match="ends at 80"):
        Forecast([1, 2, 4, 8], curve([1, 2, 4, 8])).at(100)

"""Schedules at points computed by hand."""

import math

import pytest

from labeleff.functional.schedules import early_decay, ramped, rate_factor, sigmoid_rampup


def test_rampup():
    assert sigmoid_rampup(0) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(0.5) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(1) == sigmoid_rampup(7) == 1
    assert sigmoid_rampup(-1) == sigmoid_rampup(0)


def test_a_weight_rises_over_a_share_of_the_stage():
    assert [ramped(2.0, t, 0.4) for t in (0, 0.2, 0.4, 1)] == pytest.approx(
        [2 * math.exp(-5), 2 * math.exp(-1.25), 2, 2]
    )
    assert ramped(2.0, 0.0, 0.0) == 2


def test_a_young_teacher_is_the_mean_of_its_students():
    assert [early_decay(step, 0.99) for step in (0, 1, 3, 99, 500)] == pytest.approx([0, 0.5, 0.75, 0.99, 0.99])


def test_authors_la_schedule_drops_by_ten_every_2500():
    rates = [0.01 * rate_factor(step, 15000, name="step") for step in (0, 2499, 2500, 5000, 7500, 14999)]
    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5, 1e-7])


def test_warmup_poly_cosine_constant():
    assert [rate_factor(s, 100, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert rate_factor(50, 100, name="poly") == pytest.approx(0.5**0.9)
    assert rate_factor(50, 100, name="cosine") == pytest.approx(0.5)
    assert rate_factor(60, 110, name="cosine", warmup=10, final=0.2) == pytest.approx(0.6)
    assert rate_factor(99, 100) == 1

"""Schedules at points computed by hand."""

import math

import pytest

from labeleff.functional.schedules import rate_factor, sigmoid_rampup


def test_rampup():
    assert sigmoid_rampup(0) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(0.5) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(1) == sigmoid_rampup(7) == 1
    assert sigmoid_rampup(-1) == sigmoid_rampup(0)


def test_authors_la_schedule_drops_by_ten_every_2500():
    rates = [0.01 * rate_factor(step, 15000, name="step") for step in (0, 2499, 2500, 5000, 7500, 14999)]
    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5, 1e-7])


def test_warmup_poly_cosine_constant():
    assert [rate_factor(s, 100, warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert rate_factor(50, 100, name="poly") == pytest.approx(0.5**0.9)
    assert rate_factor(50, 100, name="cosine") == pytest.approx(0.5)
    assert rate_factor(60, 110, name="cosine", warmup=10, final=0.2) == pytest.approx(0.6)
    assert rate_factor(99, 100) == 1

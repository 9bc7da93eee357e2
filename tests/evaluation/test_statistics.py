"""Statistics against hand-computed values and against simulated sweeps with known answers."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from labeleff.errors import ShapeError
from labeleff.evaluation.statistics import (
    FEWEST_DRAWS,
    Interval,
    Resamples,
    area,
    compare,
    detectable_difference,
    gap_closed,
    holm,
    interval,
    labels_needed,
    rank_agreement,
    rank_shares,
    savings,
    spread,
)

# standard deviations of draws, patients and the rest, as measured for the left atrium in 2-D; 20 test patients
SCORES, DIFFERENCES = (0.03, 0.06, 0.05), (0.03, 0.02, 0.04)
SIMULATIONS = 1000


def simulated(generator, mean, sds, draws, patients=20):
    draw, patient, rest = sds
    return (
        mean
        + generator.normal(0, draw, (draws, 1, 1))
        + generator.normal(0, patient, (1, 1, patients))
        + generator.normal(0, rest, (draws, 1, patients))
    )


@pytest.mark.parametrize(("draws", "least", "most"), [(3, 0.91, 1), (5, 0.91, 1), (10, 0.93, 0.97), (20, 0.93, 0.97)])
@pytest.mark.parametrize("sds", [SCORES, DIFFERENCES])
def test_intervals_cover_what_they_say(sds, draws, least, most):
    generator = np.random.default_rng(draws)
    hits = 0
    for _ in range(SIMULATIONS):
        found = interval(simulated(generator, 0.8, sds, draws), count=500)
        hits += found.low <= 0.8 <= found.high
    assert least <= hits / SIMULATIONS <= most


@pytest.mark.parametrize("draws", [6, 10])
def test_no_effect_is_found_in_one_sweep_of_twenty_and_an_effect_in_most(draws):
    generator = np.random.default_rng(100 + draws)
    found = {0.0: 0, 0.06: 0}
    for gain in found:
        for _ in range(SIMULATIONS):
            base = simulated(generator, 0.8, SCORES, draws)
            other = base + simulated(generator, gain, DIFFERENCES, draws)
            found[gain] += compare(other, base).p < 0.05
    assert found[0.0] / SIMULATIONS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
    assert found[0.06] / SIMULATIONS > 0.8


def test_three_ways_crossed_recover_their_components():
    generator = np.random.default_rng(0)
    truth = {"draw": 0.09, "seed": 0.04, "patient": 0.25, "draw:patient": 0.16, "draw:seed:patient": 0.01}
    total = dict.fromkeys(truth, 0.0)
    for _ in range(60):
        cells = np.zeros((12, 8, 30))
        for name, variance in truth.items():
            shape = [
                n if part in name.split(":") else 1
                for part, n in zip(("draw", "seed", "patient"), cells.shape, strict=True)
            ]
            cells = cells + generator.normal(0, math.sqrt(variance), shape)
        for name in truth:
            total[name] += spread(cells).components[name] / 60
    for name, variance in truth.items():
        assert total[name] == pytest.approx(variance, rel=0.25)


def test_two_ways_by_hand():
    # draws differ by 2, patients by 4, nothing else: variances of the effects 2 and 8
    found = spread([[0.0, 4.0], [2.0, 6.0]])
    assert found.components == pytest.approx({"draw:patient": 0, "draw": 2, "patient": 8})
    assert found.variance == pytest.approx(2 / 2 + 8 / 2)
    # mean squares 4 and 16, one degree of freedom each: (20/4)^2 / ((4/4)^2 + (16/4)^2)
    assert found.freedom == pytest.approx(25 / 17)


def test_with_one_source_of_variance_the_interval_is_students():
    values = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.6, 0.35, 0.25])
    cells = np.repeat(values[:, None], 5, axis=1)
    student = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    found = interval(cells, count=20000)
    assert (found.low, found.high) == pytest.approx(student, abs=0.02)
    assert compare(cells, np.zeros_like(cells)).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)


def test_too_few_draws_are_not_tested_and_two_draws_have_no_interval():
    cells = np.random.default_rng(0).normal(size=(FEWEST_DRAWS, 1, 9))
    assert compare(cells, 0 * cells).p is not None
    few = compare(cells[:-1], 0 * cells[:-1])
    assert few.p is None
    assert few.p_these_runs == pytest.approx(stats.wilcoxon(cells[:-1].mean((0, 1))).pvalue)
    for draws in (1, 2):
        assert interval(cells[:draws]) == Interval(float(cells[:draws].mean()), None, None)


def test_equal_scores_are_no_difference():
    cells = np.random.default_rng(0).random((6, 2, 4))
    found = compare(cells, cells)
    assert (found.interval.value, found.p, found.p_these_runs, found.effect_size) == (0, None, None, None)
    assert not found.interval.excludes(0)


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_area_is_the_mean_height():
    assert area([1, 3, 5], [0.5, 0.5, 0.5]) == pytest.approx(0.5)
    assert area([1, 2, 4], [[0.0, 1.0, 1.0]]) == pytest.approx((0.5 * 1 + 1 * 2) / 3)
    assert area([1, 2, 4], [0.0, 1.0, 1.0], scale="log") == pytest.approx(0.75)
    assert area([0, 1, 4], [0.0, 1.0, 1.0]) == pytest.approx((0.5 * 1 + 1 * 3) / 4)
    for budgets, scale in (([2, 2], "linear"), ([-1, 2], "linear"), ([0, 2], "log")):
        with pytest.raises(ShapeError, match="rising"):
            area(budgets, [0, 1], scale=scale)


def test_labels_needed_by_hand():
    assert labels_needed([4, 8, 16], [0.6, 0.7, 0.8], 0.75) == pytest.approx(8 * math.sqrt(2))
    assert labels_needed([4, 8, 16], [0.6, 0.7, 0.8], 0.6) == 4
    assert math.isinf(labels_needed([4, 8], [0.6, 0.7], 0.71))
    assert labels_needed([4, 8], [0.6, 0.7], 0.5) == 0
    # a dip is levelled: 0.7 and 0.6 become 0.65, reached at 8
    assert labels_needed([4, 8, 16, 32], [0.5, 0.7, 0.6, 0.8], 0.65) == pytest.approx(8)


def test_labels_needed_on_many_curves_as_on_each():
    """Against the isotonic regression of scikit-learn and the interpolation of numpy, curve by curve."""
    generator, budgets = np.random.default_rng(4), [1, 2, 5, 8, 16]
    curves = generator.normal(0.5, 0.1, (300, 5)) + 0.05 * np.arange(5)
    curves[0], curves[1] = 0.5, (0.4, 0.6, 0.6, 0.6, 0.8)
    targets = generator.uniform(0.35, 0.85, 300)
    targets[:2] = 0.5, 0.6
    found = labels_needed(budgets, curves, targets)
    for one, curve, target in zip(found, curves, targets, strict=True):
        fit = IsotonicRegression().fit_transform(np.arange(5), curve)
        if target > fit[-1] or target < fit[0]:
            assert one == (math.inf if target > fit[-1] else 0)
            continue
        place = next(i for i in range(5) if fit[i] >= target - 1e-9)
        pair = slice(max(place - 1, 0), place + 1)
        assert one == pytest.approx(2 ** np.interp(target, fit[pair], np.log2(budgets)[pair]))
    assert np.isinf(found).any()
    assert (found == 0).any()
    assert found[0] == 1
    assert found[1] == 2


def test_savings_of_a_method_that_doubles_the_labels():
    generator = np.random.default_rng(3)
    noise = generator.normal(0, 0.01, (5, 1, 20))
    curve = [0.5 + 0.1 * k + noise for k in range(4)]  # 2, 4, 8, 16 labels
    found = savings([2, 4, 8, 16], curve, curve[2] + 0 * noise, 4)
    assert found.factor == pytest.approx(2)
    assert found.low <= 2 <= found.high
    assert found.censored is None
    beyond = savings([2, 4, 8, 16], curve, curve[3] + 0.2, 4)
    assert (beyond.factor, beyond.censored, beyond.limit) == (math.inf, "above", 4)
    worse = savings([2, 4, 8, 16], curve, curve[0] - 0.2, 4)
    assert (worse.factor, worse.censored, worse.limit) == (0, "below", 0.5)


def test_gap_closed_is_undefined_where_there_is_none():
    assert gap_closed(0.75, 0.7, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.75, 0.8, 0.8) is None


def test_ranks():
    generator = np.random.default_rng(0)
    base = generator.normal(0.5, 0.05, (4, 1, 15))
    shares = rank_shares([base, base + 0.2, base - 0.1])
    assert shares.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert rank_agreement([1, 2, 3], [1, 2, 3]) == 1
    assert rank_agreement([1, 2, 3], [3, 2, 1]) == -1


def test_detectable_difference_is_found_that_often():
    generator = np.random.default_rng(5)
    pilot = spread(simulated(generator, 0, DIFFERENCES, 400, 400))
    smallest = detectable_difference(pilot, 8, 20)
    found = 0
    for _ in range(SIMULATIONS):
        cells = simulated(generator, smallest, DIFFERENCES, 8)
        found += compare(cells, 0 * cells).p < 0.05
    assert found / SIMULATIONS == pytest.approx(0.8, abs=0.06)


def test_resamples_refuse_other_shapes_and_missing_scores():
    with pytest.raises(ShapeError, match="do not fit"):
        Resamples(2, 1, 3).means(np.zeros((2, 1, 4)))
    with pytest.raises(ShapeError, match="missing"):
        spread([[0.0, np.nan], [1.0, 2.0]])
    with pytest.raises(ShapeError, match="cannot be paired"):
        compare(np.zeros((2, 3)), np.zeros((3, 3)))

"""ADELE against values computed by other means: scipy's curve_fit, loops over voxels, sums written out."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional import losses
from labeleff.functional.adele import (
    correct_labels,
    correction_epoch,
    fit_early_learning,
    flat_start,
    multiscale_consistency,
    multiscale_cross_entropy,
    multiscale_losses,
)

# -- the curve, as curve_fit and a loop over epochs have it --------------------------------------------------------------


def naive_fit(iou, unit=1.0):
    count = len(iou)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = curve_fit(
            lambda t, a, b, c: a * (1 - np.exp(-1 / c * t**b)),
            np.linspace(0, count * unit, count),
            np.asarray(iou, float),
            p0=(1, 1, 1),
            sigma=np.geomspace(1, 0.1, count),
            absolute_sigma=True,
            bounds=([0, 0, 0], [1, 1, np.inf]),
        )
    return found


def naive_epoch(iou, total, r, *, skip=True):
    shift = 0
    if skip:
        while shift + 1 < len(iou) and iou[shift + 1] - iou[shift] < 0.1:
            shift += 1
    if len(iou) - shift <= 1 or not np.any(iou[shift:]):
        return total
    a, b, c = naive_fit(iou[shift:])

    def slope(t):
        return a * b / c * t ** (b - 1) * np.exp(-(t**b) / c)

    epoch = 1
    for t in range(1, total):
        lost = abs(slope(t + 1e-6) - slope(1 + 1e-6)) / slope(1 + 1e-6)
        epoch += (0 if lost > 1 else lost) <= r
    return min(total, epoch + shift)


EPOCH = np.arange(1, 101)
NOISE = np.random.default_rng(13).normal(0, 0.02, 100)
CURVES = {
    "saturating": 0.8 * (1 - np.exp(-EPOCH / 1.5)),
    "memorising": 0.6 * (1 - np.exp(-EPOCH / 1.5)) + 0.3 / (1 + np.exp(-(EPOCH - 50) / 8)),
    "noisy": np.clip(0.8 * (1 - np.exp(-EPOCH / 3)) + NOISE, 0, 1),
    "late": np.where(EPOCH < 11, 0, 0.8 * (1 - np.exp(-(EPOCH - 10) / 2))),
    "step": np.where(EPOCH < 5, 0, 0.8),
    "slow": 0.8 * (1 - np.exp(-EPOCH / 70)),
    "linear": 0.8 * EPOCH / 100,
    "absent": np.zeros(100),
}
FIRST = {
    0.9: {"saturating": 6, "memorising": 6, "noisy": 8, "late": 17, "step": 6},
    0.5: {"saturating": 3, "memorising": 4, "noisy": 4, "late": 13, "step": 6},
}


def first_trigger(curve, epoch):
    """Return the 1-based number of the first epoch after which the class is due, or None."""
    return next((n for n in range(1, len(curve) + 1) if n - 1 >= epoch(curve[:n])), None)


@pytest.mark.parametrize("r", [0.9, 0.5])
@pytest.mark.parametrize("name", CURVES)
def test_first_trigger_of_example_curves(name, r):
    def ours(curve):
        return correction_epoch(curve, total=100, r=r)

    assert first_trigger(CURVES[name], ours) == FIRST[r].get(name)
    for count in (2, 5, 6, 12, 17, 40):
        assert ours(CURVES[name][:count]) == naive_epoch(CURVES[name][:count], 100, r)


@pytest.mark.parametrize("name", ["saturating", "memorising", "noisy", "slow", "linear"])
@pytest.mark.parametrize("count", [3, 8, 30, 100])
def test_the_fit_is_that_of_curve_fit(name, count):
    a, b, c = fit_early_learning(CURVES[name][:count])
    t = np.linspace(0, count, count)
    one, two = naive_fit(CURVES[name][:count]), (a, b, c)
    values = [p[0] * (1 - np.exp(-(t ** p[1]) / p[2])) for p in (one, two)]
    assert np.allclose(*values, atol=1e-3)
    assert 0 <= a <= 1
    assert 0 <= b <= 1
    assert c >= 0


def test_a_curve_of_the_family_is_found_again():
    t = np.linspace(0, 40, 40)
    assert fit_early_learning(0.7 * (1 - np.exp(-(t**0.8) / 3))) == pytest.approx((0.7, 0.8, 3), rel=1e-3)


@pytest.mark.parametrize("name", ["saturating", "memorising", "noisy", "slow", "root"])
@pytest.mark.parametrize("count", [25, 70, 100])
def test_epochs_of_several_measurements_as_of_voc(name, count):
    unit, total = 100 / 1058.1, 16
    t = np.arange(1, 101) * unit
    curves = CURVES | {"root": 0.7 * (1 - np.exp(-np.sqrt(t)))}
    a, b, c = naive_fit(curves[name][:count], unit)
    slope = [a * b / c * (e + 1e-6) ** (b - 1) * np.exp(-((e + 1e-6) ** b) / c) for e in range(1, total)]
    lost = [abs(s - slope[0]) / slope[0] for s in slope]
    found = correction_epoch(curves[name][:count], total=total, skip_flat_start=False, unit=unit)
    assert found == min(total, 1 + sum(share <= 0.9 for share in lost))


def test_a_start_that_is_skipped_counts_in_epochs():
    curve = np.concatenate([np.zeros(10), 0.8 * (1 - np.exp(-np.arange(1, 41) / 3))])
    late = correction_epoch(curve, total=100, unit=0.4)
    assert flat_start(curve) == 9
    assert late == 4 + correction_epoch(curve[9:], total=100, skip_flat_start=False, unit=0.4)


def test_late_points_weigh_a_hundred_times_the_first():
    curve = np.full(20, 0.5)
    early, late = curve.copy(), curve.copy()
    early[1] += 0.3
    late[-1] += 0.3
    ends = [p[0] * (1 - np.exp(-(20 ** p[1]) / p[2])) for p in map(fit_early_learning, (early, late))]
    assert abs(ends[1] - 0.5) > 3 * abs(ends[0] - 0.5)


@pytest.mark.parametrize("curve", [[], [0.4], [0.0] * 9, [np.nan] * 9, [0.0, np.nan], [np.nan, 0.4]])
@pytest.mark.parametrize("options", [{}, {"start": "relative"}, {"skip_flat_start": False}], ids=str)
def test_never_where_there_is_nothing_to_judge(curve, options):
    assert correction_epoch(curve, total=50, **options) == 50


def test_a_class_that_is_learned_before_the_first_measurement():
    assert correction_epoch([0.7] * 9, total=50) == 50  # the authors' start waits for a rise
    assert correction_epoch([0.7] * 9, total=50, start="relative") == 2
    assert correction_epoch([0.7] * 9, total=50, skip_flat_start=False) == 2


def test_unmeasured_epochs_keep_their_place():
    curve = CURVES["saturating"][:20].copy()
    whole = correction_epoch(curve, total=100)
    curve[[7, 12]] = np.nan
    assert correction_epoch(curve, total=100) == whole
    assert fit_early_learning(curve) == pytest.approx(fit_early_learning(CURVES["saturating"][:20]), rel=0.05)
    assert np.isfinite(fit_early_learning([np.nan] * 3)).all()


@pytest.mark.parametrize(
    ("curve", "reference", "relative"),
    [
        ([0.0, 0.05, 0.3, 0.6], 1, 0),
        ([0.0, 0.01, 0.015, 0.06, 0.1], 4, 2),
        ([0.5, 0.7, 0.71], 0, 0),
        ([0.7, 0.7, 0.7], 2, 0),
        ([0.0, 0.0, 0.0], 2, 2),
        ([np.nan, np.nan, 0.4, 0.5], 1, 1),
        ([], 0, 0),
    ],
)
def test_flat_start(curve, reference, relative):
    assert flat_start(curve) == reference
    assert flat_start(curve, rule="relative") == relative


# -- the labels, voxel by voxel ------------------------------------------------------------------------------------------


def naive_correct(label, probs, classes, *, threshold, rule, background=None, constraint=True, logic=False, both=False,
                  veto=True, agreement=0.0):  # fmt: skip
    label, probs = np.asarray(label), np.asarray(probs)
    background = threshold if background is None else background
    result = label.copy()
    allowed = {0, *classes}
    for y, p, new in zip(label, probs, result, strict=True):
        count = len(p)
        present = set(np.unique(y).tolist())
        foreground = present & set(range(1, count))
        lost = set()
        for c in foreground:
            places = list(zip(*np.where(y == c), strict=True))
            hits = sum(int(np.argmax(p[(slice(None), *place)])) == c for place in places)
            if hits / len(places) < agreement:
                lost.add(c)
        if rule == "segthor" and not foreground & set(classes):
            continue
        if rule == "voc" and (not set(classes) or (foreground and not foreground & set(classes))):
            continue
        for place in itertools.product(*map(range, y.shape)):
            here = p[(slice(None), *place)]
            k, old = int(np.argmax(here)), int(y[place])
            if rule == "segthor":
                write = (max(here[1:]) > threshold or here[0] > background) and old in allowed and k in allowed
                write = write and (not constraint or k == 0 or k in present)
            else:
                write = max(here) > threshold and k in allowed and (not both or old in allowed)
                write = write and (not constraint or not foreground or k in present)
            if write and old not in lost and k not in lost:
                new[place] = k
            if logic and rule == "segthor" and old != 0 and k == 0:
                new[place] = IGNORE
        if rule == "voc" and veto and (new != 0).sum() < 0.5 * (y != 0).sum() and (new == 0).mean() > 0.95:
            new[...] = y
    return result


def example(shape, classes=4, seed=0, ignored=0.1):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (5, *shape), generator=generator)
    label[0][label[0] == 2] = 0  # a class that the image does not have
    label[1] = 0  # background only
    label[2][label[2] == 0] = 1  # no background
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORE
    label[4] = IGNORE
    probs = (3 * torch.randn(5, classes, *shape, generator=generator)).softmax(1)
    return label, probs


@pytest.mark.parametrize("shape", [(9, 7), (5, 4, 6)])
@pytest.mark.parametrize("classes", [(), (1,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "segthor", "threshold": 0.7},
        {"rule": "segthor", "threshold": 0.9, "background_threshold": 0.4},
        {"rule": "segthor", "threshold": 0.7, "class_constraint": False},
        {"rule": "segthor", "threshold": 0.7, "logic255": True},
        {"rule": "voc", "threshold": 0.8},
        {"rule": "voc", "threshold": 0.8, "mode": "both"},
        {"rule": "voc", "threshold": 0.5, "class_constraint": False, "veto": False},
        {"rule": "segthor", "threshold": 0.5, "agreement": 0.25},
        {"rule": "segthor", "threshold": 0.5, "agreement": 0.25, "class_constraint": False},
        {"rule": "voc", "threshold": 0.5, "agreement": 0.25},
    ],
    ids=str,
)
def test_corrections_are_those_of_a_loop(shape, classes, options):
    label, probs = example(shape)
    names = {"background_threshold": "background", "class_constraint": "constraint", "logic255": "logic"}
    spelt = {names.get(k, k): v for k, v in options.items() if k != "mode"} | {"both": options.get("mode") == "both"}
    found = correct_labels(label, probs, classes, **options)
    assert found.dtype == label.dtype
    assert np.array_equal(found.numpy(), naive_correct(label, probs, classes, **spelt))


def test_the_veto_of_a_vanishing_label():
    label = torch.zeros(1, 10, 10, dtype=torch.long)
    label[0, :2, :4] = 1
    probs = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1).expand(1, 2, 10, 10)
    assert torch.equal(correct_labels(label, probs, [1], threshold=0.8, rule="voc"), label)
    assert not correct_labels(label, probs, [1], threshold=0.8, rule="voc", veto=False).any()
    assert not correct_labels(label, probs, [1], threshold=0.8).any()


def test_an_object_that_was_not_found_is_left_alone():
    """Of class 1 the prediction keeps one voxel of four, of class 2 three of four."""
    label = torch.tensor([[[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 0, 0]]])
    predicted = torch.tensor([[[1, 0, 0, 2], [2, 2, 2, 0], [1, 2, 0, 0]]])
    probs = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    found = correct_labels(label, probs, [1, 2], threshold=0.9, agreement=0.5)
    assert found.tolist() == [[[1, 1, 1, 1], [2, 2, 2, 0], [0, 2, 0, 0]]]
    assert correct_labels(label, probs, [1, 2], threshold=0.9).equal(predicted)
    assert correct_labels(label, probs, [1, 2], threshold=0.9, agreement=0.25).equal(predicted)
    assert correct_labels(label, probs, [1, 2], threshold=0.9, agreement=0.76).equal(label)


def test_the_threshold_must_be_exceeded():
    label = torch.tensor([[[1, 0]]])
    probs = torch.tensor([[[[0.75, 0.75]], [[0.25, 0.25]]]])
    assert torch.equal(correct_labels(label, probs, [1], threshold=0.75), label)
    assert correct_labels(label, probs, [1], threshold=0.74).tolist() == [[[0, 0]]]


def test_classes_that_do_not_exist_are_not_asked_for_and_shapes_must_agree():
    label, probs = example((4, 4))
    assert torch.equal(correct_labels(label, probs, [0, 9], threshold=0.1), label)
    with pytest.raises(ShapeError, match="do not belong"):
        correct_labels(label[:, :3], probs, [1], threshold=0.5)


# -- the losses, written out ----------------------------------------------------------------------------------------------


def naive_losses(logits, label, *, gate=0.8, weights=None, temperature=None):
    """Return consistency and cross-entropy in float64, voxel by voxel."""
    scales = [np.asarray(z.double()) for z in logits]
    weights = [1 / len(scales)] * len(scales) if weights is None else [float(w) for w in weights]
    label = np.asarray(label)
    consistency, entropy = 0.0, 0.0

    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    for b in range(len(label)):
        divergence, surest = 0.0, 0.0
        for place in itertools.product(*map(range, label.shape[1:])):
            z = [s[(b, slice(None), *place)] for s in scales]
            p = [softmax(v) for v in z]
            q = np.clip(sum(w * v for w, v in zip(weights, p, strict=True)), 1e-3, 1 - 1e-3)
            divergence += sum((v * (np.log(v) - np.log(q))).sum() for v in p)
            y = label[(b, *place)]
            if y != IGNORE:
                surest = max(surest, q.max())
                for w, v in zip(weights, z, strict=True):
                    if temperature is None:
                        entropy -= np.log(softmax(w * v)[y])
                    else:
                        entropy -= len(z) * w * np.log(softmax(v / temperature)[y])
        consistency += divergence * (surest >= gate)
    return consistency / label.size, entropy / label.size


def scales(shape, classes=3, count=3, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = [spread * torch.randn(4, classes, *shape, generator=generator) for _ in range(count)]
    logits[0][3] *= 0.01
    logits[1][3] *= 0.01
    logits[2][3] *= 0.01  # an image of which nothing is sure
    label = torch.randint(0, classes, (4, *shape), generator=generator)
    label[1, :2] = IGNORE
    label[2] = IGNORE
    return logits, label


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3)])
@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
@pytest.mark.parametrize("gate", [0.0, 0.8, 0.999])
def test_losses_written_out(shape, weights, temperature, gate):
    logits, label = scales(shape)
    consistency, entropy = naive_losses(logits, label, gate=gate, weights=weights, temperature=temperature)
    assert float(multiscale_consistency(logits, label, gate=gate, weights=weights)) == pytest.approx(
        consistency, rel=1e-5, abs=1e-7
    )
    found = multiscale_cross_entropy(logits, label, weights=weights, temperature=temperature)
    assert float(found) == pytest.approx(entropy, rel=1e-5)


def plain_losses(logits, label, valid, *, dice, gate):
    """Return both losses of a step as their formulas read, for autograd to differentiate."""
    known, space = (label != IGNORE).unsqueeze(1), tuple(range(2, label.ndim + 1))
    y = torch.stack([label == k for k in range(logits[0].shape[1])], 1).double()
    p = [z.softmax(1) for z in logits]
    supervised = 0
    for of_scale in p:
        seen = of_scale * known
        over = (0, *space) if dice == "squared" else space
        size = (seen * seen if dice == "squared" else seen).sum(over) + y.sum(over)
        epsilon = 1e-10 if dice == "squared" else 1e-5
        score = (2 * (seen * y).sum(over) + epsilon) / (size + epsilon)
        supervised += (-(of_scale.log() * y).sum() / known.sum() + 1 - score.mean()) / 2 / len(p)
    q = (sum(p) / len(p)).clamp(1e-3, 1 - 1e-3)
    surest = (q.amax(1, keepdim=True) * (known & valid)).flatten(1).amax(1)
    divergence = sum((of_scale * (of_scale / q).log()).sum(1, keepdim=True) for of_scale in p) * valid
    return supervised, divergence[surest >= gate].sum() / valid.sum()


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("dice", ["squared", "linear"])
@pytest.mark.parametrize("block", [None, 40])
def test_both_losses_of_a_step_and_their_gradient(monkeypatch, shape, dice, block):
    if block:
        monkeypatch.setattr(losses, "CPU_BLOCK", block)
        monkeypatch.setattr(losses, "SMALLEST_BLOCK", 7)
    logits, label = scales(shape, spread=4.0)  # some of q is clamped, image 3 is not sure
    label[2, :1] = 0
    valid = torch.ones(4, 1, *shape, dtype=torch.bool)
    valid[0, ..., 3:] = False
    mine, exact = ([z.clone().to(d).requires_grad_() for z in logits] for d in (torch.float32, torch.float64))
    found = multiscale_losses(mine, label, dice=dice, gate=0.8, valid=valid)
    expected = plain_losses(exact, label, valid, dice=dice, gate=0.8)
    assert [float(v.detach()) for v in found] == pytest.approx([float(v.detach()) for v in expected], rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        grads = torch.autograd.grad(one, mine, retain_graph=True), torch.autograd.grad(other, exact, retain_graph=True)
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b.float(), rtol=1e-4, atol=1e-7)
            assert float(b[2].abs().max()) > 0
    (0.3 * found[0] - 1.7 * found[1]).backward()
    (0.3 * expected[0] - 1.7 * expected[1]).backward()
    for a, b in zip(mine, exact, strict=True):
        assert torch.allclose(a.grad, b.grad.float(), rtol=1e-4, atol=1e-7)


def test_temperature_three_is_the_authors_form_for_three_equal_weights():
    logits, label = scales((6, 5))
    forms = [multiscale_cross_entropy(logits, label, temperature=t) for t in (None, 3.0)]
    assert torch.allclose(*forms)


def test_a_volume_is_its_folded_self():
    logits, label = scales((4, 3, 5))
    folded, flat = [z.flatten(2, 3) for z in logits], label.flatten(1, 2)
    for loss in (multiscale_consistency, multiscale_cross_entropy):
        assert torch.allclose(loss(logits, label), loss(folded, flat))
    probs = logits[0].softmax(1)
    whole = correct_labels(label, probs, [1, 2], threshold=0.6)
    assert torch.equal(whole.flatten(1, 2), correct_labels(flat, probs.flatten(2, 3), [1, 2], threshold=0.6))


def test_gradients_are_those_of_differences():
    logits, label = scales((3, 2), spread=1.0)
    logits = [z[:2, :, :2, :2] for z in logits]
    label = label[:2, :2, :2].clone()
    label[0, 0, 0] = IGNORE
    for loss in (multiscale_consistency, multiscale_cross_entropy):
        moving = [z.clone().requires_grad_() for z in logits]
        loss(moving, label, **({"gate": 0.1} if loss is multiscale_consistency else {})).backward()
        step = 1e-5
        for s, place in itertools.product(range(3), [(0, 0, 0, 0), (1, 2, 1, 0)]):
            sides = []
            for sign in (1, -1):
                shaken = [z.double() for z in logits]
                shaken[s][place] += sign * step
                sides.append(naive_losses(shaken, label, gate=0.1)[loss is multiscale_cross_entropy])
            assert float(moving[s].grad[place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3, abs=1e-6)


def test_weights_can_be_learned():
    logits, label = scales((6, 5), spread=1.0)
    weights = torch.tensor([0.5, 0.2, 0.3], requires_grad=True)
    multiscale_consistency(logits, label, gate=0.1, weights=weights).backward()
    for s in range(3):
        sides = []
        for sign in (1, -1):
            shaken = [float(w) + sign * 1e-5 * (i == s) for i, w in enumerate(weights.tolist())]
            sides.append(naive_losses(logits, label, gate=0.1, weights=shaken)[0])
        assert float(weights.grad[s]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_nothing_known():
    logits, label = scales((6, 5))
    unknown = torch.full_like(label, IGNORE)
    moving = [z.clone().requires_grad_() for z in logits]
    consistency = multiscale_consistency(moving, unknown)
    entropy = multiscale_cross_entropy(moving, unknown, reduction="known")
    nothing = [consistency, entropy, *multiscale_losses(moving, unknown)]
    assert [float(loss.detach()) for loss in nothing] == [0] * 4
    sum(nothing).backward()
    assert all(torch.equal(z.grad, torch.zeros_like(z)) for z in moving)
    nowhere = torch.zeros(4, 1, 6, 5, dtype=torch.bool)
    assert float(multiscale_consistency(logits, label, valid=nowhere)) == 0


def test_padding_counts_nowhere():
    logits, label = scales((6, 5))
    valid = torch.ones(4, 1, 6, 5, dtype=torch.bool)
    valid[..., 3:] = False
    cut = [z[..., :3] for z in logits]
    assert torch.allclose(
        multiscale_consistency(logits, label, valid=valid), multiscale_consistency(cut, label[..., :3])
    )


def test_known_voxels_only():
    logits, label = scales((6, 5))
    share = (label != IGNORE).float().mean()
    forms = [multiscale_cross_entropy(logits, label, reduction=r) for r in ("all", "known")]
    assert torch.allclose(forms[0], forms[1] * share)


def test_half_precision_is_computed_in_float32_and_sizes_must_agree():
    logits, label = scales((6, 5))
    half = [z.bfloat16() for z in logits]
    for loss in (multiscale_consistency, multiscale_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(half, label)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss([z.float() for z in half], label))
        with pytest.raises(ShapeError, match="one grid"):
            loss([logits[0], logits[1][..., :2]], label)
        with pytest.raises(ShapeError, match="2 weights for 3 scales"):
            loss(logits, label, weights=(0.5, 0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multiscale_losses(half, label)
    assert [loss.dtype for loss in found] == [torch.float32] * 2
    assert found == multiscale_losses([z.float() for z in half], label)
    with pytest.raises(ShapeError, match="one grid"):
        multiscale_losses([logits[0], logits[1][..., :2]], label)

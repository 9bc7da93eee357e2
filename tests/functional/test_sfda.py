"""The terms of source-free adaptation, written out in numpy."""

import math

import numpy as np
import pytest
import torch

from labeleff.functional.sfda import class_ratio, class_ratio_kl, weighted_entropy

SHAPES = [(5, 6), (3, 4, 5)]


def logits(shape, classes=3):
    return torch.randn(2, classes, *shape, generator=torch.Generator().manual_seed(0)).mul(3)


def probabilities(scores):
    p = np.exp(scores.double().numpy())
    return p / p.sum(1, keepdims=True)


def mask(shape):
    found = torch.ones(2, 1, *shape, dtype=torch.bool)
    found[0, :, -2:] = False
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy(shape):
    scores, nu = logits(shape), [0.2, 1.0, 3.0]
    p = probabilities(scores)
    voxels = p[:, 0].size
    plain = -(p * np.log(p + 1e-10)).sum() / voxels
    assert float(weighted_entropy(scores)) == pytest.approx(plain, abs=1e-6)
    weighted = -sum(w * (p[:, k] * np.log(p[:, k] + 1e-10)).sum() for k, w in enumerate(nu)) / voxels
    assert float(weighted_entropy(scores, torch.tensor(nu))) == pytest.approx(weighted, abs=1e-5)
    valid = mask(shape)
    inside = valid.expand(2, 3, *shape).numpy()
    cut = -(p * np.log(p + 1e-10))[inside].sum() / valid.sum()
    assert float(weighted_entropy(scores, valid=valid)) == pytest.approx(float(cut), abs=1e-6)
    assert float(weighted_entropy(torch.zeros(1, 4, *shape))) == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_ratios(shape, masked):
    scores = logits(shape)
    valid = mask(shape) if masked else torch.ones(2, 1, *shape, dtype=torch.bool)
    p = probabilities(scores)
    for b in range(2):
        own = p[b].reshape(3, -1)[:, valid[b].flatten().numpy()]
        np.testing.assert_allclose(class_ratio(scores, "mean_softmax", valid=valid)[b], own.mean(1), atol=1e-6)
        leading = (own / (own.max(0) + 1e-10)).sum(1)
        np.testing.assert_allclose(class_ratio(scores, valid=valid)[b], leading / leading.sum(), atol=1e-6)
    sure = 50.0 * torch.nn.functional.one_hot(scores.argmax(1), 3).movedim(-1, 1)
    hard = np.array([[(scores.argmax(1)[b] == k)[valid[b, 0]].float().mean() for k in range(3)] for b in range(2)])
    for how in ("mean_softmax", "max_normalised"):  # equal on predictions that are sure
        np.testing.assert_allclose(class_ratio(sure, how, valid=valid), hard, atol=1e-6)


def test_divergences():
    ratio, prior = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]), np.array([[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])
    expected = {
        "pred_prior": np.mean((ratio * (np.log(ratio + 1e-10) - np.log(prior + 1e-10))).sum(1)),
        "prior_pred": np.mean((prior * (np.log(prior + 1e-10) - np.log(ratio + 1e-10))).sum(1)),
        "cross_entropy": np.mean(-(prior * np.log(ratio + 1e-10)).sum(1)),
    }
    for direction, value in expected.items():
        found = class_ratio_kl(torch.tensor(ratio), torch.tensor(prior), direction=direction)
        assert float(found) == pytest.approx(value, abs=1e-6)
    # a class that is expected nowhere costs -log eps per unit of share
    absent = class_ratio_kl(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]]))
    assert float(absent) == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 23.0259), abs=1e-4)
    softer = class_ratio_kl(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]]), eps=1e-3)
    assert float(softer) < float(absent) - 1


def test_images_of_which_nothing_is_known_take_no_part():
    ratio = torch.tensor([[0.7, 0.3], [0.5, 0.5]], requires_grad=True)
    nothing = torch.full((2, 2), float("nan"))
    prior = nothing.clone()
    prior[1] = torch.tensor([0.9, 0.1])
    found = class_ratio_kl(ratio, prior)
    assert float(found.detach()) == pytest.approx(float(class_ratio_kl(ratio[1:].detach(), prior[1:])))
    found.backward()
    assert ratio.grad[0].tolist() == [0, 0]
    assert torch.isfinite(ratio.grad).all()
    none = class_ratio_kl(ratio, nothing)
    assert float(none.detach()) == 0
    none.backward()


def test_with_a_uniform_prior_the_sum_is_the_mutual_information():
    """L = H(Y|T) + KL(r | uniform) = -MI + log K, with MI = H(mean p) - mean H(p)."""
    scores = logits((5, 6), 4)[:1]
    p = probabilities(scores)[0].reshape(4, -1)
    marginal = p.mean(1)
    information = -(marginal * np.log(marginal)).sum() + (p * np.log(p)).sum(0).mean()
    uniform = torch.full((1, 4), 0.25)
    total = weighted_entropy(scores) + class_ratio_kl(class_ratio(scores, "mean_softmax"), uniform)
    assert float(total) == pytest.approx(math.log(4) - information, abs=1e-5)


@pytest.mark.parametrize("how", ["max_normalised", "mean_softmax"])
def test_gradients_by_differences(how):
    prior = torch.tensor([[0.6, 0.3, 0.1]])

    def loss(scores):
        return weighted_entropy(scores) + class_ratio_kl(class_ratio(scores, how), prior)

    scores = logits((2, 3))[:1].clone().requires_grad_()
    loss(scores).backward()
    for index in [(0, 0, 0, 0), (0, 1, 1, 2), (0, 2, 0, 1)]:
        step = torch.zeros_like(scores)
        step[index] = 5e-3
        change = float((loss(scores + step) - loss(scores - step)).detach()) / 1e-2
        assert float(scores.grad[index]) == pytest.approx(change, abs=3e-4)

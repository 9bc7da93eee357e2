"""Moving averages against their closed form."""

import pytest
import torch
from torch import nn

from labeleff.errors import ShapeError
from labeleff.functional.ema import ema_update_


def network(value):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def test_closed_form_after_many_steps():
    average, expected = network(1.0), 1.0
    for step in range(50):
        ema_update_(average, network(float(step % 7)), 0.9)
        expected = 0.9 * expected + 0.1 * (step % 7)
    for parameter in average.parameters():
        assert torch.allclose(parameter, torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "mean", "count"), [("copy", 4.0, 9), ("average", 0.75 * 1 + 0.25 * 4, 3), ("keep", 1.0, 2)]
)
def test_buffers_follow_their_rule(rule, mean, count):
    average, model = network(0.0), network(0.0)
    average[1].running_mean.fill_(1.0)
    model[1].running_mean.fill_(4.0)
    average[1].num_batches_tracked.fill_(2)
    model[1].num_batches_tracked.fill_(9)  # 0.75 · 2 + 0.25 · 9 = 3.75, truncated to 3
    ema_update_(average, model, 0.75, buffers=rule)
    assert average[1].running_mean.tolist() == [mean, mean]
    assert int(average[1].num_batches_tracked) == count


def test_the_model_is_left_alone_and_no_gradient_is_recorded():
    average, model = network(1.0), network(2.0)
    ema_update_(average, model, 0.5)
    assert all(bool((p == 2).all()) for p in model.parameters())
    assert all(p.grad_fn is None for p in average.parameters())


def test_wrong_use_is_refused():
    with pytest.raises(ShapeError, match=r"decay is 1\.5"):
        ema_update_(network(1.0), network(1.0), 1.5)
    with pytest.raises(ShapeError, match=r"differ in parameter '1\.bias'"):
        ema_update_(nn.Sequential(nn.Linear(2, 2)), network(1.0), 0.5)

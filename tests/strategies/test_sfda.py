"""Adaptation on a toy target: entropy alone empties it, expected sizes do not; what must not move does not."""

import warnings

import pytest
import torch
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.errors import RecipeError
from labeleff.functional.norms import OnBatchStatistics, batch_statistics
from labeleff.functional.sfda import class_ratio
from labeleff.registry import build
from labeleff.testing import toy_geometry

TASK = Task(("background", "organ"), 2)


class Threshold(nn.Module):
    """Calls bright pixels organ: a sure network that the target's brightness leads astray."""

    def __init__(self, gain=4.0, offset=-2.2):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.norm.running_var.fill_(1.0)
            self.head.weight.copy_(torch.tensor([0.0, gain]).view(2, 1, 1, 1))
            self.head.bias.copy_(torch.tensor([0.0, offset]))

    def forward(self, image):
        return self.head(self.norm(image))


def scene(batch=4, share=0.25):
    """Return images in which the organ is brighter than the rest by 1, at half the source's brightness, and its mask."""
    mask = torch.zeros(batch, 16, 16, dtype=torch.int64)
    mask[:, :8, : int(32 * share)] = 1
    noise = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return 0.8 * mask[:, None].float() - 0.3 + 0.1 * noise, mask


def share_of(image, prior=None, label=None):
    extras = {} if prior is None else {"prior": torch.tensor(prior).expand(len(image), -1)}
    label = torch.full(image.shape[:1] + image.shape[2:], IGNORE) if label is None else label
    valid = torch.ones(len(image), 1, *image.shape[2:], dtype=torch.bool)
    return {"unlabelled": Batch(image, label, label, valid, toy_geometry(len(image), image.shape[2:]), extras=extras)}


def adapt(strategy, network, batch, steps=60, lr=0.05):
    strategy.build(network, TASK)
    optimiser = torch.optim.Adam(strategy.parameter_groups(network)[0]["params"], lr=lr)
    for step in range(steps):
        strategy.set_modes(network)
        losses = strategy.step(network, batch, Progress(step, steps)).losses
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    predictor = strategy.predictors(network)["student"].eval()
    with torch.no_grad():
        return predictor(batch["unlabelled"].image).argmax(1)


def dice(one, two):
    return float(2 * ((one == 1) & (two == 1)).sum() / ((one == 1).sum() + (two == 1).sum()))


def test_entropy_alone_empties_the_image_and_expected_sizes_do_not():
    image, mask = scene()
    network = Threshold()
    before = network.eval()(image).argmax(1)
    assert (before == 1).float().mean() < 0.1  # the organ is missed
    alone = adapt(build("strategy", "sfda", kl=0.0, norm_stats="freeze"), Threshold(), share_of(image))
    assert (alone == 1).float().mean() < 0.02
    told = adapt(build("strategy", "sfda", norm_stats="freeze"), Threshold(), share_of(image, [0.6, 0.4]))  # + 60 %
    assert dice(told, mask) > 0.9
    assert dice(told, mask) > dice(before, mask) + 0.3


def test_labels_that_somebody_gives_are_learnt():
    image, mask = scene()
    label = torch.full_like(mask, IGNORE)
    label[:, 6:10, 4:12] = mask[:, 6:10, 4:12]
    strategy = build("strategy", "sfda", kl=0.0, norm_stats="freeze")
    found = adapt(strategy, Threshold(), share_of(image, label=label), steps=150)
    assert dice(found, mask) > 0.9
    torch.manual_seed(0)
    losses = [
        strategy.step(Threshold(), share_of(image, label=one), Progress(0, 1)).losses["entropy"]
        for one in (label, mask)
    ]
    assert float(losses[1].detach()) == 0  # nothing is unknown
    assert float(losses[0].detach()) > 0


@pytest.mark.parametrize("trainable", ["all", "norm_affine"])
@pytest.mark.parametrize("norm_stats", ["update", "freeze", "batch"])
def test_what_is_not_trained_does_not_move_by_a_bit(trainable, norm_stats):
    image, _ = scene()
    network = Threshold()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adapt(
        build("strategy", "sfda", trainable=trainable, norm_stats=norm_stats), network, share_of(image, [0.7, 0.3]), 5
    )
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"norm.weight", "norm.bias"}
    expected |= {"head.weight", "head.bias"} if trainable == "all" else set()
    expected |= (
        {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} if norm_stats == "update" else set()
    )
    assert moved == expected


def test_predictions_by_statistics_of_the_batch():
    image, _ = scene()
    network = Threshold().eval()
    by_batch = OnBatchStatistics(network).eval()
    with torch.no_grad():
        normed = (image - image.mean()) / (image.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(by_batch(image), network.head(normed))
        assert not torch.allclose(by_batch(image), network(image))
    assert list(by_batch.state_dict()) == list(network.state_dict())
    with batch_statistics(network):
        pass
    assert not network.norm.training
    assert network.norm.track_running_stats


def test_adabn_takes_the_mean_of_the_statistics_of_all_batches():
    strategy, network = build("strategy", "adabn"), Threshold()
    before = [p.clone() for p in network.parameters()]
    strategy.build(network, TASK)
    images = [scene()[0] * gain + gain for gain in (1.0, 2.0, 3.0)]
    for step, image in enumerate(images):
        strategy.set_modes(network)
        output = strategy.step(network, share_of(image), Progress(step, 3))
        assert not output.losses
    torch.testing.assert_close(network.norm.running_mean, torch.stack([i.mean() for i in images]).mean()[None])
    torch.testing.assert_close(network.norm.running_var, torch.stack([i.var() for i in images]).mean()[None])
    assert all(torch.equal(one, two) for one, two in zip(before, network.parameters(), strict=True))
    with pytest.raises(RecipeError, match="no batch norm"):
        strategy.build(nn.Conv2d(1, 2, 1), TASK)


# -- volumes ------------------------------------------------------------------------------------------------------------


def test_running_shares_of_a_volume_are_its_own_once_every_patch_was_seen():
    task = Task(("background", "organ"), 3)
    strategy = build("strategy", "sfda", ratio="mean_softmax", memory=1e-6)
    network = nn.Conv3d(1, 2, 1)
    strategy.build(network, task)
    volume = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = class_ratio(network(volume), "mean_softmax").detach()
    patches = [volume[:, :, :, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
    prior = torch.tensor([[0.9, 0.1]])
    for patch in patches:
        share = share_of(patch, [0.9, 0.1])["unlabelled"]
        geometry = share.geometry._replace(case=torch.tensor([3]))
        output = strategy.step(network, {"unlabelled": share._replace(geometry=geometry)}, Progress(0, 9))
    torch.testing.assert_close(strategy.shares[3:], whole)
    kl = float((whole * (whole.log() - prior.log())).sum())
    assert float(output.losses["ratio"].detach()) == pytest.approx(kl, abs=1e-5)
    again = build("strategy", "sfda")
    again.build(network, task)
    again.load_state_dict(strategy.state_dict())
    assert torch.equal(again.shares, strategy.shares)
    assert torch.equal(again.visits, torch.tensor([0.0, 0, 0, 4]))


def test_the_gradient_of_all_patches_is_that_of_the_whole_volume():
    """Where the running share has settled, patch gradients have the volume's gradient for their mean."""
    network = nn.Conv3d(1, 2, 1)
    volume = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prior = torch.tensor([[0.9, 0.1]])
    ratio = class_ratio(network(volume), "mean_softmax")
    (whole,) = torch.autograd.grad((ratio * (ratio.log() - prior.log())).sum(), network.weight)
    strategy = build("strategy", "sfda", ratio="mean_softmax", memory=1e-9, entropy=0.0)
    strategy.build(network, Task(("background", "organ"), 3))
    strategy.shares, strategy.visits = ratio.detach().clone(), torch.tensor([1e9])
    gradients = []
    for patch in [volume[:, :, :, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]:
        loss = strategy.step(network, share_of(patch, [0.9, 0.1]), Progress(0, 9)).losses["ratio"]
        gradients.append(torch.autograd.grad(loss, network.weight)[0])
    torch.testing.assert_close(torch.stack(gradients).mean(0), whole, atol=1e-6, rtol=1e-4)


# -- what is said -------------------------------------------------------------------------------------------------------


def test_a_class_that_collapses_is_named_with_numbers():
    image, _ = scene()
    strategy = build("strategy", "sfda", kl=1e-9, norm_stats="freeze")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        adapt(strategy, Threshold(), share_of(image, [0.6, 0.4]), 80)
    texts = [str(w.message) for w in seen]
    assert any("'organ' is predicted in" in text and "expected in 40.00%" in text for text in texts)
    assert len([text for text in texts if "organ" in text]) == 1


def test_what_it_needs():
    image, _ = scene()
    strategy = build("strategy", "sfda")
    strategy.build(Threshold(), TASK)
    with pytest.raises(RecipeError, match=r"name a data\.prior, or set kl: 0"):
        strategy.step(Threshold(), share_of(image), Progress(0, 1))
    with pytest.raises(RecipeError, match="3 numbers for 2 classes"):
        build("strategy", "sfda", class_weights=(1.0, 2.0, 3.0)).build(Threshold(), TASK)
    with pytest.raises(RecipeError, match="no norm layer"):
        build("strategy", "sfda", trainable="norm_affine").build(nn.Conv2d(1, 2, 1), TASK)


def test_class_weights_from_the_prior():
    strategy = build("strategy", "sfda", class_weights="inverse_prior")
    torch.testing.assert_close(strategy._weights(torch.tensor([[0.9, 0.1]])), torch.tensor([0.1, 0.9]))

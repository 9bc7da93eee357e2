"""RIPU's sum of terms, with and without a source, and a target that is learnt from a few regions."""

import pytest
import torch
from torch import nn

from labeleff.batch import IGNORE, Progress
from labeleff.errors import RecipeError
from labeleff.functional.ripu import local_consistency, negative_learning
from labeleff.functional.sfda import weighted_entropy
from labeleff.registry import build
from labeleff.testing import Subject, ToyNet


def setting(**options):
    strategy = build("strategy", "ripu", **options)
    subject = Subject(type(strategy))
    torch.manual_seed(0)
    network = ToyNet(subject.task).eval()
    strategy.build(network, subject.task)
    batch = subject.batches(strategy, 0)
    return strategy, network, batch


def given(batch):
    """Return the target with the classes of a box known."""
    share = batch["unlabelled"]
    label = share.label.clone()
    label[:, 4:9, 4:9] = (share.image[:, 0, 4:9, 4:9] > 0).long()
    return batch | {"unlabelled": share._replace(label=label)}


def known_cross_entropy(logits, label):
    terms = -logits.log_softmax(1).gather(1, label.clamp_max(2)[:, None])[:, 0]
    return terms[label != IGNORE].mean()


def test_the_terms_are_those_of_the_paper():
    strategy, network, batch = setting(loss="ce")
    batch = given(batch)
    losses = strategy.step(network, batch, Progress(0, 1)).losses
    source, target = batch["labelled"], batch["unlabelled"]
    one, two = network(source.image), network(target.image)
    expected = {
        "source": known_cross_entropy(one, source.label),
        "target": known_cross_entropy(two, target.label),
        "consistency": 0.1 * local_consistency(one, source.label),
        "negative": negative_learning(two, 0.05, valid=target.valid),
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_without_a_source_there_is_the_target_alone():
    strategy, network, batch = setting()
    del batch["labelled"]
    output = strategy.step(network, given(batch), Progress(0, 1))
    assert set(output.losses) == {"target", "negative"}
    assert set(output.logits) == {"unlabelled"}
    assert strategy.streams()["labelled"].optional


def test_adaptation_goes_on_where_nothing_is_labelled():
    strategy, network, batch = setting(entropy=0.5, kl=1.0)
    batch = given(batch)
    losses = strategy.step(network, batch, Progress(0, 1)).losses
    share = batch["unlabelled"]
    unknown = share.valid & (share.label == IGNORE)[:, None]
    torch.testing.assert_close(losses["entropy"], 0.5 * weighted_entropy(network(share.image), valid=unknown))
    assert float(losses["ratio"].detach()) > 0
    assert strategy.streams()["unlabelled"].kind == "slice"
    bare = batch | {"unlabelled": share._replace(extras={})}
    with pytest.raises(RecipeError, match=r"name a data\.prior"):
        strategy.step(network, bare, Progress(0, 1))


def test_frozen_statistics_are_used_and_left():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1)

        def forward(self, image):
            return self.head(self.norm(image))

    network = Normed()
    strategy, _, batch = setting(norm_stats="freeze")
    strategy.set_modes(network)
    before = network.norm.running_mean.clone()
    strategy.step(network, batch, Progress(0, 1))
    assert torch.equal(network.norm.running_mean, before)
    assert network.head.training


def test_a_few_regions_teach_what_the_source_does_not():
    """The target's third class looks as the source's first; a box of it is enough."""
    strategy, network, batch = setting(consistency=0.0)
    network.train()
    share = batch["unlabelled"]
    truth = (share.image[:, 0] > 0.5).long() * 2
    label = torch.full_like(truth, IGNORE)
    label[:, :, :6] = truth[:, :, :6]
    batch = {"labelled": batch["labelled"], "unlabelled": share._replace(label=label)}
    del batch["labelled"]
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    for step in range(80):
        loss = sum(strategy.step(network, batch, Progress(step, 80)).losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen = network(share.image).argmax(1)[:, :, 6:] == truth[:, :, 6:]
    assert float(unseen.float().mean()) > 0.9

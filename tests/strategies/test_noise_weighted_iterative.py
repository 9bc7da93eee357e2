"""Rounds, weights and memory of noise-weighted learning."""

import pytest
import torch
import torch.nn.functional as F

from labeleff.batch import IGNORE, Progress, Task
from labeleff.functional.robust import noise_weighted_dice
from labeleff.strategies.noise_weighted_iterative import FEWEST, REMEMBERED, NoiseWeightedIterative
from labeleff.testing import ShortRun, Subject

TASK = Task(("background", "one", "two"), 2)


def started(**options):
    run = ShortRun(Subject(NoiseWeightedIterative, options, TASK))
    return run, run.subject.batches(run.strategy, 0)


def test_an_unsure_network_leaves_every_label_its_weight():
    run, batch = started(loss="dice")
    run.backbone.eval()
    with torch.no_grad():
        for parameter in run.strategy.frozen.parameters():
            parameter.zero_()
    found = run.strategy.step(run.backbone, batch, Progress(0, 8))
    share = batch["labelled"]
    expected = noise_weighted_dice(run.backbone(share.image), share.label)
    assert float(found.losses["supervised"].detach()) == pytest.approx(float(expected.detach()))
    assert float(found.notes["mean_weight"]) == pytest.approx(1.0)


def test_the_network_is_frozen_at_the_edge_of_a_round_and_only_there():
    run, batch = started(rounds=3)
    first = next(iter(run.backbone.parameters()))
    frozen = next(iter(run.strategy.frozen.parameters()))
    for step in range(10):  # edges at 4 and 7 of 10
        with torch.no_grad():
            first.fill_(float(step + 1))
        run.strategy.step(run.backbone, batch, Progress(step, 10))
        if step >= 4:
            assert float(frozen.flatten()[0]) == (8.0 if step >= 7 else 5.0)
    assert not frozen.requires_grad


def test_weights_by_hand():
    run, batch = started(kappa=2.0)
    strategy, share = run.strategy, batch["labelled"]
    strategy.bounds.copy_(torch.tensor([0.2, 0.6]))
    run.backbone.eval()
    strategy.frozen.eval()
    weight = strategy._weights(share)
    probs = strategy.frozen(share.image).softmax(1)
    for b in range(len(share.label)):
        label, guess = share.label[b], probs[b].argmax(0)
        known, scores = label != IGNORE, []
        for c in (1, 2):
            if (label == c).any():
                both = ((guess == c) & (label == c)).sum()
                scores.append(2 * both / (((guess == c) & known).sum() + (label == c).sum()))
        image = min(1.0, max(0.0, (float(sum(scores)) / len(scores) - 0.2) / 0.4)) if scores else 1.0
        entropy = -(probs[b] * probs[b].log()).sum(0) / torch.log(torch.tensor(3.0))
        voxel = torch.where(guess == label, 1.0, torch.exp(-2.0 * (1 - entropy)))
        torch.testing.assert_close(weight[b], image * voxel * known)


def test_bounds_are_percentiles_of_the_newest_images():
    run, _ = started(low=10.0, high=60.0)
    strategy = run.strategy
    strategy._remember(torch.linspace(0, 1, FEWEST // 2))
    strategy._next_round(run.backbone)
    assert strategy.bounds.tolist() == [-1.0, 0.0]  # too few to tell
    strategy._remember(torch.linspace(0.5, 1.0, REMEMBERED))
    strategy._next_round(run.backbone)
    assert strategy.bounds.tolist() == pytest.approx([0.55, 0.8], abs=1e-3)
    assert "scores" in strategy.state_dict()  # what a resumed run needs


def test_it_learns_less_from_images_that_are_wrong():
    """Half of the images have labels at random; weights of the second round tell them apart."""
    torch.manual_seed(0)
    image = torch.randn(8, 1, 16, 16)
    clean = (F.avg_pool2d(image, 5, 1, 2) > 0).long()[:, 0]
    label = clean.clone()
    label[4:] = torch.randint(0, 2, label[4:].shape)
    _, batch = started()
    strategy = NoiseWeightedIterative(rounds=2, low=10, high=60)
    network = torch.nn.Conv2d(1, 2, 5, padding=2)
    strategy.build(network, Task(("background", "one"), 2))
    share = batch["labelled"]._replace(image=image, label=label, given=label)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(60):
        loss = strategy.step(network, {"labelled": share}, Progress(step, 60)).losses["supervised"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    weight = strategy._weights(share)
    assert float(weight[:4].mean()) > 2 * float(weight[4:].mean())


def test_impossible_options_are_refused():
    for options in ({"rounds": 0}, {"low": 70.0}, {"kappa": -1.0}):
        with pytest.raises(ValueError, match="rounds is at least 1"):
            NoiseWeightedIterative(**options)

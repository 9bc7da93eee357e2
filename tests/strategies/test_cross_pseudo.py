"""Two networks teach each other where there are no labels."""

import pytest
import torch

from labeleff.batch import Progress, Task
from labeleff.functional.losses import segmentation_loss
from labeleff.strategies.cross_pseudo import CrossPseudo
from labeleff.testing import ShortRun, Subject

TASK = Task(("background", "one", "two"), 2)


def started(**options):
    run = ShortRun(Subject(CrossPseudo, options, TASK))
    run.backbone.eval()  # no dropout, so that both sides of a comparison see the same networks
    run.strategy.peer.eval()
    return run, run.subject.batches(run.strategy, 0)


def losses_of(run, batch, step=50):
    return run.strategy.step(run.backbone, batch, Progress(step, 100)).losses


def mean_cross_entropy(logits, label, valid):
    picked = logits.log_softmax(1).gather(1, label.unsqueeze(1))
    return float(-picked[valid].mean())


@pytest.mark.parametrize("on", ["unlabelled", "both"])
def test_losses_of_a_step(on):
    run, batch = started(weight=3.0, rampup=0.0, on=on)
    found = losses_of(run, batch)
    shares = list(batch.values()) if on == "both" else [batch["unlabelled"]]
    image, valid = torch.cat([s.image for s in shares]), torch.cat([s.valid for s in shares])
    with torch.no_grad():
        one, two = run.backbone(image), run.strategy.peer(image)
        given = batch["labelled"]
        for name, network in (("supervised", run.backbone), ("supervised_peer", run.strategy.peer)):
            expected = segmentation_loss(network(given.image), given.label)
            assert float(found[name].detach()) == pytest.approx(float(expected), rel=1e-5)
    for name, mine, other in (("crossed", one, two), ("crossed_peer", two, one)):
        expected = 3 * mean_cross_entropy(mine, other.argmax(1), valid)
        assert float(found[name].detach()) == pytest.approx(expected, rel=1e-5)


def test_a_network_is_moved_by_its_own_losses_alone():
    run, batch = started()
    for ours, network, other in (("", run.backbone, run.strategy.peer), ("_peer", run.strategy.peer, run.backbone)):
        found = losses_of(run, batch)
        torch.autograd.backward([found["supervised" + ours], found["crossed" + ours]])
        assert all(p.grad is None for p in other.parameters())
        assert any(float(p.grad.abs().sum()) > 0 for p in network.parameters())
        network.zero_grad()


def test_both_are_optimised_and_start_apart():
    run, _ = started()
    optimised = {id(p) for group in run.optimiser.param_groups for p in group["params"]}
    pairs = list(zip(run.backbone.parameters(), run.strategy.peer.parameters(), strict=True))
    assert {id(p) for pair in pairs for p in pair} == optimised
    assert not torch.equal(run.backbone.first.weight, run.strategy.peer.first.weight)


def test_the_weight_rises():
    run, batch = started(weight=2.0, rampup=0.4)
    early, late = (losses_of(run, batch, step)["crossed"].detach() for step in (0, 40))
    assert float(early / late) == pytest.approx(0.006738, rel=1e-3)


def test_without_unlabelled_images_two_networks_learn_from_labels():
    run, batch = started()
    assert set(losses_of(run, {"labelled": batch["labelled"]})) == {"supervised", "supervised_peer"}
    run, batch = started(on="both")
    assert len(losses_of(run, {"labelled": batch["labelled"]})) == 4


def test_predictors_are_both_and_their_mean():
    run, batch = started()
    found = run.strategy.predictors(run.backbone)
    assert list(found) == ["student", "peer", "ensemble"]
    assert found["student"] is run.backbone
    image = batch["unlabelled"].image
    with torch.no_grad():
        one, two, both = (network(image).softmax(1) for network in found.values())
    assert torch.allclose(both, (one + two) / 2, atol=1e-6)


def test_networks_come_to_agree_where_nobody_has_labelled():
    """What the method promises; with no weight on the crossed terms the two disagree more."""
    agreement = {}
    for weight in (0.0, 2.0):
        run = ShortRun(Subject(CrossPseudo, {"weight": weight, "rampup": 0.0}, TASK)).run(0, 30)
        run.backbone.eval()
        run.strategy.peer.eval()
        image = torch.randn(8, 1, 16, 24, generator=torch.Generator().manual_seed(5))  # like no labelled image
        with torch.no_grad():
            agreement[weight] = float(
                (run.backbone(image).argmax(1) == run.strategy.peer(image).argmax(1)).float().mean()
            )
    assert agreement[2.0] > agreement[0.0]


def test_impossible_options_are_refused():
    for options in ({"weight": -1.0}, {"rampup": 1.1}):
        with pytest.raises(ValueError, match="weight must be"):
            CrossPseudo(**options)

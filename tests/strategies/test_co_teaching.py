"""Each network learns from what the other finds easy."""

import math

import pytest
import torch
import torch.nn.functional as F

from labeleff.batch import IGNORE, Progress, Task
from labeleff.functional import robust
from labeleff.functional.robust import keep_smallest, keep_smallest_per_class, voxel_cross_entropy
from labeleff.strategies.co_teaching import CoTeaching
from labeleff.strategies.supervised import Supervised
from labeleff.testing import ShortRun, Subject

TASK = Task(("background", "one", "two"), 2)


def started(**options):
    run = ShortRun(Subject(CoTeaching, options, TASK))
    return run, run.subject.batches(run.strategy, 0)


def test_the_two_start_apart():
    run, _ = started()
    pairs = list(zip(run.backbone.parameters(), run.strategy.peer.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert all(b.requires_grad for _, b in pairs)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (10, 1.0), (45, 1 - 0.2 * math.exp(-5 * 0.25)), (80, 0.8), (99, 0.8)]
)
def test_the_share_that_is_kept_falls(step, expected):
    assert CoTeaching().share(Progress(step, 100)) == pytest.approx(expected)


def test_each_learns_from_the_others_easy_voxels():
    run, batch = started(ranked="batch", keep=0.5, start=0.0, rampup=0.1)
    share = batch["labelled"]
    run.backbone.eval()
    run.strategy.peer.eval()
    found = run.strategy.step(run.backbone, batch, Progress(50, 100))
    maps = [
        F.cross_entropy(network(share.image), share.label, ignore_index=IGNORE, reduction="none").detach().flatten()
        for network in (run.backbone, run.strategy.peer)
    ]
    known = (share.label != IGNORE).flatten()
    for name, own, other in (("student", *maps), ("peer", *reversed(maps))):
        order = torch.argsort(torch.where(known, other, torch.inf))[: round(0.5 * int(known.sum()))]
        assert float(found.losses[name].detach()) == pytest.approx(float(own[order].mean()), rel=1e-5)
    assert float(found.notes["kept"]) == pytest.approx(0.5)


def test_by_default_easy_is_judged_class_by_class():
    """The losses are those over what ``keep_smallest_per_class``, tested by itself, keeps of the other network's."""
    run, batch = started(keep=0.5, start=0.0, rampup=0.1)
    share = batch["labelled"]
    run.backbone.eval()
    run.strategy.peer.eval()
    found = run.strategy.step(run.backbone, batch, Progress(50, 100))
    ours, theirs = (
        voxel_cross_entropy(n(share.image), share.label).detach() for n in (run.backbone, run.strategy.peer)
    )
    for name, own, other in (("student", ours, theirs), ("peer", theirs, ours)):
        kept = keep_smallest_per_class(other, share.label, 0.5, TASK.num_classes)
        assert not kept.equal(keep_smallest(other, share.label != IGNORE, 0.5))
        assert float(found.losses[name].detach()) == pytest.approx(float(own[kept].mean()), rel=1e-5)


def test_a_network_is_moved_by_its_own_loss_alone():
    run, batch = started()
    losses = run.strategy.step(run.backbone, batch, Progress(90, 100)).losses
    losses["student"].backward()
    assert all(p.grad is None for p in run.strategy.peer.parameters())
    assert any(p.grad is not None for p in run.backbone.parameters())


def test_impossible_options_are_refused():
    for options in ({"keep": 0.0}, {"start": 0.9}, {"rampup": 1.1}):
        with pytest.raises(ValueError, match="keep must be"):
            CoTeaching(**options)


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("generalised_cross_entropy", {}, {"q": 0.7}),
        ("generalised_cross_entropy", {"q": 0.5}, {"q": 0.5}),
        ("symmetric_cross_entropy", {}, {"alpha": 0.1, "beta": 1.0}),
        ("symmetric_cross_entropy", {"alpha": 6.0, "beta": 0.5}, {"alpha": 6.0, "beta": 0.5}),
        ("noise_robust_dice", {}, {"gamma": 1.5, "denominator": "squared"}),
        ("noise_robust_dice", {"gamma": 1.0, "denominator": "linear"}, {"gamma": 1.0, "denominator": "linear"}),
    ],
)
def test_supervised_takes_robust_losses(name, options, arguments):
    run = ShortRun(Subject(Supervised, {"loss": name, **options}, TASK))
    batch = run.subject.batches(run.strategy, 0)
    run.backbone.eval()
    found = run.strategy.step(run.backbone, batch, Progress(0, 10)).losses["supervised"]
    share = batch["labelled"]
    expected = getattr(robust, name)(run.backbone(share.image), share.label, **arguments)
    assert float(found.detach()) == pytest.approx(float(expected.detach()))


def test_impossible_parameters_of_losses_are_refused():
    for options, said in (({"q": 0.0}, "q"), ({"q": 1.1}, "q"), ({"alpha": -1.0}, "alpha"), ({"gamma": 2.5}, "gamma")):
        with pytest.raises(ValueError, match=f"{said} = {next(iter(options.values()))}"):
            Supervised(**options)

"""The mean teacher's weight, decay and consistency against their definitions."""

import math

import pytest
import torch

from labeleff.batch import Progress, Task
from labeleff.strategies.mean_teacher import MeanTeacher
from labeleff.testing import ShortRun, Subject, ToyNet

TASK = Task(("background", "one", "two"), 2)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (20, 0.5), (40, 1.0), (90, 1.0)])
def test_weight_rises_over_the_rampup(step, share):
    run = ShortRun(Subject(MeanTeacher, {"weight": 2.0, "rampup": 0.4}, TASK))
    batch = run.subject.batches(run.strategy, 0)
    run.strategy.set_modes(run.backbone)
    notes = run.strategy.step(run.backbone, batch, Progress(step, 100)).notes
    assert float(notes["consistency_weight"]) == pytest.approx(2 * math.exp(-5 * (1 - share) ** 2), rel=1e-5)


def test_consistency_is_the_mean_squared_difference_over_valid_voxels():
    run = ShortRun(Subject(MeanTeacher, {"noise": 0.0, "rampup": 0.0}, TASK))
    with torch.no_grad():
        for parameter in run.strategy.teacher.parameters():
            parameter.add_(0.3)
    run.backbone.eval()
    run.strategy.teacher.eval()
    batch = run.subject.batches(run.strategy, 0)
    found = run.strategy.step(run.backbone, batch, Progress(1, 10)).losses["consistency"]
    share = batch["unlabelled"]
    difference = (run.backbone(share.image).softmax(1) - run.strategy.teacher(share.image).softmax(1)) ** 2
    valid = share.valid.expand_as(difference)
    assert float(found.detach()) == pytest.approx(float(difference[valid].mean().detach()), rel=1e-5)


def test_early_decay_of_the_authors():
    backbone, strategy = Subject(MeanTeacher, {"ramp_decay": True, "decay": 0.99}, TASK).make()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in strategy.teacher.parameters()]
    strategy.after_step(backbone, Progress(1, 10))  # min(1 - 1/2, 0.99) = 0.5
    for old, new, model in zip(before, strategy.teacher.parameters(), backbone.parameters(), strict=True):
        assert torch.allclose(new, 0.5 * old + 0.5 * model)


def test_teacher_mode():
    for mode in ("eval", "train"):
        backbone, strategy = Subject(MeanTeacher, {"teacher_mode": mode}, TASK).make()
        strategy.set_modes(backbone)
        assert strategy.teacher.training == (mode == "train")
        assert backbone.training


def test_it_starts_as_the_student():
    backbone = ToyNet(TASK)
    strategy = MeanTeacher()
    strategy.build(backbone, TASK)
    for mine, theirs in zip(strategy.teacher.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad

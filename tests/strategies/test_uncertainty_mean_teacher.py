"""The teacher is heard where it is sure."""

import math

import pytest
import torch
from torch import nn

from labeleff.backbones.mc_dropout import has_dropout
from labeleff.batch import Progress, Task
from labeleff.strategies.mean_teacher import MeanTeacher
from labeleff.strategies.uncertainty_mean_teacher import UncertaintyMeanTeacher
from labeleff.testing import ShortRun, Subject, ToyNet

TASK = Task(("background", "one", "two"), 2)
QUIET = {"noise": 0.0, "rampup": 0.0}


def started(task=TASK, backbone=ToyNet, sharpen=8.0, **options):
    run = ShortRun(Subject(UncertaintyMeanTeacher, {**QUIET, **options}, task, backbone))
    with torch.no_grad():
        for parameter in run.strategy.teacher.last.parameters():
            parameter.mul_(sharpen)  # a teacher that is sure of some voxels and not of others
    run.strategy.set_modes(run.backbone)
    run.backbone.eval()
    return run, run.subject.batches(run.strategy, 0)


def consistency(run, batch, step=20, seed=0):
    torch.manual_seed(seed)
    return run.strategy.step(run.backbone, batch, Progress(step, 100))


def by_hand(run, batch, samples, threshold, terms):
    """Plain passes of the teacher with only its dropout in train mode, and the formula over the voxels that are heard."""
    share, teacher = batch["unlabelled"], run.strategy.teacher
    with torch.no_grad():
        target = teacher(share.image).softmax(1)
        teacher.dropout.train()
        torch.manual_seed(0)
        torch.randn_like(share.image)  # the noise, whose standard deviation is 0
        mean = sum(teacher(share.image).softmax(1) for _ in range(samples)) / samples
        teacher.dropout.eval()
        entropy = -(mean * (mean + 1e-12).log()).sum(1, keepdim=True)
        heard = (entropy < threshold) & share.valid
        squared = ((run.backbone(share.image).softmax(1) - target) ** 2) * heard
    return float(squared.sum() / (terms * heard.sum())), float(heard.sum() / share.valid.sum())


@pytest.mark.parametrize("scale", ["classes", "binary"])
@pytest.mark.parametrize("step", [20, 90])
def test_consistency_of_a_step(scale, step):
    run, batch = started(scale=scale, samples=5)
    classes = 3 if scale == "classes" else 2
    threshold = (0.75 + 0.25 * math.exp(-5 * (1 - step / 100) ** 2)) * math.log(classes)
    found = consistency(run, batch, step)
    loss, share = by_hand(run, batch, 5, threshold, classes)
    assert 0 < share < 1
    assert float(found.losses["consistency"].detach()) == pytest.approx(loss, rel=1e-5)
    assert float(found.notes["sure"]) == pytest.approx(share)


AUTHORS = {
    "weight": 0.1,
    "rampup": 1.0,
    "noise": 0.1,
    "ramp_decay": True,
    "teacher_mode": "train",
    "buffers": "keep",
    "sample_noise": "each",
    "scale": "binary",
}


def test_as_the_authors_run_it():
    """Spelt out: a noisy pass in train mode for the target, four of a doubled batch, log 2 and 2 whatever the classes."""
    run, batch = started(**AUTHORS)
    image, valid, student = batch["unlabelled"].image, batch["unlabelled"].valid, run.backbone
    torch.manual_seed(0)
    with torch.no_grad():

        def noisy():
            return image + torch.clamp(0.1 * torch.randn_like(image), -0.2, 0.2)

        target = run.strategy.teacher(noisy()).softmax(1)
        total = 0
        for _ in range(4):
            both = run.strategy.teacher(torch.cat([noisy(), noisy()])).softmax(1)
            total = total + both[:4] + both[4:]
        mean = total / 8
        entropy = -(mean * torch.log(mean + 1e-6)).sum(1, keepdim=True)
        mask = ((entropy < (0.75 + 0.25 * math.exp(-5 * 0.8**2)) * math.log(2)) & valid).float()
        squared = (student(image).softmax(1) - target) ** 2
        expected = 0.1 * math.exp(-5 * 0.8**2) * float((mask * squared).sum() / (2 * mask.sum() + 1e-16))
    found = consistency(run, batch, step=20)
    assert 0 < float(mask.sum()) < mask.numel()
    assert float(found.losses["consistency"].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_student_is_pulled_where_the_teacher_is_sure_and_nowhere_else():
    run, batch = started()
    seen = []

    def keep(_, __, logits):
        logits.retain_grad()
        seen.append(logits)

    run.backbone.register_forward_hook(keep)
    found = consistency(run, batch)
    found.losses["consistency"].backward()
    count = len(batch["labelled"].image)
    pulled = seen[0].grad.abs().sum(1) > 0
    assert not pulled[:count].any()  # of the labelled images nobody is asked
    assert float(pulled[count:].sum() / batch["unlabelled"].valid.sum()) == pytest.approx(float(found.notes["sure"]))


def test_in_the_end_it_is_a_mean_teacher():
    """Where all but guesses are heard, the consistency is that of the plain mean teacher."""
    run, batch = started(sharpen=1.5)
    found = consistency(run, batch, step=100)
    plain = ShortRun(Subject(MeanTeacher, QUIET, TASK))
    plain.strategy.teacher.load_state_dict(run.strategy.teacher.state_dict())
    plain.strategy.teacher.eval()
    run.backbone.eval()
    other = plain.strategy.step(run.backbone, batch, Progress(100, 100))
    assert float(found.notes["sure"]) == 1
    for name in ("supervised", "consistency"):
        assert float(found.losses[name].detach()) == pytest.approx(float(other.losses[name].detach()), rel=1e-5)


def test_a_teacher_that_is_sure_of_nothing_teaches_nothing():
    run, batch = started(threshold=0.0)
    found = consistency(run, batch, step=0)
    assert float(found.notes["sure"]) < 0.5
    with torch.no_grad():
        for parameter in run.strategy.teacher.last.parameters():
            parameter.zero_()  # guesses
    found = consistency(run, batch, step=100)
    assert float(found.losses["consistency"].detach()) == float(found.notes["sure"]) == 0
    found.losses["consistency"].backward()
    assert all(p.grad is None or not p.grad.any() for p in run.backbone.parameters())


def test_the_teacher_has_no_gradient_and_the_student_has():
    run, batch = started()
    consistency(run, batch).losses["consistency"].backward()
    assert all(p.grad is None for p in run.strategy.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in run.backbone.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("sample_noise", ["once", "each"])
@pytest.mark.parametrize("samples", [1, 5, 8])
def test_every_way_of_sampling(mode, sample_noise, samples):
    run, batch = started(teacher_mode=mode, sample_noise=sample_noise, samples=samples, noise=0.1)
    modes = [module.training for module in run.strategy.teacher.modules()]
    image = batch["unlabelled"].image
    target, found = run.strategy._look(image)
    assert found.shape == (samples, *target.shape)
    assert torch.allclose(found.sum(2), torch.ones(()), atol=1e-5)
    if samples > 1:
        assert not torch.equal(found[0], found[1])
    assert modes == [module.training for module in run.strategy.teacher.modules()]


def test_noise_for_each_pass_shows_in_the_samples():
    """Without dropout at work, passes differ by their noise alone."""
    spread = {}
    for sample_noise in ("once", "each"):
        run, batch = started(sample_noise=sample_noise, noise=0.1)
        run.strategy.teacher.dropout.p = 1e-9
        _, samples = run.strategy._look(batch["unlabelled"].image)
        spread[sample_noise] = float(samples.var(0).mean())
    assert spread["once"] == 0 < spread["each"]


def test_batch_statistics_of_doubled_batches():
    """As the authors run it: T = 8 passes are four of two copies, each updating the statistics of the teacher once."""
    run, batch = started(teacher_mode="train", sample_noise="each", samples=8)
    before = int(run.strategy.teacher.norm.num_batches_tracked)
    seen = []
    handle = run.strategy.teacher.first.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    run.strategy._look(batch["unlabelled"].image)
    handle.remove()
    assert seen == [4, 8, 8, 8, 8]
    assert int(run.strategy.teacher.norm.num_batches_tracked) == before + 5


class Plain(nn.Module):
    """A network without dropout."""

    def __init__(self, task):
        super().__init__()
        self.first, self.last = nn.Conv2d(task.channels, 6, 3, padding=1), nn.Conv2d(6, task.num_classes, 1)

    def forward(self, image):
        return self.last(torch.relu(self.first(image)))


def test_a_teacher_of_a_network_without_dropout_gets_one_and_the_network_stays_as_it_is():
    run, batch = started(backbone=Plain, dropout=0.3)
    assert not has_dropout(run.backbone)
    assert [m.p for m in run.strategy.teacher.modules() if isinstance(m, nn.Dropout2d)] == [0.3]
    assert run.strategy.teacher.state_dict().keys() == run.backbone.state_dict().keys()
    target, samples = run.strategy._look(batch["unlabelled"].image)
    assert float(samples.var(0).mean()) > 0
    with torch.no_grad():
        assert torch.equal(target, run.strategy.teacher(batch["unlabelled"].image).softmax(1))
    run.strategy.after_step(run.backbone, Progress(1, 10))


def test_impossible_options_are_refused():
    for options in ({"weight": -1.0}, {"decay": 1.5}, {"threshold": 1.2}, {"samples": 0}, {"dropout": 0.0}):
        with pytest.raises(ValueError, match="must"):
            UncertaintyMeanTeacher(**options)

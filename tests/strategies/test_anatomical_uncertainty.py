"""The teacher is heard where its label map looks like one."""

import math

import pytest
import torch

from labeleff.backbones.label_autoencoder import LabelAutoencoder
from labeleff.batch import Progress, Task
from labeleff.errors import RecipeError
from labeleff.functional.anatomical import reconstruction_confidence
from labeleff.functional.losses import one_hot
from labeleff.recipe_io import load_recipe
from labeleff.strategies.anatomical_uncertainty import AnatomicalUncertainty
from labeleff.strategies.label_autoencoder import LabelAutoencoding
from labeleff.strategies.mean_teacher import MeanTeacher
from labeleff.testing import ShortRun, Subject

TASK = Task(("background", "one", "two"), 2)
AUTHORS = {
    "weight": 0.1,
    "rampup": 1.0,
    "ramp_decay": True,
    "teacher_mode": "train",
    "buffers": "keep",
    "consistent": "all",
    "scale": "halved",
    "encoding": "index",
}


def started(factory=AnatomicalUncertainty, **options):
    run = ShortRun(Subject(factory, options, TASK))
    run.strategy.set_modes(run.backbone)
    run.backbone.eval()  # two passes of the student are one
    return run, run.subject.batches(run.strategy, 0)


def consistency(run, batch, step=20):
    torch.manual_seed(3)
    return run.strategy.step(run.backbone, batch, Progress(step, 100)).losses["consistency"].detach()


@pytest.mark.parametrize("authors", [False, True])
def test_consistency_of_a_step(authors):
    """Spelt out: a pass of the teacher, one of the autoencoder on its label map, and the sum over what is heard."""
    run, batch = started(**(AUTHORS if authors else {"gamma": 2.0}))
    names = ("labelled", "unlabelled") if authors else ("unlabelled",)
    image = torch.cat([batch[name].image for name in names])
    valid = torch.cat([batch[name].valid for name in names])
    torch.manual_seed(3)
    noise = (torch.randn_like(image) * 0.1).clamp(-0.2, 0.2)
    with torch.no_grad():
        p, q = run.backbone(image).softmax(1), run.strategy.teacher(image + noise).softmax(1)
        hard = q.argmax(1, keepdim=True)
        given = hard.float() if authors else torch.cat([(hard == k).float() for k in range(3)], 1)
        r = run.strategy.autoencoder(given).sigmoid()
    w = torch.exp(-(1.0 if authors else 2.0) * (r - q) ** 2) * valid
    ramp = 0.1 * math.exp(-5 * 0.8**2) if authors else math.exp(-5 * 0.5**2)
    wanted = ramp * float((w * (p - q) ** 2).sum() / ((2 if authors else 1) * w.sum()))
    assert float(consistency(run, batch)) == pytest.approx(wanted, rel=1e-5)


def test_without_confidence_it_is_the_mean_teacher():
    run, batch = started(gamma=0.0)
    plain, _ = started(MeanTeacher)
    assert float(consistency(run, batch)) == pytest.approx(float(consistency(plain, batch)), rel=1e-6)


@pytest.mark.parametrize("size", [(9, 14), (16, 24, 11)])
@pytest.mark.parametrize("encoding", ["one_hot", "index"])
def test_autoencoder_takes_any_size(size, encoding):
    network = LabelAutoencoder(
        Task(("a", "b", "c"), len(size)), channels=(4, 8), embedding=5, grid=2, encoding=encoding
    )
    label = torch.randint(3, (2, *size))
    label[0, 0] = 255
    given = network.read(label)
    assert given.shape == (2, 3 if encoding == "one_hot" else 1, *size)
    assert network(given).shape == (2, 3, *size)
    assert not given[0, :, 0].any()


def test_the_autoencoder_knows_what_is_no_shape():
    """Trained on discs: a disc with a slit is not believed in the slit, and is everywhere else."""
    options = {"channels": (8, 16), "embedding": 16, "grid": 8}
    run = ShortRun(Subject(LabelAutoencoding, options, Task(("background", "disc"), 2)))
    optimiser = torch.optim.AdamW(run.strategy.autoencoder.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    batch = run.subject.batches(run.strategy, 0)["labelled"]

    def discs(count):
        centre = 10 + 12 * torch.rand(count, 2, 1, 1, generator=generator)
        radius = 5 + 3 * torch.rand(count, 1, 1, generator=generator)
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        return ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < radius**2).long()

    run.strategy.set_modes(run.backbone)
    for step in range(150):
        output = run.strategy.step(run.backbone, {"labelled": batch._replace(label=discs(8))}, Progress(step, 150))
        optimiser.zero_grad()
        output.losses["denoising"].backward()
        optimiser.step()
    network, whole = run.strategy.autoencoder.eval(), discs(16)
    slit = whole.clone()
    slit[:, :, 16:20] = 0
    with torch.no_grad():
        reconstruction = network(network.read(slit)).sigmoid()
    confidence = reconstruction_confidence(reconstruction, one_hot(slit, 2))[:, 1]
    missing = whole != slit
    assert (1 - confidence[missing]).mean() > 8 * (1 - confidence[~missing]).mean()


def test_takes_over_the_autoencoder():
    first, second = ShortRun(Subject(LabelAutoencoding, {}, TASK)), ShortRun(Subject(AnatomicalUncertainty, {}, TASK))
    with torch.no_grad():
        first.strategy.autoencoder.head.bias.fill_(3.0)
    report = second.strategy.inherit(first.strategy.state_dict())
    assert report.taken == ("autoencoder",)
    own, theirs = second.strategy.autoencoder.state_dict(), first.strategy.autoencoder.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert not any(p.requires_grad for p in second.strategy.autoencoder.parameters())
    third = ShortRun(Subject(AnatomicalUncertainty, {}, TASK))
    third.strategy.inherit(second.strategy.state_dict())  # a further stage of the same
    assert float(third.strategy.autoencoder.head.bias[0]) == 3.0


@pytest.mark.parametrize("state", [{}, {"autoencoder.head.bias": torch.zeros(3)}])
def test_refuses_what_does_not_fit(state):
    with pytest.raises(RecipeError, match="no autoencoder that fits; put a stage of label_autoencoder"):
        ShortRun(Subject(AnatomicalUncertainty, {}, TASK)).strategy.inherit(state)
    smaller = ShortRun(Subject(LabelAutoencoding, {"embedding": 7}, TASK)).strategy
    with pytest.raises(RecipeError, match="give both the same channels, embedding"):
        ShortRun(Subject(AnatomicalUncertainty, {}, TASK)).strategy.inherit(smaller.state_dict())


def test_a_recipe_must_train_the_autoencoder_first():
    stages = "[{strategy: supervised, steps: 2}, {strategy: anatomical_uncertainty, steps: 2}]"
    with pytest.raises(
        RecipeError, match=r"stages\.1\.strategy: anatomical_uncertainty goes on from what label_autoencoder"
    ):
        load_recipe("phantom/supervised", [f"stages={stages}"])
    with pytest.raises(RecipeError, match="comes after nothing"):
        load_recipe("phantom/supervised", ["stages=[{strategy: anatomical_uncertainty, steps: 2}]"])


def test_the_backbone_is_left_alone_by_the_first_stage():
    run = ShortRun(Subject(LabelAutoencoding, {}, TASK))
    before = {name: tensor.clone() for name, tensor in run.backbone.state_dict().items()}
    run.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in run.backbone.state_dict().items())

"""ADELE's step: what its losses are made of, in 2-D and 3-D."""

import pytest
import torch
import torch.nn.functional as F

from labeleff.backbones.outputs import nearest_size
from labeleff.batch import IGNORE, Progress, Task
from labeleff.errors import RecipeError, ShapeError
from labeleff.functional.adele import multiscale_consistency, multiscale_cross_entropy
from labeleff.functional.losses import segmentation_loss
from labeleff.registry import build, get
from labeleff.strategies.adele import Adele
from labeleff.strategies.supervised import Supervised
from labeleff.testing import ShortRun, Subject, ToyNet

TASKS = {2: Task(("background", "one", "two"), 2), 3: Task(("background", "one"), 3)}
SIZES = {2: [(16, 24), (11, 16), (24, 36)], 3: [(16, 16, 24), (11, 11, 16), (24, 24, 36)]}
MODE = {2: "bilinear", 3: "trilinear"}


def stepped(ndim, **options):
    """Return the output of a step in eval mode, the batch, and the logits by hand."""
    run = ShortRun(Subject(Adele, options, TASKS[ndim]))
    run.backbone.eval()
    batch = run.subject.batches(run.strategy, 0)
    image, resize = batch["labelled"].image, {"mode": MODE[ndim], "align_corners": True}
    sizes = SIZES[ndim]
    logits = [F.interpolate(run.backbone(F.interpolate(image, s, **resize)), sizes[0], **resize) for s in sizes]
    return run.strategy.step(run.backbone, batch, Progress(0, 10)), batch["labelled"], logits


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("gate", [0.2, 1.1])
@pytest.mark.parametrize(("temperature", "dice"), [(0.0, "squared"), (1.0, "linear"), (2.0, "squared")])
def test_default_losses(ndim, gate, temperature, dice):
    output, batch, logits = stepped(ndim, gate=gate, weight=0.5, temperature=temperature, dice=dice)
    supervised = sum(segmentation_loss(z / (temperature or 1), batch.label, dice=dice) for z in logits) / 3
    consistency = 0.5 * multiscale_consistency(logits, batch.label, gate=gate, valid=batch.valid) / 3
    assert torch.allclose(output.losses["supervised"], supervised, rtol=1e-4)
    assert torch.allclose(output.losses["consistency"], consistency, rtol=1e-4)
    assert (float(consistency.detach()) == 0) == (gate > 1)
    assert torch.allclose(output.logits["labelled"], logits[0], atol=1e-5)
    assert not output.logits["labelled"].requires_grad


@pytest.mark.parametrize(("form", "share"), [("segthor", 1 / 3), ("voc", 1.0)])
@pytest.mark.parametrize("ndim", [2, 3])
def test_forms_of_the_authors(form, share, ndim):
    output, batch, logits = stepped(ndim, form=form, gate=0.2, weight=0.5)
    consistency = multiscale_consistency(logits, batch.label, gate=0.2, valid=batch.valid)
    assert torch.allclose(output.losses["supervised"], share * multiscale_cross_entropy(logits, batch.label), rtol=1e-4)
    assert torch.allclose(output.losses["consistency"], share * 0.5 * consistency, rtol=1e-4)
    warm, _, _ = stepped(ndim, form=form, temperature=3.0)
    assert torch.allclose(warm.losses["supervised"], output.losses["supervised"])


def test_cross_entropy_alone():
    output, batch, logits = stepped(2, dice="none")
    expected = sum(F.cross_entropy(z, batch.label, ignore_index=IGNORE) for z in logits) / 3
    assert torch.allclose(output.losses["supervised"], expected, rtol=1e-4)


def test_one_scale_is_supervised_learning():
    ours, theirs = (ShortRun(Subject(c, o, TASKS[2])).run() for c, o in ((Adele, {"scales": (1.0,)}), (Supervised, {})))
    assert ours.losses == theirs.losses
    assert list(ours.forward(5).losses) == ["supervised"]


def test_the_gradient_is_of_all_scales():
    backbone, strategy = Subject(Adele, {"weight": 0.0}, TASKS[2]).make()
    backbone.eval()
    batch = Subject(Adele, {}, TASKS[2]).batches(strategy, 0)
    seen = []

    def keep(module, inputs, output):
        output.retain_grad()
        seen.append(output)

    backbone.register_forward_hook(keep)
    sum(strategy.step(backbone, batch, Progress(0, 1)).losses.values()).backward()
    assert [tuple(z.shape[2:]) for z in seen] == SIZES[2]
    assert all(float(z.grad.abs().sum()) > 0 for z in seen)
    assert all(float(p.grad.abs().sum()) > 0 for p in backbone.parameters())


@pytest.mark.parametrize(("axis", "sizes"), [(2, [(5, 7, 6), (12, 15, 6)]), (0, [(8, 7, 4), (8, 15, 9)])])
def test_in_plane_leaves_the_slice_axis(axis, sizes):
    _, strategy = Subject(Adele, {"axes": "in_plane", "slice_axis": axis}, TASKS[3]).make()
    maps = strategy.logits_at_scales(ToyNet(TASKS[3]), torch.zeros(1, 1, 8, 10, 6))
    assert all(tuple(z.shape[2:]) == (8, 10, 6) for z in maps)
    assert strategy._sizes[(8, 10, 6)] == [(8, 10, 6), *sizes]


def test_sizes_are_what_the_network_takes():
    task = TASKS[2]
    toy = ToyNet(task)
    network = get("backbone", "unet")(task, channels=(4, 8, 8, 8), dropout=0.2)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    assert nearest_size(toy, task, (90 * 0.7, 33 * 0.7)) == (62, 23)  # 90 · 0.7 is a hair below 63
    assert nearest_size(network, task, (67.2, 67.2)) == (64, 64)
    assert nearest_size(network, task, (72, 80)) == (72, 80)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not calls  # a trial is not an image that the method sees

    class Fixed(ToyNet):
        def forward(self, image):
            if tuple(image.shape[2:]) != (16, 24):
                raise RuntimeError("one size only")
            return super().forward(image)

    with pytest.raises(ShapeError, match="it cannot see images of several sizes"):
        nearest_size(Fixed(task), task, (11.2, 16.8))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"scales": (0.5, 2.0)}, r"1\.0 must be among them"), ({"weight": -1.0}, "must be >= 0")],
)
def test_what_is_refused(options, reason):
    with pytest.raises(RecipeError, match=reason):
        build("strategy", "adele", **options)

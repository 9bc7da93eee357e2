"""Views that teach one another: the loss by hand, who moves whom, what passes on, and what a collapse looks like."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from labeleff.backbones.mc_dropout import has_dropout
from labeleff.backbones.views import standard_views
from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.errors import RecipeError, ShapeError
from labeleff.functional.umct import cotraining_loss
from labeleff.strategies.umct import Umct
from labeleff.testing import Subject, ToyNet, check_resume, checks, toy_geometry

TASK = Task(("background", "one", "two"), 2)
VOLUMES = Task(("background", "one"), 3)


class Small(nn.Module):
    """Convolutions without norm or dropout: predictions in train and eval mode are the same."""

    def __init__(self, task, width=4):
        super().__init__()
        convolution = nn.Conv2d if task.ndim == 2 else nn.Conv3d
        self.body = nn.Sequential(convolution(task.channels, width, 3, padding=1), nn.ReLU())
        self.head = convolution(width, task.num_classes, 1)

    def forward(self, image):
        return self.head(self.body(image))


def share(image, label=None):
    label = torch.full((len(image), *image.shape[2:]), IGNORE) if label is None else label
    valid = torch.ones(len(image), 1, *image.shape[2:], dtype=torch.bool)
    return Batch(image, label, label, valid, toy_geometry(len(image), image.shape[2:]))


def built(task=TASK, backbone=Small, **options):
    torch.manual_seed(0)
    network, strategy = backbone(task), Umct(**options)
    strategy.build(network, task)
    strategy.set_modes(network)
    return network, strategy


def batches(task=TASK, *, labelled=2, unlabelled=3, size=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(labelled, task.channels, *size, generator=generator)
    label = torch.randint(task.num_classes, (labelled, *size), generator=generator)
    label[0, :2] = IGNORE
    other = share(torch.randn(unlabelled, task.channels, *size, generator=generator))
    other.valid[0, ..., :3] = False
    return {"labelled": share(given, label), "unlabelled": other}


# -- the loss by hand -------------------------------------------------------------------------------------------------------


def softmax(scores):
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def dice_by_hand(probs, target, known):
    """1 - the mean over classes of 2 Σ p q / (Σ p² + Σ q²), pooled over the batch."""
    axes = (0, *range(2, probs.ndim))
    p, q = probs * known, target * known
    return 1 - np.mean((2 * (p * q).sum(axes) + 1e-10) / ((p * p + q * q).sum(axes) + 1e-10))


def canonical(view, network, image):
    """See through a view with plain numpy, and turn the scores back."""
    axes = [0, 1, *(a + 2 for a in view.axes)]
    flipped = tuple(a + 2 for a in view.flipped)
    seen = np.flip(image.numpy().transpose(axes), flipped)
    with torch.no_grad():
        scores = network(torch.from_numpy(seen.copy())).double().numpy()
    return np.flip(scores, flipped).transpose(np.argsort(axes))


@pytest.mark.parametrize("loss", ["dice", "dice_ce"])
@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize(("task", "size"), [(TASK, (8, 12)), (VOLUMES, (4, 6, 8))], ids=["2d", "3d"])
def test_losses_of_a_step_by_hand(loss, target, task, size):
    network, strategy = built(task, weighting="equal", loss=loss, target=target, weight=0.3, cross_entropy=0.7)
    batch = batches(task, size=size)
    found = strategy.step(network, batch, Progress(0, 10)).losses
    views, members = standard_views(task.ndim, 3), [network, *(view.network for view in strategy.views)]
    label, image = batch["labelled"].label.numpy(), batch["labelled"].image
    known, truth = (label != IGNORE)[:, None], np.moveaxis(np.eye(task.num_classes)[label % IGNORE], -1, 1)
    supervised = 0.0
    for view, member in zip(views, members, strict=True):
        probs = softmax(canonical(view, member, image))
        dice = dice_by_hand(probs, truth, known)
        entropy = -(np.log(probs) * truth * known).sum() / known.sum()
        supervised += dice if loss == "dice" else (dice + entropy) / 2
    unlabelled = batch["unlabelled"]
    valid = unlabelled.valid.numpy()
    probs = [softmax(canonical(v, m, unlabelled.image)) for v, m in zip(views, members, strict=True)]
    taught = 0.0
    for i, own in enumerate(probs):
        aim = np.mean([p for j, p in enumerate(probs) if j != i], axis=0)  # equal weights: the mean of the others
        if target == "hard":
            aim = np.moveaxis(np.eye(task.num_classes)[aim.argmax(1)], -1, 1)
        entropy = -(np.log(own) * aim * valid).sum() / valid.sum()
        taught += dice_by_hand(own, aim, valid) + 0.7 * entropy
    assert float(found["supervised"].detach()) == pytest.approx(supervised, rel=1e-5)
    assert float(found["cotraining"].detach()) == pytest.approx(0.3 * taught, rel=1e-5)


def test_surer_views_weigh_more(monkeypatch):
    network, strategy = built(loss="dice")
    image = torch.zeros(1, 1, 2, 2)
    plain = [torch.tensor([p, 1 - p, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2) for p in (0.9, 0.6, 0.2)]
    spread = [torch.full((1, 1, 2, 2), u) for u in (0.01, 0.02, 0.04)]
    told = iter(zip(plain, spread, strict=True))
    monkeypatch.setattr(strategy, "_predict", lambda *_: next(told))
    targets, notes = strategy._teach(strategy.members(network), share(image), Progress(0, 10))
    expected = [(0.6 * 50 + 0.2 * 25) / 75, (0.9 * 100 + 0.2 * 25) / 125, (0.9 * 100 + 0.6 * 50) / 150]
    np.testing.assert_allclose(targets[:, 0, 0, 0, 0].numpy(), expected, rtol=1e-5)
    assert float(notes["variance/view_2"]) == pytest.approx(0.04)
    assert float(notes["foreground/ensemble"]) == pytest.approx(1 - (0.9 + 0.6 + 0.2) / 3, rel=1e-5)


def test_two_views_teach_each_other_and_draw_nothing():
    network, strategy = built(views=2, backbone=ToyNet)
    assert not strategy.draws
    unlabelled = batches()["unlabelled"]
    members = [member.eval() for member in strategy.members(network)]
    targets, _ = strategy._teach(members, unlabelled, Progress(0, 10))
    for own, other in zip(targets, reversed(members), strict=True):
        torch.testing.assert_close(own, other(unlabelled.image).softmax(1).detach())


# -- who moves whom ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prediction": "mc_mean"}, {"weighting": "equal"}])
def test_targets_carry_no_gradient_and_modes_are_put_back(options):
    network, strategy = built(backbone=ToyNet, **options)
    targets, _ = strategy._teach(strategy.members(network), batches()["unlabelled"], Progress(0, 10))
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(2), torch.ones_like(targets[:, :, 0]))
    assert all(module.training for member in strategy.members(network) for module in member.modules())


def test_a_view_is_moved_by_its_own_prediction_alone():
    network, strategy = built(weighting="equal", weight=1.0)
    unlabelled = batches()["unlabelled"]
    members = strategy.members(network)
    strategy.step(network, {"unlabelled": unlabelled}, Progress(0, 10)).losses["cotraining"].backward()
    found = [[p.grad.clone() for p in member.parameters()] for member in members]
    targets, _ = strategy._teach(members, unlabelled, Progress(0, 10))
    for number, (member, gradients) in enumerate(zip(members, found, strict=True)):
        strategy.zero_grad()
        network.zero_grad()
        own = cotraining_loss([member(unlabelled.image)], targets[number : number + 1], valid=unlabelled.valid)
        own.sum().backward()
        for parameter, gradient in zip(member.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert all(p.grad is None for other in members if other is not member for p in other.parameters())


def test_the_backbone_and_the_other_views_are_two_groups():
    network, strategy = built()
    first, rest = strategy.parameter_groups(network)
    assert {id(p) for p in first["params"]} == {id(p) for p in network.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in strategy.views.parameters()}


def test_views_start_apart_or_as_copies():
    network, strategy = built()
    weights = [member.head.weight for member in (network, *(v.network for v in strategy.views))]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    network, strategy = built(initial="copy")
    assert all(torch.equal(network.head.weight, view.network.head.weight) for view in strategy.views)


# -- streams ----------------------------------------------------------------------------------------------------------------


def test_streams_may_be_left_out():
    network, strategy = built()
    batch = batches()
    losses = strategy.step(network, {"unlabelled": batch["unlabelled"]}, Progress(0, 10)).losses
    assert set(losses) == {"cotraining"}
    assert set(strategy.step(network, {"labelled": batch["labelled"]}, Progress(0, 10)).losses) == {"supervised"}
    assert strategy.step(network, {}, Progress(0, 10)).losses == {}
    network, strategy = built(weight=0.0)
    assert set(strategy.step(network, batch, Progress(0, 10)).losses) == {"supervised"}


def test_the_weight_may_rise():
    values = []
    for rampup, step in ((0.0, 0), (0.5, 0), (0.5, 5)):
        network, strategy = built(rampup=rampup, weighting="equal")
        values.append(float(strategy.step(network, batches(), Progress(step, 10)).losses["cotraining"].detach()))
    assert values[1] == pytest.approx(values[0] * np.exp(-5), rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


# -- guard ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "words"), [(8.0, "'one'"), (-8.0, "'background'")])
def test_a_provoked_collapse_is_told_with_numbers(bias, words):
    network, strategy = built(VOLUMES, weighting="equal", initial="copy")
    batch = {"unlabelled": batches(VOLUMES, size=(4, 4, 4))["unlabelled"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(60):
            strategy.step(network, batch, Progress(step, 300))
    with torch.no_grad():
        network.head.bias[0] += bias
        strategy.views[0].network.head.bias[0] += bias

    def go_on():
        for step in range(60, 180):
            strategy.step(network, batch, Progress(step, 300))

    with pytest.warns(UserWarning, match="as the stage started") as told:
        go_on()
    said = [str(one.message) for one in told]
    assert all(words in one and "it is collapsing" in one for one in said)
    assert {one.split()[2] for one in said} == {"view_0", "view_1"}
    assert len(said) == 2  # once each; the mean of three is not gone


def test_fresh_views_raise_no_alarm():
    network, strategy = built(VOLUMES, weighting="equal")
    batch = {"unlabelled": batches(VOLUMES, size=(4, 4, 4))["unlabelled"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(100):
            if step == 30:
                network.head.bias.data[0] += 9
            strategy.step(network, batch, Progress(step, 300))


# -- from stage to stage ----------------------------------------------------------------------------------------------------


def test_views_pass_on_and_what_is_missing_is_said():
    _, first = built(views=2)
    _, second = built(views=3)
    report = second.inherit(first.state_dict())
    assert (report.taken, report.left) == (("view_1",), ("view_2",))
    assert "view_1 taken over; nothing to inherit for view_2: they start as fresh weights" in report.note
    for one, two in zip(first.views[0].parameters(), second.views[0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert not second.settled
    assert "copies of the backbone" in built(initial="copy")[1].inherit({}).note
    report = built(views=3)[1].inherit(second.state_dict())
    assert not report.left


def test_views_of_an_exported_ensemble_are_taken_over():
    network, first = built(backbone=ToyNet)
    exported = first.predictors(network)["ensemble"].state_dict()
    _, second = built(backbone=ToyNet)
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    assert second.inherit(exported).left == ()
    for one, two in zip(first.views.parameters(), second.views.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(RecipeError, match="view 1 of the previous stage does not fit"):
        built(backbone=lambda task: Small(task, 5))[1].inherit(built()[1].state_dict())


def test_predictors_are_the_ensemble_and_every_view():
    network, strategy = built(backbone=ToyNet)
    found = strategy.predictors(network)
    assert list(found) == ["ensemble", "view_0", "view_1", "view_2"]
    assert found["view_0"] is network
    image = batches()["labelled"].image
    for member in found.values():
        member.eval()
    probs = [found[f"view_{i}"](image).softmax(1) for i in range(3)]
    torch.testing.assert_close(found["ensemble"](image).exp(), sum(probs) / 3)


# -- dropout, kernels, sizes ------------------------------------------------------------------------------------------------


def test_dropout_is_put_in_or_asked_for():
    network, strategy = built(dropout=0.3)
    assert "dropout of 0.3" in strategy.said
    assert all(has_dropout(member) for member in strategy.members(network))
    assert strategy.reshape(network, TASK) == ""  # once
    network, strategy = built(weighting="equal")
    assert not has_dropout(network)
    assert not strategy.said
    with pytest.raises(RecipeError, match="dropout_at is own"):
        built(dropout_at="own")
    assert built(dropout_at="own", backbone=ToyNet)[1].said == ""


def strided(task):
    from labeleff.backbones.monai import unet

    return unet(task, channels=(4, 8, 8), dropout=0.1)


def test_kernels_can_be_asymmetric():
    network, strategy = built(VOLUMES, strided, asymmetric="encoder", samples=2)
    assert "blind along axis 2" in strategy.said
    flat = []
    for member in strategy.members(network):
        kernels = [m.kernel_size for m in member.modules() if isinstance(m, nn.Conv3d)]
        flat.append(kernels.count((3, 3, 1)))
    assert flat[0] > 0
    assert len(set(flat)) == 1
    before = {name: value.shape for name, value in network.state_dict().items()}
    strategy.reshape(network, VOLUMES)
    assert before == {name: value.shape for name, value in network.state_dict().items()}
    with pytest.raises(RecipeError, match="3-D networks"):
        built(asymmetric="encoder")


def test_asymmetric_networks_resume():
    check_resume(Subject(Umct, {"asymmetric": "all", "samples": 2}, VOLUMES, strided, batch=2, size=(8, 8, 16)))


class Strict(ToyNet):
    """Takes heights that 8 divides only."""

    def forward(self, image):
        if image.shape[2] % 8:
            raise ValueError("height")
        return super().forward(image)


def test_a_patch_that_a_view_cannot_take_is_told_in_one_line():
    network, strategy = built(backbone=Strict)
    with pytest.raises(ShapeError, match=r"view 1 .*multiples of 8 work for all views") as told:
        strategy.step(network, batches(size=(8, 12)), Progress(0, 10))
    assert "\n" not in str(told.value)


def test_impossible_options_are_refused():
    for options in ({"views": 1}, {"samples": 0}, {"dropout": 1.0}, {"weight": -1.0}, {"rampup": 2.0}, {"samples": 1}):
        with pytest.raises(ValueError, match=r"views are|weight and|samples is"):
            Umct(**options)
    with pytest.raises(ShapeError, match="there are 2 … 6"):
        built(VOLUMES, views=7)


@pytest.mark.parametrize("options", [{"views": 2}, {"weighting": "equal", "target": "hard", "views": 4}])
@pytest.mark.parametrize("check", [c for c in checks() if "options" not in c.__name__], ids=lambda c: c.__name__)
def test_contract_of_other_forms(check, options):
    check(Subject(Umct, options, TASK, batch=2, size=(8, 8)))

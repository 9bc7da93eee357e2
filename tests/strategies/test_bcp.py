"""The pairing table of the specification, the teacher, and parity of the passes."""

import pytest
import torch
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Stream, Task
from labeleff.functional.bcp import box_mask, mixed_loss, paste
from labeleff.strategies.bcp import Bcp
from labeleff.strategies.bcp_pretrain import BcpPretrain
from labeleff.testing import toy_geometry

SHAPE = (6, 6)
PROGRESS = Progress(3, 10, seed=5)


class Spy(nn.Module):
    """Logits that depend on the image; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, image):
        self.seen.append(image.clone())
        return torch.cat([-self.gain * image, self.gain * image], 1)


def stream(values, label=None):
    """One constant image per value, so that what was pasted can be read off."""
    image = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, *SHAPE).clone()
    label = torch.full((len(values), *SHAPE), IGNORE) if label is None else label
    return Batch(
        image, label, label, torch.ones(len(values), 1, *SHAPE, dtype=torch.bool), toy_geometry(len(values), SHAPE)
    )


def given():
    label = torch.zeros(4, *SHAPE, dtype=torch.long)
    label[:, :3] = 1
    return stream([1.0, 2.0, 3.0, 4.0], label)


def guessed():
    return stream([-10.0, 20.0, -30.0, 40.0])


def built(**options):
    backbone, strategy = Spy(), Bcp(**options)
    strategy.build(backbone, Task(("background", "one"), 2))
    return backbone, strategy


def corner_and_centre(image):
    """The values outside and inside the box of constant images."""
    mask = box_mask(SHAPE, generator=PROGRESS.generator("box"))
    return [(float(i[0][mask == 1].unique()), float(i[0][mask == 0].unique())) for i in image]


@pytest.mark.parametrize(
    ("pairing", "first", "second"),
    [
        # outside, inside; L_a = 1, 2; L_b = 3, 4; U_a = -10, 20; U_b = -30, 40
        ("la", [(1, -10), (2, 20)], [(-30, 3), (40, 4)]),
        ("paper", [(1, -10), (2, 20)], [(-30, 3), (40, 4)]),
        ("acdc", [(3, -30), (4, 40)], [(-10, 1), (20, 2)]),
        ("pancreas", [(1, -30), (2, 40)], [(-10, 3), (20, 4)]),
        ("both", [(1, -10), (2, 20), (3, -30), (4, 40)], [(-10, 2), (20, 3), (-30, 4), (40, 1)]),
    ],
)
def test_who_meets_whom(pairing, first, second):
    backbone, strategy = built(pairing=pairing)
    strategy.step(backbone, {"labelled": given(), "unlabelled": guessed()}, PROGRESS)
    assert [corner_and_centre(image) for image in backbone.seen] == [first, second]


def test_the_teacher_sees_the_halves_apart_or_everything_at_once():
    for pairing, passes in (("la", [2, 2]), ("both", [4])):
        backbone, strategy = built(pairing=pairing)
        strategy.step(backbone, {"labelled": given(), "unlabelled": guessed()}, PROGRESS)
        assert [len(image) for image in strategy.teacher.seen] == passes


@pytest.mark.parametrize("student_forward", ["separate", "joint"])
def test_losses_are_those_of_the_table(student_forward):
    backbone, strategy = built(pairing="la", student_forward=student_forward, unlabelled_weight=0.3, dice="linear")
    one, two = given(), guessed()
    losses = strategy.step(backbone, {"labelled": one, "unlabelled": two}, PROGRESS).losses
    # the spy says class 1 exactly where the image is positive
    pseudo = (two.image[:, 0] > 0).long()
    mask = box_mask(SHAPE, generator=PROGRESS.generator("box"))
    inward = mixed_loss(
        Spy()(paste(one.image[:2], two.image[:2], mask)), one.label[:2], pseudo[:2], mask,
        weight_outer=1.0, weight_inner=0.3, dice="linear",
    )  # fmt: skip
    outward = mixed_loss(
        Spy()(paste(two.image[2:], one.image[2:], mask)), pseudo[2:], one.label[2:], mask,
        weight_outer=0.3, weight_inner=1.0, dice="linear",
    )  # fmt: skip
    assert float(losses["inward"].detach()) == pytest.approx(float(inward.detach()), rel=1e-6)
    assert float(losses["outward"].detach()) == pytest.approx(float(outward.detach()), rel=1e-6)


def test_ties_of_two_classes_go_to_the_foreground_only_by_threshold():
    image, valid = torch.zeros(1, 1, *SHAPE), torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    for rule, value in (("threshold", 1), ("argmax", 0)):
        strategy = built(pseudo_label=rule)[1]
        assert set(strategy.pseudo_labels(image, valid).unique().tolist()) == {value}


def test_pseudo_labels_are_cleaned_and_unknown_in_padding():
    image = -torch.ones(1, 1, *SHAPE)
    image[0, 0, 0, 0] = 1.0
    image[0, 0, 3:5, 3:5] = 1.0
    valid = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    valid[..., 5] = False
    cleaned = built()[1].pseudo_labels(image, valid)[0]
    assert int(cleaned[0, 0]) == 0
    assert int(cleaned[3, 3]) == 1
    assert set(cleaned[:, 5].tolist()) == {IGNORE}
    assert int(built(largest_component=False)[1].pseudo_labels(image, valid)[0, 0, 0]) == 1


def test_teacher_is_the_closed_form_average_and_gets_no_gradient():
    backbone, strategy = built(decay=0.9)
    expected = 1.0
    for step in range(20):
        with torch.no_grad():
            backbone.gain.fill_(float(step))
        strategy.after_step(backbone, PROGRESS)
        expected = 0.9 * expected + 0.1 * step
    assert float(strategy.teacher.gain) == pytest.approx(expected, rel=1e-5)
    losses = strategy.step(backbone, {"labelled": given(), "unlabelled": guessed()}, PROGRESS).losses
    sum(losses.values()).backward()
    assert strategy.teacher.gain.grad is None
    assert backbone.gain.grad is not None


def test_streams_of_unequal_length_are_used_again_from_their_start():
    backbone, strategy = built()
    short = stream([-10.0, 20.0])
    strategy.step(backbone, {"labelled": given(), "unlabelled": short}, PROGRESS)
    assert corner_and_centre(backbone.seen[0]) == [(1, -10), (2, 20), (3, -10), (4, 20)]


def test_without_unlabelled_images_labelled_ones_are_mixed():
    backbone, strategy = built()
    strategy.step(backbone, {"labelled": given()}, PROGRESS)
    assert corner_and_centre(backbone.seen[0]) == [(1, 2), (2, 3), (3, 4), (4, 1)]
    assert strategy.teacher.seen == []
    assert strategy.streams()["unlabelled"] == Stream("unlabelled", optional=True)


@pytest.mark.parametrize(
    ("pairing", "pairs"), [("cyclic", [(1, 4), (2, 1), (3, 2), (4, 3)]), ("halves", [(1, 3), (2, 4)])]
)
def test_pretraining_pairs(pairing, pairs):
    backbone = Spy()
    BcpPretrain(pairing=pairing).step(backbone, {"labelled": given()}, PROGRESS)
    assert corner_and_centre(backbone.seen[0]) == pairs


def test_plain_form_is_the_usual_loss_on_the_mixed_label():
    one = given()
    one = one._replace(label=torch.randint(2, one.label.shape, generator=torch.Generator().manual_seed(0)))
    mask = box_mask(SHAPE, generator=PROGRESS.generator("box"))
    logits = Spy()(paste(one.image[:2], one.image[2:], mask))
    target = paste(one.label[:2], one.label[2:], mask)
    ce = nn.functional.cross_entropy(logits, target)
    probs, onehot = logits.softmax(1), nn.functional.one_hot(target, 2).movedim(-1, 1)
    overlap, size = (probs * onehot).sum((2, 3)), (probs + onehot).sum((2, 3))
    dice = 1 - ((2 * overlap + 1e-5) / (size + 1e-5)).mean()
    found = BcpPretrain(pairing="halves", form="plain", dice="linear").step(Spy(), {"labelled": one}, PROGRESS).losses
    assert float(found["mixed"]) == pytest.approx(float((ce + dice) / 2), rel=1e-5)


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"decay": 1.2}, {"unlabelled_weight": -1.0}, {"connectivity": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Bcp(**options)


def test_threshold_needs_two_classes():
    with pytest.raises(ValueError, match="use argmax"):
        Bcp(pseudo_label="threshold").build(Spy(), Task(("a", "b", "c"), 2))

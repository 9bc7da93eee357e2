"""The checks find the mistakes that were found in published code."""

import numpy as np
import pytest
import torch
from torch import nn

from labeleff import testing
from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, StepOutput, Stream
from labeleff.edits import Edit
from labeleff.functional.ema import ema_update_
from labeleff.functional.losses import probability_mse, segmentation_loss
from labeleff.strategies.base import Strategy, fresh_copy
from labeleff.testing import Subject


class Sound(Strategy):
    """A mean teacher without faults, from which each mistake is made.

    Args:
        weight: Of the consistency.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def streams(self):
        return {"labelled": Stream("labelled"), "unlabelled": Stream("unlabelled")}

    def build(self, backbone, task):
        self.teacher = fresh_copy(backbone)

    def target(self, backbone, image):
        with torch.no_grad():
            return self.teacher(image).softmax(1)

    def step(self, backbone, batch, progress):
        one, two = batch["labelled"], batch["unlabelled"]
        loss = segmentation_loss(backbone(one.image), one.label)
        consistency = probability_mse(backbone(two.image), self.target(backbone, two.image), two.valid)
        return StepOutput({"supervised": loss, "consistency": self.weight * consistency})

    def after_step(self, backbone, progress):
        ema_update_(self.teacher, backbone, 0.9)


class TeacherIsStudent(Sound):
    def build(self, backbone, task):
        self.teacher = backbone


class TeacherUnused(Sound):
    def target(self, backbone, image):
        with torch.no_grad():
            return backbone(image).softmax(1)


class OptionIgnored(Sound):
    def step(self, backbone, batch, progress):
        self.weight = 1.0
        return super().step(backbone, batch, progress)


class TeacherNotSaved(Sound):
    def build(self, backbone, task):
        self.__dict__["teacher"] = fresh_copy(backbone)


class ChangesBatch(Sound):
    def step(self, backbone, batch, progress):
        batch["labelled"].image.add_(0.1)
        return super().step(backbone, batch, progress)


class TwoDimensional(Sound):
    def step(self, backbone, batch, progress):
        _, _, _, _ = batch["labelled"].image.shape
        return super().step(backbone, batch, progress)


class IgnoreIsBackground(Sound):
    def step(self, backbone, batch, progress):
        share = batch["labelled"]
        label = torch.where(share.label == IGNORE, 0, share.label)
        return super().step(backbone, batch | {"labelled": share._replace(label=label)}, progress)


class UnknownIsGuessed(Sound):
    def step(self, backbone, batch, progress):
        share = batch["labelled"]
        guess = backbone(share.image).argmax(1)
        label = torch.where(share.label == IGNORE, guess, share.label)
        return super().step(backbone, batch | {"labelled": share._replace(label=label)}, progress)


class GlobalNumpy(Sound):
    def target(self, backbone, image):
        return super().target(backbone, image) * np.random.rand()


class TrainableTeacher(Sound):
    def build(self, backbone, task):
        self.teacher = fresh_copy(backbone, trainable=True)

    def parameter_groups(self, backbone):
        return [{"params": list(backbone.parameters())}]


class NaNWithoutLabels(Sound):
    def step(self, backbone, batch, progress):
        share = batch["labelled"]
        logits = backbone(share.image)
        return StepOutput({"supervised": nn.functional.cross_entropy(logits, share.label, ignore_index=IGNORE)})


class PeeksAtHiddenLabels(Sound):
    def step(self, backbone, batch, progress):
        output = super().step(backbone, batch, progress)
        share = batch["unlabelled"]
        extra = segmentation_loss(backbone(share.image), share.label)
        return StepOutput(output.losses | {"extra": extra})


class UndeclaredStream(Sound):
    def streams(self):
        return {"labelled": Stream("labelled")}


class NoGradient(Sound):
    def step(self, backbone, batch, progress):
        share = batch["labelled"]
        loss = segmentation_loss(backbone(share.image).detach().requires_grad_(), share.label)
        return StepOutput({"supervised": loss})


class HalfLoss(Sound):
    def step(self, backbone, batch, progress):
        losses = super().step(backbone, batch, progress).losses
        return StepOutput({name: loss.bfloat16() for name, loss in losses.items()})


class MovesFrozen(Sound):
    def parameter_groups(self, backbone):
        return [{"params": list(backbone.last.parameters())}]

    def after_step(self, backbone, progress):
        super().after_step(backbone, progress)
        with torch.no_grad():
            backbone.first.weight.mul_(0.999)


class PredictsProbabilitiesOfOneClass(Sound):
    def predictors(self, backbone):
        class Head(nn.Module):
            def forward(self, image):
                return backbone(image)[:, :1]

        return {"head": Head()}


class SaysSoft(Sound):
    soft_labels = True


class SoftUnsaid(Sound):
    def step(self, backbone, batch, progress):
        share = batch["labelled"]
        output = super().step(backbone, batch, progress)
        if share.soft is None:
            return output
        return StepOutput({k: loss + share.soft[:, 0].mean() for k, loss in output.losses.items()})


class SoftIsAnotherLoss(SoftUnsaid):
    soft_labels = True


PLANTED = [
    (SaysSoft, testing.check_soft_labels, "soft labels change nothing"),
    (SoftUnsaid, testing.check_soft_labels, "soft labels matter, but soft_labels is False"),
    (SoftIsAnotherLoss, testing.check_soft_labels, "differs between labels and the same labels as shares of 1"),
    (TeacherIsStudent, testing.check_own_storage, "not a copy"),
    (TeacherUnused, testing.check_submodules_matter, "nothing depends on strategy.teacher"),
    (OptionIgnored, testing.check_options_matter, "option 'weight' changes nothing"),
    (TeacherNotSaved, testing.check_resume, "some state is not in state_dict"),
    (ChangesBatch, testing.check_batch_left_alone, "labelled image was changed in place"),
    (IgnoreIsBackground, testing.check_ignore, "IGNORE is taken for background"),
    (IgnoreIsBackground, testing.check_unknown_voxels, "loss 'supervised' depends on voxels of which nobody"),
    (UnknownIsGuessed, testing.check_unknown_voxels, "loss 'supervised' depends on voxels of which nobody"),
    (GlobalNumpy, testing.check_same_seed, "two runs with the same seed differ"),
    (TrainableTeacher, testing.check_own_storage, "asks for a gradient but is not optimised"),
    (NaNWithoutLabels, testing.check_nothing_known, "nan where nothing is labelled"),
    (PeeksAtHiddenLabels, testing.check_ignore, "depends on labels of the unlabelled stream"),
    (UndeclaredStream, testing.check_streams, "'unlabelled', which is not declared"),
    (NoGradient, testing.check_gradient, "no gradient reaches the backbone"),
    (HalfLoss, testing.check_finite_losses, "losses are computed in float32"),
    (MovesFrozen, testing.check_frozen, "backbone.first.weight moved although it is frozen"),
    (PredictsProbabilitiesOfOneClass, testing.check_predictors, "logits (4, 3, 16, 24) are needed"),
]


@pytest.mark.parametrize("check", testing.checks(), ids=lambda check: check.__name__)
def test_a_sound_strategy_passes(check):
    check(Subject(Sound))


@pytest.mark.parametrize(("mistake", "check", "message"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_planted_mistakes_are_found(mistake, check, message):
    with pytest.raises(AssertionError) as found:
        check(Subject(mistake))
    assert message in str(found.value)


def test_two_dimensional_code_is_found():
    from labeleff.batch import Task

    with pytest.raises(ValueError, match="too many values to unpack"):
        testing.check_finite_losses(Subject(TwoDimensional, task=Task(("background", "one"), 3)))


class Overwrites(Annotator):
    def revise(self, cases, progress):
        for case in cases:
            yield Edit(case.case, np.zeros(case.label.shape, np.uint8), "pseudo")


class WrongValues(Annotator):
    def revise(self, cases, progress):
        for case in cases:
            yield Edit(case.case, np.full(case.label.shape, 77, np.uint8), "corrected")


class InPlace(Annotator):
    def revise(self, cases, progress):
        for case in cases:
            case.label[:] = 1
            yield Edit(case.case, case.label, "corrected")


@pytest.mark.parametrize(
    ("annotator", "message"),
    [(Overwrites, "overwrites voxels"), (WrongValues, "writes the values [77]"), (InPlace, "was changed in place")],
)
def test_planted_mistakes_of_annotators_are_found(annotator, message):
    with pytest.raises(AssertionError) as found:
        testing.check_annotator(annotator())
    assert message in str(found.value)

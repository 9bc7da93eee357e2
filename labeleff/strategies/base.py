"""The contract of a strategy: what is minimised. One method is required, the others have defaults."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from labeleff.backbones.outputs import copy_of
from labeleff.batch import Batch, Progress, Report, StepOutput, Stream, Task
from labeleff.functional.ema import BufferRule, ema_update_
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.functional.schedules import early_decay


class LearningWarning(UserWarning):
    """Learning goes wrong in a way that numbers show. A run prints it, and keeps it in its summary."""


class Strategy(nn.Module, ABC):
    """How a network learns from a batch.

    A strategy is a module: teachers, heads and banks made in :meth:`build` are moved, saved and restored with it.
    The backbone is passed in, not owned. Options are the keyword-only arguments of ``__init__``; a value out of range
    raises ``ValueError`` there. A strategy never opens a file, moves a tensor between devices or steps an optimiser.
    """

    batch_joint: ClassVar[bool] = False
    """The loss joins samples of the batch, so that processes with shares of a batch do not equal one process with all."""

    supports_regions: ClassVar[bool] = False
    """Works on overlapping regions (sigmoid) too."""

    trains: ClassVar[bool] = True
    """False: no loss has a gradient; at most statistics of norm layers move."""

    trains_backbone: ClassVar[bool] = True
    """False: what is trained is the strategy's own, and the backbone passes on to the next stage as it came."""

    follows: ClassVar[tuple[str, ...]] = ()
    """Strategies of which one must be that of the stage before, since this one goes on from its state; none: any, or none."""

    soft_labels: bool = False
    """This instance learns from ``Batch.soft`` where it is given: from all raters at once, in place of their majority."""

    reads_labels: bool = True
    """False: this instance never looks at a label. Such stages are the same for every budget, and sweeps train them once."""

    uses_unknown: bool = False
    """This instance learns on purpose from voxels of labelled images that nobody has labelled, by a consistency say."""

    equivalent_options: ClassVar[Mapping[str, str]] = {}
    """Options whose alternatives may leave a short run as it is, with the reason; all others are checked to matter."""

    said: str = ""
    """What :meth:`build` has to say, for the log."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: dict[str, str] = {}

    def streams(self) -> dict[str, Stream]:
        """Return the streams this instance draws from. Default: labelled patches."""
        return {"labelled": Stream("labelled")}

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make teachers, heads and further views, once, when the stage starts."""

    def reshape(self, backbone: nn.Module, task: Task) -> str:  # noqa: ARG002
        """Change the structure of the backbone in place (kernels, dropout) and say how. Default: not at all.

        For :meth:`build` to call. It is called by itself where a run resumes in a later stage, whose weights are those of a
        network that this stage had changed; a second call must change nothing.
        """
        return ""

    @abstractmethod
    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return the named losses of one step. The batch must be left as it was."""

    def after_step(self, backbone: nn.Module, progress: Progress) -> None:
        """Follow an optimiser step (moving averages, banks). Not called for the micro-batches in between."""

    def parameter_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """Return what is optimised, as groups ``{"params": [...], "factor": 1.0}`` with factors on the learning rate."""
        asked = [p for module in (backbone, self) for p in module.parameters() if p.requires_grad]
        return [{"params": asked, "factor": 1.0}]

    def set_modes(self, backbone: nn.Module) -> None:
        """Set train and eval modes before a step. Default: the backbone and everything of the strategy train."""
        backbone.train()
        self.train()

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return what can be evaluated; the first is the default and the one handed on. Each returns logits."""
        return {"student": backbone}

    def warn(self, what: str, words: str, progress: Progress) -> None:
        """Warn that learning goes wrong: once in a stage of each thing that can.

        Args:
            what: The thing, such as a class; one that was warned of is passed over.
            words: What is the matter, with numbers, and what may help.
            progress: Where the stage stands.
        """
        if what not in self.warned:
            self.warned[what] = words
            warnings.warn(f"step {progress.step + 1}: {words}", LearningWarning, stacklevel=3)

    def inherit(self, previous: Mapping[str, Tensor]) -> Report:
        """Take over state of the previous stage's strategy. Default: nothing, and say so."""
        return Report(left=tuple(previous), note="strategy state of the previous stage is not used" if previous else "")


class Taught(Strategy):
    """A student beside a teacher that is the moving average of the students so far: what such methods have in common.

    Subclasses set ``decay``, ``teacher_mode``, ``buffer_rule`` and ``dice`` where they read their options.
    """

    decay: float
    """Of the moving average."""

    ramp_decay: bool = False
    """The decay starts at 0 and rises, see ``early_decay``."""

    teacher_mode: Literal["eval", "train"]
    """Whether dropout and batch statistics are at work in the teacher."""

    buffer_rule: BufferRule
    """What happens to the teacher's norm statistics, see ``ema_update_``."""

    dice: DiceForm
    """Form of the Dice loss."""

    def streams(self) -> dict[str, Stream]:
        """Return labelled and unlabelled patches; without unlabelled cases only what labels teach is left."""
        return {"labelled": Stream("labelled"), "unlabelled": Stream("unlabelled", optional=True)}

    def build(self, backbone: nn.Module, task: Task) -> None:  # noqa: ARG002
        """Make the teacher: a copy of the student as it starts."""
        self.teacher = fresh_copy(backbone)

    def set_modes(self, backbone: nn.Module) -> None:
        """Train the student; the teacher as asked for."""
        set_mode(backbone, training=True)
        set_mode(self.teacher, training=self.teacher_mode == "train")

    def after_step(self, backbone: nn.Module, progress: Progress) -> None:
        """Move the teacher."""
        decay = early_decay(progress.step, self.decay) if self.ramp_decay else self.decay
        ema_update_(self.teacher, backbone, decay, buffers=self.buffer_rule)

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return the student and the teacher."""
        return {"student": backbone, "teacher": self.teacher}

    def labels_alone(self, backbone: nn.Module, labelled: Batch) -> StepOutput:
        """Return ``supervised``: a step without unlabelled cases."""
        logits = backbone(labelled.image)
        loss = segmentation_loss(logits, labelled.label, dice=self.dice)
        return StepOutput({"supervised": loss}, {"labelled": logits.detach()})


def fresh_copy(network: nn.Module, *, trainable: bool = False) -> nn.Module:
    """Return a deep copy with its own storage (a teacher: without gradients)."""
    twin = copy_of(network)
    for parameter in twin.parameters():
        parameter.requires_grad_(trainable)
    return twin


def peer_of(network: nn.Module) -> nn.Module:
    """Return a network of the same kind with weights of its own, drawn anew from torch's global generator; it trains.

    What has no ``reset_parameters`` keeps the weights it is copied with.
    """
    peer = fresh_copy(network, trainable=True)
    for module in peer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return peer


def train_only(network: nn.Module, names: Collection[str]) -> None:
    """Freeze all parameters of a network but some. The run gives them their gradients back when the stage ends."""
    wanted = frozenset(names)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in wanted)


def set_mode(network: nn.Module, *, training: bool) -> None:
    """Call ``network.train(training)`` unless every module is in that mode already: looking is cheaper than setting."""
    if any(module.training != training for module in network.modules()):
        network.train(training)

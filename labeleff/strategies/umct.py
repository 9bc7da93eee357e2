"""Uncertainty-aware multi-view co-training: networks that look at an image from several sides teach one another.

Xia et al., WACV 2020, arXiv:1811.12506, and MedIA 2020, arXiv:2006.16806. No code of the authors is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.asymmetric import make_asymmetric
from labeleff.backbones.mc_dropout import (
    REMEDY,
    has_dropout,
    predict_and_sample,
    prediction_modes,
    sample,
    with_dropout,
)
from labeleff.backbones.views import Ensemble, ViewNetwork, check_views, identity, standard_views
from labeleff.batch import IGNORE, Batch, Progress, Report, StepOutput, Stream, Task
from labeleff.errors import RecipeError
from labeleff.functional.collapse import LOOK_EVERY, follow_, is_flooding, is_gone, predicted_shares, with_mean
from labeleff.functional.losses import DiceForm, region_losses, segmentation_loss
from labeleff.functional.schedules import ramped
from labeleff.functional.umct import Confidence, cotraining_loss, epistemic_variance, fuse_views, harden
from labeleff.registry import register
from labeleff.strategies.base import Strategy, fresh_copy, peer_of, set_mode

SETTLING = 10
"""Steps whose mean is what a stage started from."""


@register("strategy", "umct")
class Umct(Strategy):
    """L = Σ_i ℓ(p_i, Y) + λ Σ_i ℓ(p_i, Ŷ_i), Ŷ_i the mean of the views other than i, weighted by 1 / U_j.

    U_j is the variance of view j's predictions under dropout. View 0 is the backbone, which sees the image as it is; every
    other view has a network of its own. A view is moved by its own prediction alone.

    The stages of the paper are stages of this strategy: without unlabelled images (``streams: {unlabelled: {batch: 0}}``)
    every view is trained by itself, and the next stage takes all of them over. Without labelled ones (``streams:
    {labelled: {batch: 0}}``) it is source-free adaptation, UMCT-DA: only λ Σ_i ℓ(p_i, Ŷ_i) is left.

    The papers' settings, where known: ``views=2, 3 or 6`` of 3-D images, ``samples=10, weight=0.2, loss=dice``, no ramp,
    kernels n × n × 1 in the encoder (``asymmetric=encoder``) of a 2-D ResNet made 3-D. Not known, and ours: soft targets,
    the deterministic prediction, one confidence per voxel, where dropout is and how much, the form of the Dice loss, the mean
    of softmax as ensemble. Differs from the paper by default: cross-entropy beside Dice on labels, as every strategy here
    has it; symmetric kernels; the views of 2-D images, which are turned by 90°: the paper has none.

    A step costs, for each view, one pass forward and backward of all images, and of the unlabelled ones one more forward
    and ``samples`` times what comes after the first dropout. With two views, or ``weighting=equal``, no sample is needed.

    Args:
        views: How many: 2 … 6 permutations of the axes in 3-D; 2 … 8 turns and transpositions in 2-D.
        weight: Weight λ of co-training.
        rampup: Share of the stage over which λ rises, as ``exp(-5 (1 - t)²)``; 0: no ramp, as in the papers.
        samples: Predictions under dropout, K.
        weighting: ``uncertainty``: views weigh 1 / U_j; ``equal``: all alike, plain co-training.
        confidence: One weight per ``voxel``, or per ``volume`` (patch): 1 over its mean variance.
        prediction: What a view teaches: the ``deterministic`` prediction, without dropout, or the ``mc_mean`` of the samples.
        target: ``soft`` or ``hard`` (the most probable class).
        loss: On labels: ``dice_ce``, (cross-entropy + Dice) / 2, or ``dice``, the papers'.
        dice: Form of the Dice loss, of labels and of co-training. ``linear`` pulls predictions towards 0 and 1.
        cross_entropy: Weight of cross-entropy beside Dice in co-training.
        dropout: Probability of dropout that is put before the convolution that makes the logits, by whole channels, where
            the backbone has none; one that has any keeps its own.
        dropout_at: ``head``: as above; ``own``: refuse a backbone that has none.
        asymmetric: Kernels blind along each view's last axis: ``none``, those of the ``encoder``, or ``all``; 3-D only. The
            backbone is changed in place. Give it in every stage of this strategy.
        initial: Other views start with ``fresh`` weights of their own, or as a ``copy`` of the backbone (one that has been
            trained without views). Where the previous stage had views, those are taken over.
    """

    equivalent_options: ClassVar[Mapping[str, str]] = {
        "dropout": "a backbone with dropout keeps its own",
        "dropout_at": "as dropout",
        "asymmetric": "for 3-D networks with an encoder",
    }

    def __init__(
        self,
        *,
        views: int = 3,
        weight: float = 0.2,
        rampup: float = 0.0,
        samples: int = 10,
        weighting: Literal["uncertainty", "equal"] = "uncertainty",
        confidence: Confidence = "voxel",
        prediction: Literal["deterministic", "mc_mean"] = "deterministic",
        target: Literal["soft", "hard"] = "soft",
        loss: Literal["dice_ce", "dice"] = "dice_ce",
        dice: DiceForm = "squared",
        cross_entropy: float = 0.0,
        dropout: float = 0.5,
        dropout_at: Literal["head", "own"] = "head",
        asymmetric: Literal["none", "encoder", "all"] = "none",
        initial: Literal["fresh", "copy"] = "fresh",
    ) -> None:
        super().__init__()
        if not 2 <= views <= 8 or samples < 1 or not 0 < dropout < 1:
            raise ValueError(
                "views are 2 … 8 (one has nobody to learn from), samples at least 1, dropout lies in (0, 1)"
            )
        if min(weight, cross_entropy) < 0 or not 0 <= rampup <= 1:
            raise ValueError("weight and cross_entropy are at least 0, rampup lies in [0, 1]")
        if samples == 1 and weighting == "uncertainty" and views > 2:
            raise ValueError("samples is 1: one prediction has no variance; use 2 or more, or weighting=equal")
        self.count, self.weight, self.rampup, self.samples = views, weight, rampup, samples
        self.weighting, self.prediction, self.target = weighting, prediction, target
        self.confidence: Confidence = confidence
        self.loss, self.cross_entropy = loss, cross_entropy
        self.dice: DiceForm = dice
        self.dropout, self.dropout_at, self.initial = dropout, dropout_at, initial
        self.asymmetric: Literal["none", "encoder", "all"] = asymmetric
        self._tried = False
        self.shares: Tensor
        self.settled: Tensor

    @property
    def weighs(self) -> bool:
        """Whether confidences matter: of two views each has one teacher, whatever it weighs."""
        return self.weighting == "uncertainty" and self.count > 2

    @property
    def draws(self) -> bool:
        """Whether a step needs predictions under dropout."""
        return self.weighs or self.prediction == "mc_mean"

    @property
    def names(self) -> tuple[str, ...]:
        """What is predicted with: the ensemble, and each view."""
        return "ensemble", *(f"view_{number}" for number in range(self.count))

    def streams(self) -> dict[str, Stream]:
        """Return labelled and unlabelled patches; a stage may go without either."""
        return {"labelled": Stream("labelled", optional=True), "unlabelled": Stream("unlabelled", optional=True)}

    # -- networks ---------------------------------------------------------------------------------------------------------

    def reshape(self, backbone: nn.Module, task: Task) -> str:
        """Make kernels asymmetric and put dropout in, where asked for; return what was done."""
        done = []
        if self.asymmetric != "none":
            if task.ndim != 3:
                raise RecipeError(f"umct: asymmetric is for 3-D networks, and this one is {task.ndim}-D")
            done.append(make_asymmetric(backbone, task, part=self.asymmetric).summary)
        if self.draws and not has_dropout(backbone):
            if self.dropout_at == "own":
                raise RecipeError(f"umct: dropout_at is own, but this backbone has no dropout; {REMEDY}")
            with_dropout(backbone, task, p=self.dropout)
            done.append(f"dropout of {self.dropout:g} put before the head, since the backbone has none")
        return "; ".join(done)

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the other views' networks: the same, with weights of their own."""
        self.task, self.said = task, self.reshape(backbone, task)
        # drawn one after the other from one generator: no two views are alike
        start = peer_of if self.initial == "fresh" else partial(fresh_copy, trainable=True)
        views = standard_views(task.ndim, self.count)[1:]
        self.views = nn.ModuleList(ViewNetwork(start(backbone), view) for view in views)
        device = next(backbone.parameters()).device
        # shares of the classes, of the ensemble and each view: as the stage started, and now
        self.register_buffer("shares", torch.zeros(2, self.count + 1, task.num_classes, device=device))
        # fresh networks predict anything: what they start from is no measure
        self.register_buffer("settled", torch.tensor(self.initial == "copy", device=device))

    def members(self, backbone: nn.Module) -> list[nn.Module]:
        """Return the network of every view, images and logits in the frame of the image."""
        return [backbone, *self.views]

    def set_modes(self, backbone: nn.Module) -> None:
        """Train all views."""
        for network in self.members(backbone):
            set_mode(network, training=True)

    def parameter_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """Return two groups: the backbone, and the other views."""
        return [{"params": [p for p in m.parameters() if p.requires_grad], "factor": 1.0} for m in (backbone, self)]

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return the ensemble, and each view: the papers report both. The next stage is given the backbone, view 0."""
        members = self.members(backbone)
        return dict(zip(self.names, [Ensemble(members), *members], strict=True))

    def inherit(self, previous: Mapping[str, Tensor]) -> Report:
        """Take over the views of a stage before, or those of an exported ensemble."""
        taken: list[str] = []
        left: list[str] = []
        for number, network in enumerate(self.views, start=1):
            own, found = network.state_dict(), _view_of(previous, number)
            fits = found.keys() == own.keys() and all(own[key].shape == found[key].shape for key in own)
            if fits:
                network.load_state_dict(found)
            elif found:
                raise RecipeError(
                    f"umct: view {number} of the previous stage does not fit; give all stages of umct the same asymmetric"
                )
            (taken if fits else left).append(f"view_{number}")
        if not left:
            self.settled.fill_(value=True)
        how = "fresh weights" if self.initial == "fresh" else "copies of the backbone"
        said = [f"{', '.join(taken)} taken over"] if taken else []
        said += [f"nothing to inherit for {', '.join(left)}: they start as {how}"] if left else []
        return Report(tuple(taken), tuple(left), "umct: " + "; ".join(said))

    # -- a step -----------------------------------------------------------------------------------------------------------

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised`` and ``cotraining``, each the sum over views, of the streams that are there."""
        members, shares = self.members(backbone), {name: batch[name] for name in self.streams() if name in batch}
        if not self.weight:
            shares.pop("unlabelled", None)
        if shares and not self._tried:
            self._try(backbone, next(iter(shares.values())).image)
        targets: Tensor | None = None
        notes: dict[str, Tensor] = {}
        if unlabelled := shares.get("unlabelled"):
            targets, notes = self._teach(members, unlabelled, progress)
        scores = [_together(member, shares) for member in members]
        losses: dict[str, Tensor] = {}
        if labelled := shares.get("labelled"):
            losses["supervised"] = torch.stack([self._supervised(s["labelled"], labelled.label) for s in scores]).sum()
        if unlabelled and targets is not None:
            found = cotraining_loss(
                [s["unlabelled"] for s in scores],
                targets,
                valid=unlabelled.valid,
                dice=self.dice,
                cross_entropy=self.cross_entropy,
            )
            losses["cotraining"] = ramped(self.weight, progress.fraction, self.rampup) * found.sum()
        return StepOutput(losses, {name: value.detach() for name, value in scores[0].items()}, notes)

    def _try(self, backbone: nn.Module, image: Tensor) -> None:
        """Try the size of patches on every view, once: axes change places."""
        first = ViewNetwork(backbone, identity(self.task.ndim))
        others = [view for view in self.views if isinstance(view, ViewNetwork)]
        check_views([first, *others], self.task, image.shape[2:])
        self._tried = True

    def _supervised(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.loss == "dice_ce":
            return segmentation_loss(logits, label, dice=self.dice)
        return region_losses(logits, label, (label != IGNORE).unsqueeze(1), dice=self.dice)[1].sum()

    @torch.no_grad()
    def _teach(
        self, members: Sequence[nn.Module], unlabelled: Batch, progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the target of every view [V, B, K, *S], and what is noted of what they are made of."""
        views = [self._predict(member, unlabelled.image) for member in members]
        probs = torch.stack([plain for plain, _ in views])
        spread = [variance for _, variance in views if variance is not None]
        # equal variances are equal weights
        variance = torch.stack(spread) if spread else torch.ones_like(probs[:, :, :1])
        fused = fuse_views(probs, variance, confidence=self.confidence, valid=unlabelled.valid)
        if self.target == "hard":
            fused = torch.stack([harden(target) for target in fused])
        notes = self._watch(predicted_shares(probs, unlabelled.valid), progress)
        means = predicted_shares(variance, unlabelled.valid)[:, 0] if spread else ()
        return fused, notes | {f"variance/{name}": m for name, m in zip(self.names[1:], means, strict=False)}

    def _predict(self, member: nn.Module, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what a view teaches [B, K, *S], and its variance [B, 1, *S] where that matters."""
        if not self.draws:
            with prediction_modes(member):
                return member(image).float().softmax(1), None
        if self.prediction == "mc_mean":
            samples = sample(member, image, self.samples)
            return samples.mean(0), epistemic_variance(samples) if self.weighs else None
        plain, samples = predict_and_sample(member, image, self.samples)
        return plain, epistemic_variance(samples)

    # -- guard against collapse -------------------------------------------------------------------------------------------

    def _watch(self, new: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Follow the shares of classes in what is taught [V, K], look at times, and return those of the foreground."""
        shares = with_mean(new)
        if progress.step < SETTLING:
            self.shares[0].lerp_(shares.to(self.shares), 1 / (progress.step + 1))
        follow_(self.shares[1], shares, progress.step)
        if progress.step % LOOK_EVERY == LOOK_EVERY - 1 and bool(self.settled):
            self._look(progress)
        return {f"foreground/{name}": 1 - self.shares[1, row, 0] for row, name in enumerate(self.names)}

    def _look(self, progress: Progress) -> None:
        """Warn, once each, of classes that have all but gone, or are everywhere."""
        start, now = self.shares.tolist()
        for row, who in enumerate(self.names):
            for k, name in enumerate(self.task.classes):
                gone, flooding = is_gone(now[row][k], start[row][k]), is_flooding(now[row][k], start[row][k])
                if gone or flooding:
                    self.warn(
                        f"{who}: {name}",
                        f"{who} predicts {name!r} in {now[row][k]:.2%} of unlabelled voxels, and in "
                        f"{start[row][k]:.2%} as the stage started: it is collapsing; lower the rate, or the weight",
                        progress,
                    )


def _together(member: nn.Module, shares: Mapping[str, Batch]) -> dict[str, Tensor]:
    """Return logits of every stream: of one pass where all patches are of one size."""
    if len({share.image.shape[1:] for share in shares.values()}) != 1:
        return {name: member(share.image) for name, share in shares.items()}
    logits = member(torch.cat([share.image for share in shares.values()]))
    parts = logits.split([len(share.image) for share in shares.values()])
    return dict(zip(shares, parts, strict=True))


def _view_of(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the weights of a view in the state of this strategy, or of an :class:`Ensemble`."""
    starts = (f"views.{number - 1}.", f"networks.{number}.")
    return {key.removeprefix(s): value for key, value in state.items() for s in starts if key.startswith(s)}

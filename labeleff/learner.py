"""The one LightningModule. It runs every strategy the same way; strategies do not replace the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from labeleff.annotators.base import Annotator
from labeleff.batch import Batch, Progress, StepOutput, derive_seed
from labeleff.data import augment
from labeleff.errors import RecipeError, RunError
from labeleff.functional.regions import regions_of
from labeleff.functional.schedules import rate_factor
from labeleff.recipe import Optimiser, Stage
from labeleff.strategies.base import Strategy


@dataclass(frozen=True)
class StepMeans:
    """Losses and notes of one optimiser step, summed over its micro-batches; on the device until somebody looks."""

    sums: Mapping[str, Tensor]
    count: int
    rate: float

    def read(self) -> dict[str, float]:
        """Return the means and the learning rate as numbers (waits for the device)."""
        return {name: float(value) / self.count for name, value in self.sums.items()} | {"lr": self.rate}


StepHook = Callable[[int, StepMeans], None]
"""Called after every optimiser step with the number of steps done."""


class Learner(lightning.LightningModule):
    """A backbone, a strategy and perhaps an annotator, at some step of a stage.

    Lightning does not resume inside an epoch, so each fit is a fresh run over the steps that are left: ``first_step``
    is added to what Lightning counts. Nothing drawn depends on history: the global generators, which dropout uses, are
    seeded from (seed, stage, step, micro-batch, rank) before every forward pass.

    Args:
        backbone: [B, C, *S] -> logits [B, K, *S].
        strategy: Built for this backbone.
        stage: Its recipe: length, optimiser, schedule.
        index: Number of the stage.
        seed: Seed of the run.
        first_step: Optimiser steps already done.
        accumulate: Micro-batches per optimiser step.
        annotator: Sees every step's logits.
        optimiser_state: State to go on from.
        regions: Where regions overlap, their number R: labels are then [B, R, *S].
    """

    def __init__(
        self,
        backbone: nn.Module,
        strategy: Strategy,
        stage: Stage,
        *,
        index: int = 0,
        seed: int = 0,
        first_step: int = 0,
        accumulate: int = 1,
        annotator: Annotator | None = None,
        optimiser_state: Mapping[str, Any] | None = None,
        regions: int = 0,
    ) -> None:
        super().__init__()
        self.regions = regions
        self.backbone, self.strategy, self.annotator = backbone, strategy, annotator
        self.stage, self.index, self.seed = stage, index, seed
        self.first_step, self.accumulate = first_step, accumulate
        self.optimiser_state = optimiser_state
        self.after_optimiser_step: list[StepHook] = []
        self.images: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def progress(self, micro_batch: int) -> Progress:
        """Return where the stage stands at a micro-batch, counted from the start of this fit."""
        step = self.first_step + micro_batch // self.accumulate
        micro = micro_batch % self.accumulate
        return Progress(step, self.stage.steps, self.index, self.seed, micro, micro_batches=self.accumulate)

    def compute(self, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return the strategy's output for a batch, with everything drawn a function of the progress."""
        rank = self.global_rank if self._trainer is not None else 0
        torch.manual_seed(derive_seed(self.seed, "step", self.index, progress.step, progress.micro, rank))
        seen = {name: augment.apply(share) for name, share in batch.items()}
        if self.regions:
            seen = {name: with_regions(share, self.regions) for name, share in seen.items()}
        self.strategy.set_modes(self.backbone)
        output = self.strategy.step(self.backbone, seen, progress)
        if self.annotator is not None:
            self.annotator.observe(seen, output.logits, progress)
        return output

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor | None:
        """Return the sum of the strategy's losses, or None where nothing asks for a gradient."""
        if batch_idx:
            output = self.compute(batch, self.progress(batch_idx))
        else:
            with images_counted(type(self.backbone)) as self.images:
                output = self.compute(batch, self.progress(batch_idx))
        for name, value in (output.losses | output.notes).items():
            previous = self._sums.get(name)
            self._sums[name] = value.detach() if previous is None else previous + value.detach()
        losses = [loss for loss in output.losses.values() if loss.requires_grad]
        return cast(Tensor, sum(losses)) if losses else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the stage's optimiser over the strategy's parameter groups."""
        # Lightning refuses to clip or scale gradients of fused optimisers under mixed precision
        fused = self._trainer is None or self.trainer.precision == "32-true"
        optimiser = make_optimiser(self.stage.optimiser, self.strategy.parameter_groups(self.backbone), fused=fused)
        if self.optimiser_state is not None:
            try:
                optimiser.load_state_dict(dict(self.optimiser_state))
            except (ValueError, KeyError) as error:
                raise RunError(
                    f"stage {self.index}: the optimiser state to go on from does not fit ({error}); "
                    "use optimiser_state: fresh"
                ) from error
        return optimiser

    def optimizer_step(
        self,
        epoch: int,  # noqa: ARG002
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the rate of this step, step, and let the strategy follow."""
        progress = self.progress(batch_idx)
        factor = rate_factor(progress.step, progress.total, **asdict(self.stage.schedule))
        for group in optimizer.param_groups:
            group["lr"] = self.stage.optimiser.lr * factor * group["factor"]
        optimizer.step(closure=optimizer_closure)
        self.strategy.after_step(self.backbone, progress)
        means = StepMeans(self._sums, self.accumulate, self.stage.optimiser.lr * factor)
        self._sums = {}
        for hook in self.after_optimiser_step:
            hook(progress.step + 1, means)


def with_regions(batch: Batch, count: int) -> Batch:
    """Return a batch whose labels have an axis for regions that overlap, in place of one bit for each."""
    label = regions_of(batch.label, count)
    return batch._replace(label=label, given=label if batch.given is batch.label else regions_of(batch.given, count))


@contextmanager
def images_counted(kind: type[nn.Module]) -> Iterator[dict[str, int]]:
    """Count the images that networks of one class see: what a method costs, whatever the machine.

    Those of passes that end at the encoder count too.

    Yields:
        Images of forward passes ``with_gradient`` and ``without``.
    """
    counts = {"with_gradient": 0, "without": 0}

    def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if type(module) is kind and arguments and isinstance(arguments[0], Tensor):
            counts["with_gradient" if torch.is_grad_enabled() else "without"] += len(arguments[0])

    handle = nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        yield counts
    finally:
        handle.remove()


def make_optimiser(spec: Optimiser, groups: list[dict[str, Any]], *, fused: bool = True) -> torch.optim.Optimizer:
    """Return SGD or AdamW over groups ``{"params": [...], "factor": 1.0}``.

    Raises:
        RecipeError: There is nothing to optimise.
    """
    groups = [{"factor": 1.0, **group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise RecipeError("the strategy optimises no parameter: every one is frozen")
    if spec.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            fused=fused,
        )
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=fused)

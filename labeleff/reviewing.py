"""What an annotator sees of the cases whose labels it may change: predictions, and labels that somebody has given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from labeleff.annotators.base import Annotator
from labeleff.backbones.mc_dropout import has_dropout
from labeleff.batch import derive_seed
from labeleff.data.rounds import Rounds
from labeleff.edits import Reviewed
from labeleff.errors import RecipeError
from labeleff.evaluation.averaging import Averaged
from labeleff.evaluation.evaluate import Viewer
from labeleff.prepared import Prepared
from labeleff.recipe import Stage
from labeleff.results import best_of, load_snapshot, snapshot_path
from labeleff.rundir import RunDirectory
from labeleff.strategies.base import Strategy


@dataclass(frozen=True)
class Reviewing:
    """The cases of a stage at a revision, seen one at a time. No label is shown that nobody has given.

    Args:
        data: The run's.
        annotator: Says what it wants to see.
        index: Number of the stage.
        step: Where the stage stands.
        revision: Which labels hold.
        rounds: What was asked before.
    """

    data: Prepared
    annotator: Annotator
    index: int
    step: int
    revision: int
    rounds: Rounds

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.data.recipe.stages[self.index]

    def by(self, network: nn.Module, strategy: Strategy) -> Iterator[Reviewed]:
        """Yield the annotator's cases as one network predicts them.

        Raises:
            RecipeError: The annotator wants what the run has not.
        """
        annotator, name = self.annotator, self.stage.annotator.name if self.stage.annotator is not None else ""
        bound = self.data.bound(self.stage, self.index, strategy)
        viewer = self.data.viewer(network)
        if annotator.oracle and self.stage.answers != "oracle":
            raise RecipeError(f"stages.{self.index}: {name} chooses by hidden labels; it needs answers: oracle")
        if annotator.samples > 1 and not has_dropout(network):
            raise RecipeError(
                f"stages.{self.index}: {name} needs a network with dropout, and this one has none; set backbone.dropout"
            )
        earlier: dict[str, list[Any]] = {}
        for region in (r for n in self.rounds.numbers() for r in self.rounds.get(n).regions):
            earlier.setdefault(region.case, []).append((region.origin, region.size))
        network = self._averaged(network)
        for case in self.data.cases_of(annotator.role):
            if case in bound:  # what a stage does not bind it cannot read
                seeds = [
                    derive_seed(self.data.recipe.seed, "dropout", self.index, self.step, case, t)
                    for t in range(annotator.samples)
                ]
                found = self._seen(viewer, network, case, seeds if annotator.samples > 1 else ())
                truth = self.data.hidden_label(case) if annotator.oracle else None
                yield found._replace(asked=tuple(earlier.get(case, ())), truth=truth)

    def out_of_fold(
        self, directory: RunDirectory, history: Iterable[Mapping[str, Any]], backbone: nn.Module, strategy: Strategy
    ) -> Iterator[Reviewed]:
        """Yield every labelled case as the network predicts it that was trained without its patient."""
        last, history = self.index, list(history)
        current = snapshot_path(directory, last, self.stage.steps)  # kept a moment ago
        try:
            for index in range(last - self.stage.folds + 1, last + 1):
                stage = self.data.recipe.stages[index]
                best = best_of(history, index) if stage.take == "val_best" else None
                step = stage.steps if best is None else best["step"]
                load_snapshot(snapshot_path(directory, index, step), backbone, strategy)
                network = self._averaged(next(iter(strategy.predictors(backbone).values())))
                viewer = self.data.viewer(network)
                for case in self.data.held_out(stage):
                    yield self._seen(viewer, network, case)
        finally:
            load_snapshot(current, backbone, strategy)

    def _averaged(self, network: nn.Module) -> nn.Module:
        """Return the network, or what averages its predictions as the annotator wants them."""
        wanted = self.annotator
        if wanted.scales == (1.0,) and not wanted.flips:
            return network
        return Averaged(
            network,
            self.data.task,
            scales=wanted.scales,
            flips=wanted.flips,
            kept=wanted.kept,
            combine=wanted.combine,
        )

    def _seen(self, viewer: Viewer, network: nn.Module, case: str, seeds: Sequence[int] = ()) -> Reviewed:
        """Return what is seen of a case: one prediction, or one per seed with dropout left on."""
        annotations = self.data.annotations
        if seeds:
            samples = []
            for seed in seeds:
                torch.manual_seed(seed)
                samples.append(viewer.probabilities(network, case, dropout=True).cpu())
            probs = torch.stack(samples)
        else:
            probs = viewer.probabilities(network, case)[None].cpu()
        return Reviewed(
            case=case,
            probs=probs,
            label=annotations.read(case, revision=self.revision),
            given=annotations.read_given(case),
            spacing=self.data.store.spacing(case),
        )

"""Regions where the network is unsure: entropy, mutual information over dropout samples, and class-stratified entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from labeleff.annotators.base_query import Query, draws
from labeleff.batch import Progress
from labeleff.edits import Reviewed
from labeleff.functional.acquisition import box_mean, mutual_information, power_noise, predictive_entropy
from labeleff.registry import register


@register("annotator", "entropy")
class Entropy(Query):
    """Ask about regions of the highest mean predictive entropy."""

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:  # noqa: ARG002
        """Return the window mean of the entropy, nats."""
        return [(1.0, self.averaged(predictive_entropy(case.probs[:, None])))]

    def averaged(self, score: Tensor) -> Tensor:
        """Return the mean over regions [*S] of a score [1, *S]."""
        return box_mean(score, self._radii(score.ndim - 1))[0]


@register("annotator", "bald")
class Bald(Entropy):
    """Ask about regions of the highest mutual information between label and weights (BALD), by Monte Carlo dropout.

    Args:
        samples: Predictions per case with dropout left on; each costs a whole pass.
    """

    def __init__(self, *, samples: int = 8, **budget: Any) -> None:
        super().__init__(**budget)
        if samples < 2:
            raise ValueError("samples is at least 2")
        self.samples = samples

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:  # noqa: ARG002
        """Return the window mean of the mutual information, nats."""
        return [(1.0, self.averaged(mutual_information(case.probs[:, None])))]


@register("annotator", "clasp_pe")
class ClaspPE(Entropy):
    """Class-stratified predictive entropy with power noise (ClaSP PE; 2601.13677).

    A share of the budget is split evenly over the foreground classes, each ranked by entropy times the probability of the
    class; the rest goes by entropy alone. Gumbel noise of scale 1/beta is added to the logarithms of the scores, beta rising
    exponentially from the first round to the last.

    Args:
        stratified: Share of the budget split over the foreground classes.
        first: beta of the first round.
        last: beta of the last round.
    """

    def __init__(self, *, stratified: float = 0.66, first: float = 1.0, last: float = 100.0, **budget: Any) -> None:
        super().__init__(**budget)
        if not 0 <= stratified <= 1 or first <= 0 or last < first:
            raise ValueError("stratified is a share in [0, 1]; first is above 0, last not below it")
        self.stratified, self.first, self.last = stratified, first, last

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:
        """Return noisy logarithms of scores: one for each foreground class, then one for the rest."""
        entropy, mean = predictive_entropy(case.probs[:, None]), case.probs.mean(0)
        beta = self.first * (self.last / self.first) ** (min(progress.round, self.rounds - 1) / max(1, self.rounds - 1))
        count = mean.shape[0] - 1
        maps = [(self.stratified / count, entropy * mean[k + 1]) for k in range(count)]
        maps.append((1 - self.stratified, entropy))
        generator = draws(progress, case.case, "power")
        return [(share, power_noise(self.averaged(score), beta, generator)) for share, score in maps]

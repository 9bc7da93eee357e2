"""The contract of an annotator: how labels change between passes over the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from labeleff.batch import Batch, Progress
from labeleff.edits import Edit, Question, Reviewed


class Annotator(nn.Module, ABC):
    """How labels change. State that must survive a restart is kept in buffers."""

    samples: int = 1
    """Predictions wanted per case; more than one: with dropout left on (Monte Carlo dropout)."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes, relative to the window, that predictions are averaged over: a pass each."""

    flips: tuple[int, ...] = ()
    """Axes of the network that predictions are averaged over, mirrored and not: each doubles the passes."""

    kept: tuple[int, ...] = ()
    """Axes of the network that ``scales`` leaves alone."""

    combine: Literal["probs", "logits"] = "probs"
    """What is averaged."""

    taps: tuple[str, ...] = ()
    """Features wanted beside the predictions."""

    role: ClassVar[str] = "unlabelled"
    """Whose cases are reviewed: labelled, unlabelled or all; of these, those that a stream of the stage is bound to."""

    oracle: ClassVar[bool] = False
    """Chooses by hidden labels (``Reviewed.truth``). Only where an oracle answers, and the result is marked."""

    said: str = ""
    """A line for the terminal about the last revision, such as a budget that is spent."""

    def observe(self, batch: Mapping[str, Batch], logits: Mapping[str, Tensor], progress: Progress) -> None:
        """See every step's batch and detached logits, at no extra pass. Default: look away."""

    def gather(self) -> None:
        """Join what the processes of a data-parallel run have each observed; called by all of them together.

        Comes before a revision, which only the first process makes, and before a checkpoint. Default: nothing.
        """

    @abstractmethod
    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit | Question]:
        """Yield edits, or questions, not both in one revision. All cases may be read before the first is yielded.

        Questions are asked once: a run that was killed after it had asked finds the same round again. What to ask is a
        function of the cases (``Reviewed.asked`` has earlier questions) and the progress, never of history.
        """

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:  # noqa: ARG002
        """Return numbers and curves for the log, asked for after each revision. Default: none."""
        return {}

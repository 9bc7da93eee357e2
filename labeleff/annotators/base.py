"""The contract of an annotator: how labels change between passes over the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from labeleff.batch import Batch, Progress
from labeleff.edits import Edit, Question, Reviewed


class Annotator(nn.Module, ABC):
    """How labels change. State that must survive a restart is kept in buffers."""

    samples: int = 1
    """Predictions wanted per case (Monte Carlo samples, scales)."""

    taps: tuple[str, ...] = ()
    """Features wanted beside the predictions."""

    role: ClassVar[str] = "unlabelled"
    """Whose cases are reviewed: labelled, unlabelled or all."""

    def observe(self, batch: Mapping[str, Batch], logits: Mapping[str, Tensor], progress: Progress) -> None:
        """See every step's batch and detached logits, at no extra pass. Default: look away."""

    def gather(self) -> None:
        """Join what the processes of a data-parallel run have each observed; called by all of them together.

        Comes before a revision, which only the first process makes, and before a checkpoint. Default: nothing.
        """

    @abstractmethod
    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit | Question]:
        """Yield edits and questions. All cases may be read before the first is yielded."""

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:  # noqa: ARG002
        """Return numbers and curves for the log, asked for after each revision. Default: none."""
        return {}

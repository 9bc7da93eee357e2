"""What strategies have in common whose loss is a contrast: what it is where nothing is told apart, and a word if it stays so."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labeleff.batch import Progress, StepOutput
from labeleff.functional.collapse import watch_
from labeleff.strategies.base import Strategy


class Contrast(Strategy):
    """A strategy with one loss, ``contrast``, of rows of features."""

    advice: ClassVar[str]
    """What may help where nothing is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self._flat: dict[int, Tensor] = {}
        self.means: Tensor
        self.register_buffer("means", torch.zeros(2))

    def contrasted(self, loss: Tensor, rows: int, nothing: Callable[[], Tensor], progress: Progress) -> StepOutput:
        """Return ``contrast``; noted is what a network scores that tells nothing apart.

        Args:
            loss: The contrast.
            rows: How many rows it is of.
            nothing: Returns what it is for so many rows with all cosines equal.
            progress: The step.
        """
        if rows not in self._flat:
            self._flat[rows] = nothing().to(loss.device)
        flat = self._flat[rows]
        self._watch(loss, flat, progress)
        return StepOutput({"contrast": loss}, {}, {"flat_contrast": flat})

    def _watch(self, loss: Tensor, flat: Tensor, progress: Progress) -> None:
        """Say once where the loss stays what it is with all cosines equal."""
        if near := watch_(self.means, loss, flat, progress):
            self.warn(
                "contrast",
                f"the contrast is {near[0]:.3f}, and {near[1]:.3f} where nothing is told apart: it is not learning; {self.advice}",
                progress,
            )

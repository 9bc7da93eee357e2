"""Errors a user can cause: one clear line each, naming the file, key or case and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabeleffError(Exception):
    """Base of everything a user can cause. The command line prints it without a traceback."""

    exit_code = 2


def one_line(error: object, limit: int | None = 200) -> str:
    """Return what an error of somebody else's says, in one line; of so many characters at most, where there is a limit."""
    return " ".join(str(error).split())[:limit]


class RecipeError(LabeleffError):
    """A recipe or an override is not valid; raised before any data is read."""


class DataError(LabeleffError):
    """A data set, file or case cannot be used as it is."""


class SplitError(DataError):
    """Roles leak into one another, or a budget cannot be met."""


class StoreError(DataError):
    """A prepared store or an annotation store is damaged, or was asked for what it must not give."""


class ShapeError(LabeleffError, ValueError):
    """An array has a shape, type or range that the called function cannot take."""


class RunError(LabeleffError):
    """A run directory cannot be continued as asked."""


class Interrupted(LabeleffError):
    """The run was asked to stop (SIGTERM, SIGINT), wrote a checkpoint and can be resumed.

    The exit code is ``EX_TEMPFAIL``, which queue systems can be told to requeue on.
    """

    exit_code = 75


class Waiting(LabeleffError):
    """The run has asked people for labels and wrote a checkpoint; it goes on once they have answered."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""

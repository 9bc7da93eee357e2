"""Asked to stop: by a queue (SIGTERM) or at the keyboard (SIGINT)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from labeleff.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def interrupted(asked: str, where: str) -> Interrupted:
    """Return what is raised once a checkpoint stands."""
    return Interrupted(f"{asked}: stopped {where}; the checkpoint stands: run the same command again to go on")


def _in_charge() -> bool:
    """Return whether this thread may handle signals."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Between fits everything is on the disk: a signal raises :class:`Interrupted` where it arrives."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise interrupted(signal.Signals(number).name, "between two steps")

    if not _in_charge():
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """While a fit runs, a signal is only remembered: the step is finished and a checkpoint written first."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def listen(self) -> None:
        """Put the handlers in place (after Lightning has put its own). A second signal is not waited for."""
        if _in_charge():
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        if _in_charge():
            for number, handler in self._before.items():
                signal.signal(number, handler)

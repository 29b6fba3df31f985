"""Ctrl-C, SIGTERM and the end of a terminal: the run ends after the present step, when its checkpoint is written."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Raised when a run was told to stop, and stopped after a whole step.

    Args:
        message: what the user is told.
        number: number of the signal, such as 15 for SIGTERM.

    Attributes:
        status: the exit status that shells expect of a process that this signal ended, such as 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruptions:
    """A context manager: ``received`` notes the first SIGINT, SIGTERM or SIGHUP; a second one raises KeyboardInterrupt.

    ``with`` gives the object itself, whose ``received`` the block looks at. Earlier handlers are back behind the block.

    SIGHUP, which a terminal sends as it closes, is left alone where ``nohup`` said that it is ignored.

    In another thread than the main one, where Python has no signals, nothing is noted.

    Attributes:
        received: number of the first signal in the block, such as 2 for SIGINT; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


def leave_to_parent(worker: int) -> None:
    """Let this process, which reads images, ignore Ctrl-C: its parent gets the signal as well, and ends it.

    ``worker`` is not used; a data loader calls this with it in each of its processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

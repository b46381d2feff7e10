"""Signals that end the command, as bytes on a descriptor that the event loop waits on.

Before `Signals` is made they have their default effect: the launcher dies at once, and the kernel ends
what it had forked. After it they only wake the loop, which ends the machine in order.
"""

from __future__ import annotations

import signal
import socket
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def die_quietly() -> None:
    """Until there is something to clean up, Ctrl-C ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Signals:
    """`descriptor` becomes readable when one of ENDING has come; `take` says which."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, _noted)

    @property
    def descriptor(self) -> int:
        return self._reader.fileno()

    def take(self) -> signal.Signals | None:
        """The next ending signal that has come, None when there is none."""
        while True:
            try:
                byte = self._reader.recv(1)
            except BlockingIOError:
                return None
            if byte and byte[0] in ENDING:
                return signal.Signals(byte[0])


def _noted(number: int, frame: FrameType | None) -> None:
    """Nothing to do here: the interpreter has written the number to the wake-up descriptor."""

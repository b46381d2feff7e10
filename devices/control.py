"""The launcher's way to one process of a device, apart from the bus: launcher/swapping.py has the records."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import msgpack

RECORD_MAX = 64 << 10
ERROR_MAX = 2000


class Control:
    """The device's end. `wants_to_know`: the launcher waits for the CPU's connection."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self.wants_to_know = False
        self._number = 0  # of the last "retire"

    def fileno(self) -> int:
        return self._sock.fileno()

    def stand_by(self) -> None:
        """Say that this process can take over, and wait until it shall; SystemExit where it shall not."""
        self._say(op="standing-by")
        if self._hear() != "take-over":
            raise SystemExit(0)

    def live(self) -> None:
        self._say(op="live")
        self.wants_to_know = True

    def connected(self, at_ns: int) -> None:
        self._say(op="connected", ns=at_ns)
        self.wants_to_know = False

    def refuse(self, error: str) -> None:
        self._say(op="refused", error=error[:ERROR_MAX])

    def told_to_retire(self) -> bool:
        """A record has arrived: is it that?"""
        return self._hear() == "retire"

    def retired(self) -> None:
        """Say that this process has let go, and wait until it shall go on; SystemExit when it shall end."""
        self._say(op="retired", number=self._number, ns=time.monotonic_ns())
        if self._hear() != "resume":
            raise SystemExit(0)

    def _say(self, **record: Any) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(msgpack.packb(record))

    def _hear(self) -> str:
        data = self._sock.recv(RECORD_MAX)
        record: dict[str, Any] = msgpack.unpackb(data) if data else {"op": ""}
        self._number = record.get("number", self._number)
        return str(record["op"])

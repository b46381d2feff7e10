"""The launcher's way to one process, apart from the bus: launcher/swapping.py has the records.

Over it a process also gives the launcher descriptors to keep, which its successor is given then.
The baton is a pipe: its end is with the process that is to take over, its beginning comes with "retire". So
one process can tell the other that it has let go, and the launcher need not run in between.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Any

import msgpack

RECORD_MAX = 64 << 10
ERROR_MAX = 2000
FDS_MAX = 250  # Linux takes 253 [unix(7), SCM_RIGHTS]


Descriptors = dict[str, int]  # by name


class Control:
    """The process's end. `wants_to_know`: the launcher waits for the CPU's connection."""

    def __init__(self, fd: int, baton: int | None = None) -> None:
        """`baton`: its end, of a process that stands by."""
        self._sock = socket.socket(fileno=fd)
        self._baton = baton
        self.wants_to_know = False
        self._number = 0  # of the last "retire"
        self._stopped_ns = self._began_ns = 0
        self._to_next: int | None = None  # the beginning of the baton, of a process that retires

    def fileno(self) -> int:
        return self._sock.fileno()

    def stand_by(self) -> Descriptors:
        """Say that this process can take over, and wait until it shall; SystemExit where it shall not.

        Returns the descriptors that came with that.
        """
        self._say(op="standing-by")
        came: Descriptors = {}
        fds = [self._sock.fileno(), *([] if self._baton is None else [self._baton])]
        while True:
            readable = select.select(fds, [], [])[0]
            if self._sock.fileno() in readable:
                record, came = self.hear()
                if record["op"] != "take-over":
                    raise SystemExit(0)
                break
            assert self._baton is not None
            if os.read(self._baton, 1):
                break
            fds.remove(self._baton)  # whoever had the other end has ended: the launcher knows what to do
        self._began_ns = time.monotonic_ns()
        if self._baton is not None:
            os.close(self._baton)
        return came

    def live(self) -> None:
        self._say(op="live", began_ns=self._began_ns, ns=time.monotonic_ns())
        self.wants_to_know = True

    def connected(self, at_ns: int) -> None:
        self._say(op="connected", ns=at_ns)
        self.wants_to_know = False

    def refuse(self, error: str) -> None:
        self._say(op="refused", error=error[:ERROR_MAX])

    def told_to_retire(self) -> bool:
        """A record has arrived: is it that?"""
        return bool(self.hear()[0]["op"] == "retire")

    def retired(self) -> None:
        """Say that this process has let go: from here on it may not touch the device."""
        if self._to_next is not None:
            with contextlib.suppress(OSError):
                os.write(self._to_next, b"\1")
            os.close(self._to_next)
            self._to_next = None
        self._say(op="retired", number=self._number, ns=self._stopped_ns, left_ns=time.monotonic_ns())

    def wait_to_resume(self) -> Descriptors:
        """SystemExit when it shall not. Returns the descriptors that came with that."""
        record, fds = self.hear()
        if record["op"] != "resume":
            raise SystemExit(0)
        return fds

    def keep(self, name: str, fd: int) -> bool:
        """Have the launcher keep a descriptor; False when it takes none at the moment."""
        record = msgpack.packb({"op": "keep", "name": name})
        try:
            socket.send_fds(self._sock, [record], [fd], socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def let_go(self, name: str) -> None:
        """Have it close a descriptor that it keeps."""
        self._say(op="let-go", name=name)

    def changed(self) -> None:
        """What was told is done."""
        self._say(op="changed")

    def hear(self) -> tuple[dict[str, Any], Descriptors]:
        """The next record, and the descriptors that came with it; its op is "" when the launcher is gone."""
        data, fds, _, _ = socket.recv_fds(self._sock, RECORD_MAX, FDS_MAX)
        record: dict[str, Any] = msgpack.unpackb(data) if data else {"op": ""}
        self._number = record.get("number", self._number)
        if record["op"] == "retire":
            self._stopped_ns = time.monotonic_ns()
            self._to_next = fds[0] if fds else None
            fds = []
        return record, dict(zip(record.get("fds", []), fds, strict=True))

    def _say(self, **record: Any) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(msgpack.packb(record))

"""Descriptors that a process has its launcher keep, so that its successors find them
open (bus/control.py)."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from typing import Any

from memory_node import wire

KEEP, LET_GO = "keep", "let-go"


class Kept:
    """Of one node, whatever process it has. `fds`: by name."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self.changes = 0  # so often they have become others

    def take(self, record: dict[str, Any], fds: Sequence[int]) -> bool:
        """Do what a record says; False, the descriptors being closed, where it is about something else."""
        name = str(record.get("name"))
        if record["op"] == KEEP and len(fds) == 1:
            self._close(name)
            self.fds[name] = fds[0]
            self.changes += 1
            return True
        for fd in fds:
            os.close(fd)
        if record["op"] == LET_GO:
            self._close(name)
        return record["op"] in (KEEP, LET_GO)

    def drain(self, control: socket.socket) -> list[dict[str, Any]]:
        """Take what has come from the node's process, also if it has ended; records about other things."""
        others = []
        while select.select([control], [], [], 0)[0]:
            try:
                received = wire.receive_record(control)
            except (OSError, wire.BadRecord):
                break
            if received is None:
                break
            if not self.take(*received):
                others.append(received[0])
        return others

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def _close(self, name: str) -> None:
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)
            self.changes += 1

"""What a machine is started from, and how it ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from launcher.facts import MachineFacts
from launcher.forkserver import ChildSpec

if TYPE_CHECKING:
    from launcher.restore import Restored


TRACE_MEMORY = 32 << 20


class MachineEnd(Exception):
    """The machine is to end: with which exit status, and what to tell the user."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line
        self.left = False  # another launcher goes on with it


class Launch(msgspec.Struct, frozen=True):
    """All that a machine is made of, in the order of its start."""

    machine: str
    run_dir: Path
    memory: ChildSpec
    others: tuple[ChildSpec, ...]  # the devices, then the CPU node
    rim: ChildSpec | None  # consoles and logs of the devices
    images: Iterable[tuple[int, bytes]]
    start: dict[str, int]
    console: Path | None  # socket of the console device, when someone wants to see it
    stop_on_reset: bool
    facts: MachineFacts | None = None  # for snapshots
    restored: Restored | None = None
    outlive: bool = False  # it goes on when its launcher ends without a word
    trace: bool = True  # the flight recorder is on from the start
    otlp: str = ""  # where spans go, launcher/spans.py
    trace_memory: int = TRACE_MEMORY  # bytes of all its rings
    lock_fd: int = -1  # of the run directory

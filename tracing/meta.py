"""What a trace says of its machine besides the records. Imports little: every launcher starts with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec


class Meta(msgspec.Struct, frozen=True):
    """What is known about the machine besides the records."""

    machine: str
    rings: list[str]  # "<node>", "cpu0.io" (the CPU's thread), by number
    map: dict[str, Any] = {}  # bus/addressmap.py, plain
    irqs: dict[str, dict[str, int]] = {}  # node -> line -> ISA IRQ
    # One moment on both clocks, so that times can be shown as time of day
    monotonic_ns: int = 0
    realtime_ns: int = 0
    since_ns: int = 0  # what was before is not to be shown
    why: str = ""  # it was saved
    version: int = 1


def meta_of(machine: str, rings: Sequence[str], **more: Any) -> Meta:
    """With the clocks of now."""
    return Meta(machine, list(rings), monotonic_ns=time.monotonic_ns(), realtime_ns=time.time_ns(), **more)

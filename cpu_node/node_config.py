"""What the launcher says to a CPU node."""

from __future__ import annotations

from typing import Any

import msgspec


class Controllers(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pic: str | None
    ioapics: list[str]


class NodeConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the launcher says to a CPU node."""

    node: str
    run_dir: str
    machine: str
    map: dict[str, Any]
    memory_size: int
    tsc_hz: int
    apic: bool
    controllers: Controllers
    start: dict[str, int]
    clock_offset_ns: int = 0  # bus/clock.py
    clock_stopped_ns: int | None = None  # paused from the start
    state: dict[str, Any] | None = None  # of state.py, instead of `start`
    features: list[str] | None = None  # of the host, that the guest may be told of; None: all
    user_mode: str = "translated"
    translations: str = ""  # the folder they are kept in; empty: none
    keep_after: int = 20_000  # instructions translated, and
    keep_every_s: float = 10.0  # since the last time: then an idle CPU writes translations to the disk
    trap_backend: str = "auto"
    mmu: str = "auto"
    launcher: str = "launcher"
    fds: dict[str, int] = {}  # `trace`, `trace_io`: rings of the bus thread and the CPU's, bus/recorder.py
    log_level: str = "warning"

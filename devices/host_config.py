"""What the launcher says to one device process."""

from __future__ import annotations

from typing import Any

import msgspec


class HostConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """See the module's docstring."""

    node: str
    run_dir: str
    machine: str
    type: str  # for devices/registry.py; file paths absolute
    settings: dict[str, Any] = {}
    irqs: dict[str, int] = {}  # line -> ISA IRQ
    controllers: list[str] = []  # nodes that get this device's Line frames
    cpus: list[str] = []  # CPU nodes; the first one is the boot processor
    launcher: str = "launcher"
    clock_offset_ns: int = 0  # bus/clock.py
    clock_stopped_ns: int | None = None  # paused from the start
    state: dict[str, Any] | None = None  # of Save, to begin with
    overlays: dict[str, str] = {}  # disk -> file that takes the writes, of a restored machine
    mirror_index: int | None = None  # page in the region "mirror"; None: no mirror, reads are synchronous
    log_level: str = "warning"
    checkpoints: bool = True  # False: no journal
    set_aside_after: int = 3  # processes that ended in the same step
    shape: dict[str, str] = {}  # what the machine was started with, see devices/tryout.py
    standby: bool = False  # take over from another process, when told to
    fds: dict[str, int] = {}  # `journal`: without it the device doesn't survive its process; `listen`: where
    # others connect (bus/link.py); `control`, `baton`: bus/control.py; `trace`: bus/recorder.py;
    # `ring:<channel>`, `wake_rim`, `wake_device`: without them consoles and logs are in this process

    def peers(self) -> list[str]:
        """Nodes that it connects to."""
        return list(dict.fromkeys([*self.controllers, *self.cpus, self.launcher]))

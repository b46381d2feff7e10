"""Which host cores the machine's processes run on. Why: docs/decisions/005-one-core-for-a-dialogue.md.

The CPU node and the devices talk synchronously: one waits while the other works, and a wake-up on the
same core costs a third of one across cores. So they share one core, the one that was least busy while
the launcher started. The memory node and the launcher, which are in no dialogue, may run anywhere.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from launcher.config import MachineConfig


class CoreLoad:
    """Samples /proc/stat when made; `idlest` compares with then."""

    def __init__(self) -> None:
        self._before = idle_ticks(Path("/proc/stat").read_text(encoding="ascii"))

    def idlest(self, allowed: set[int]) -> int:
        """The allowed core that was idle longest since; among equals the highest (0 serves interrupts)."""
        now = idle_ticks(Path("/proc/stat").read_text(encoding="ascii"))
        return max(allowed, key=lambda core: (now.get(core, 0) - self._before.get(core, 0), core))


def idle_ticks(stat: str) -> dict[int, int]:
    """Core -> clock ticks idle, of /proc/stat's lines `cpuN user nice system idle iowait ...` [proc(5)]."""
    ticks = {}
    for line in stat.splitlines():
        words = line.split()
        if words and words[0].startswith("cpu") and words[0][3:].isdigit():
            ticks[int(words[0][3:])] = int(words[4]) + int(words[5])
    return ticks


def check_host_cpu(config: MachineConfig) -> None:
    """A core that the machine file names is one that this process may use."""
    wanted, allowed = config.cpu.host_cpu, os.sched_getaffinity(0)
    if isinstance(wanted, int) and wanted not in allowed:
        choices = ", ".join(map(str, sorted(allowed)))
        raise config.error("cpu.host_cpu", f"this host has no core {wanted} for us", f"choose from {choices}")


def dialogue_cores(wanted: int | Literal["auto", "any"], load: CoreLoad) -> tuple[int, ...]:
    """Cores for the CPU node and the devices; empty: no restriction."""
    match wanted:
        case "any":
            return ()
        case "auto":
            return (load.idlest(os.sched_getaffinity(0)),)
        case number:
            return (number,)


def pin(pid: int, cores: tuple[int, ...]) -> None:
    """Have all threads of a process, if it still lives, run on these cores alone; empty: where they like.

    Called when the process is ready: while a machine starts, its processes take all cores there are.
    """
    if not cores:
        return
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)

"""How busy the host is with other work than ours: what /proc/stat counts less what our children used."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
IDLE, IOWAIT = 3, 4  # columns of the cpu line [proc(5)]


class Load:
    """From its making on. Children count when they have ended and been waited for, theirs with them."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._own = _busy_s(), _own_s()

    def others_cores(self) -> float:
        """Cores that other work kept busy, on average."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        return max(_busy_s() - self._busy - (_own_s() - self._own), 0.0) / seconds


def _busy_s() -> float:
    words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    return sum(int(word) for n, word in enumerate(words) if n not in (IDLE, IOWAIT)) / TICKS


def _own_s() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total

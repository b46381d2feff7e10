"""Processor time of other processes: what they have done, whatever else the host does meanwhile."""

from __future__ import annotations

from time import clock_gettime_ns

_CPUCLOCK_SCHED = 2  # of a process's clock id, as clock_getcpuclockid() makes it


def cpu_ns(pid: int) -> int:
    """Time that a process has had a processor; 0 when it is no more."""
    try:
        return clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return 0

"""The machine's clock: CLOCK_MONOTONIC of the host plus an offset, or standing still.

All that the guest can see of time is told by it (timers, counters, the mirror's formulas, the local APIC).
So a machine that was paused, or restored from a snapshot, goes on from its own time. All nodes of a machine
have the same offset; while the machine is paused each stands where it was stopped, and time goes on from the
latest of these (docs/decisions/055-the-machines-time.md).
Deadlines of the bus and durations of the host are not its business: they stay on CLOCK_MONOTONIC.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class MachineClock:
    """Call it for the time in nanoseconds."""

    __slots__ = ("_host_ns", "offset_ns", "stopped_ns")

    def __init__(self, offset_ns: int = 0, stopped_ns: int | None = None,
                 host_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`stopped_ns`: where it stands until go_on; None: it runs."""
        self.offset_ns = offset_ns
        self.stopped_ns = stopped_ns
        self._host_ns = host_ns

    def __call__(self) -> int:
        return self._host_ns() + self.offset_ns if self.stopped_ns is None else self.stopped_ns

    def stop(self) -> int:
        """Stand still; where. Nothing changes if it does already."""
        self.stopped_ns = self()
        return self.stopped_ns

    def go_on(self, offset_ns: int) -> None:
        """Run, with this offset from now on."""
        self.offset_ns, self.stopped_ns = offset_ns, None

    def left_s(self, deadline_ns: int) -> float:
        """Seconds until then, below 0 if it is past. Of a clock that runs."""
        return (deadline_ns - self()) / 1e9

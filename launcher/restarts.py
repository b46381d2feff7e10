"""When a device whose process has ended gets a new one: at once, then after longer and longer waits.

There is no last attempt. A process that lived for HEALTHY_S begins the series anew.
"""

from __future__ import annotations

import msgspec

HEALTHY_S = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.02, 5.0


class Restarts(msgspec.Struct):
    """Of one device. Times are CLOCK_MONOTONIC in seconds."""

    count: int = 0
    due_s: float | None = None  # when the next process is to be started; None: one runs
    _started_s: float = 0.0
    _in_a_row: int = 0

    def started(self, now_s: float) -> None:
        """A process has been started."""
        self._started_s, self.due_s = now_s, None

    def ended(self, now_s: float) -> float:
        """It has ended; how long to wait, in seconds."""
        self._in_a_row = 0 if now_s - self._started_s >= HEALTHY_S else self._in_a_row + 1
        wait_s = 0.0 if not self._in_a_row else FIRST_WAIT_S * 2 ** min(self._in_a_row - 1, 30)
        wait_s = min(wait_s, LONGEST_WAIT_S)
        self.count += 1
        self.due_s = now_s + wait_s
        return wait_s

    def state(self, now_s: float) -> str:
        """For `launcher ps`, while no process runs."""
        left_s = max(0.0, (self.due_s or now_s) - now_s)
        return f"restarts in {left_s:.1f} s"

"""A CPU that stands and goes on: its two clocks, and its state in between.

The time-stamp counter stands with the machine's clock. When both go on, the counter has an offset to the
host's (rdtsc.py); a machine that never stood has none.
"""

from __future__ import annotations

from typing import Any

from bus.clock import MachineClock
from bus.frames import Frame, Refused, SaveReply
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node import state
from cpu_node.engine import Engine
from cpu_node.msr import MASK64

SECOND = 1_000_000_000


class Standing:
    """`clock` may stand from the start. `offset_in_code`: the host has rdtsc.OFFSET_FLAG."""

    def __init__(self, engine: Engine, clock: MachineClock, tsc_hz: int, offset_in_code: bool) -> None:
        self.engine, self.clock, self.tsc_hz = engine, clock, tsc_hz
        self._offset_in_code = offset_in_code
        self.clock_ns, self._tsc = clock(), engine.rdtsc()  # when it was stopped last

    @property
    def now(self) -> bool:
        return self.clock.stopped_ns is not None

    def stop(self) -> None:
        """At an instruction boundary, Engine.run having returned."""
        if not self.now:
            self.clock_ns, self._tsc = self.clock.stop(), self.engine.rdtsc()

    def go_on(self, clock_offset_ns: int) -> None:
        self.clock.go_on(clock_offset_ns)
        self.set_tsc(self._tsc + (self.clock() - self.clock_ns) * self.tsc_hz // SECOND)

    def set_tsc(self, value: int) -> None:
        """The counter is `value` now, before Cpu.tsc_adjust is added; it goes on at the host's rate."""
        engine, cpu = self.engine, self.engine.cpu
        cpu.tsc_offset = engine.record.q[at.TSC_OFFSET // 8] = value - engine.platform.rdtsc() & MASK64
        cpu.tsc_mode = modes.TSC_OFFSET if self._offset_in_code else modes.TSC_SIMULATED
        engine.mode_changed()

    def saved(self, intr: bool, in_reset: bool) -> Frame:
        """The answer to Save. While the guest runs it is for people to read: nothing could go on from it."""
        if in_reset:
            return Refused("the CPU is held in reset")
        clock_ns, tsc = (self.clock_ns, self._tsc) if self.now else (self.clock(), self.engine.rdtsc())
        return SaveReply(state.save(self.engine, state.Outer(clock_ns, tsc, intr)))

    def load(self, saved: dict[str, Any]) -> bool:
        """Take a saved state; returns the level of INTR. The counter is right from go_on on."""
        outer = state.load(self.engine, saved)
        self.clock_ns, self._tsc = outer.clock_ns, outer.tsc
        return outer.intr

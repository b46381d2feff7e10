"""8254 interval timer, with port 0x61 (system control port B) next to it.

Reference: Intel 8254 data sheet, 231164-005; port B: IBM PS/2 Hardware Interface Technical Reference, "System
control port B". Counter 0 makes IRQ 0 and has its GATE tied high, counter 1 once refreshed the memory,
counter 2 drives the speaker and has its GATE at port B bit 0.
The short or low phases of OUT0 in modes 2 to 5 pass within one call: the line goes low and high again at the
rising edge, where an edge-triggered controller looks. Edges that are due together, because the host was
late, are one; of edges less than 50 us apart only some are made.
Left out: sound; parity and channel-check NMI (bits 6 and 7 read 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from devices.base import Device, DeviceState, MirrorValue, PortRange, Step
from devices.pit_counter import PitCounter

CONTROL = 3
SELECT_SHIFT, SELECT_READ_BACK = 6, 3
READ_BACK_NO_COUNT, READ_BACK_NO_STATUS, READ_BACK_COUNTER_0 = 0x20, 0x10, 0x02
FLOATING = 0xFF  # reading the control register leaves the bus undriven ["Read/Write logic" table]
PORT_B_GATE2, PORT_B_WRITABLE, PORT_B_REFRESH, PORT_B_OUT2 = 0x01, 0x0F, 0x10, 0x20
REFRESH_NS = 15_085  # counter 1's 18 clocks; the refresh bit toggles with each


@dataclass(slots=True)
class PitState(DeviceState):
    VERSION: ClassVar[int] = 1
    counters: list[PitCounter] = field(default_factory=lambda: [PitCounter(gate=n < 2) for n in range(3)])
    port_b: int = 0  # the writable bits


class Pit8254(Device[PitState]):
    NAME = "pit8254"
    PORTS = (
        # Writing a count starts the counting, and calibration loops read another clock next: not posted.
        PortRange(
            "counters",
            length=4,
            posted=frozenset({CONTROL}),
            names={0: "COUNTER0", 1: "COUNTER1", 2: "COUNTER2", CONTROL: "CONTROL"},
        ),
        PortRange(
            "port_b",
            length=1,
            posted=frozenset({0}),
            prompt=frozenset({0}),
            mirrored=frozenset({0}),
            names={0: "PORT_B"},
        ),
    )
    IRQS = ("out0",)
    STATE = PitState

    def reset(self) -> None:
        """The chip has no reset pin: power-on leaves it undefined, here stopped. Port B is cleared."""
        self.state = PitState()
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        now_ns = self._advance()
        if region == "port_b":
            value = self._port_b(now_ns)
        elif offset == CONTROL:
            value = FLOATING
        else:
            value = self.state.counters[offset].read(now_ns)
        self.drive_lines()
        return value

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        now_ns, s = self._advance(), self.state
        if region == "port_b":
            s.port_b = value & PORT_B_WRITABLE
            s.counters[2].set_gate(bool(value & PORT_B_GATE2), now_ns)
        elif offset == CONTROL:
            self._control(value, now_ns)
        else:
            s.counters[offset].write(value, now_ns)
        self.drive_lines()

    def timer(self, name: str) -> None:
        self._advance()
        self.drive_lines()

    def drive_lines(self) -> None:
        counter = self.state.counters[0]
        self.wiring.set_irq("out0", counter.mode != 0 or counter.edges_done > 0)
        self.wiring.set_timer("out0", counter.next_edge_ns())

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        """Port B, but while OUT2 is a square wave."""
        s, at_ns = self.state, self.state.counters[2].rises_once_ns()
        if at_ns is None:
            return {}
        high = s.port_b | PORT_B_OUT2
        before = s.port_b if at_ns or not s.counters[2].out(0) else high
        after = high if at_ns else before
        return {("port_b", 0): Step(before, after, at_ns, toggle=PORT_B_REFRESH, toggle_ns=REFRESH_NS)}

    def _advance(self) -> int:
        """Bring the counters up to the present; signal the edges of OUT0 that are due."""
        now_ns = self.wiring.now_ns()
        due = [counter.advance(now_ns) for counter in self.state.counters]
        if due[0]:
            self.wiring.set_irq("out0", False)
            self.wiring.set_irq("out0", True)
        return now_ns

    def _control(self, value: int, now_ns: int) -> None:
        select, access, counters = value >> SELECT_SHIFT, value >> 4 & 3, self.state.counters
        if select == SELECT_READ_BACK:
            for n, counter in enumerate(counters):
                if value & READ_BACK_COUNTER_0 << n:
                    if not value & READ_BACK_NO_COUNT:
                        counter.latch_count(now_ns)
                    if not value & READ_BACK_NO_STATUS:
                        counter.latch_status(now_ns)
        elif access == 0:
            counters[select].latch_count(now_ns)
        else:
            counters[select].program(access, value >> 1 & 7, bool(value & 1))

    def _port_b(self, now_ns: int) -> int:
        refresh = PORT_B_REFRESH if now_ns // REFRESH_NS & 1 else 0
        out2 = PORT_B_OUT2 if self.state.counters[2].out(now_ns) else 0
        return self.state.port_b | refresh | out2

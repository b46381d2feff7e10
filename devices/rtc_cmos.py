"""MC146818 real-time clock and 64 bytes of CMOS RAM, extended to 128 as in later PCs.

Reference: Motorola MC146818 data sheet, ADI-856 (1984), [section]; contents of the RAM: IBM PC/AT Technical
Reference, "CMOS RAM addresses"; memory sizes and the century where SeaBIOS and ACPI tables have them.
The clock counts only while someone looks: time, flags and the next interrupt are computed from the time of
the last update. Wall-clock time enters once, as a setting; the host's later corrections are not followed.
Left out: daylight saving (DSE is stored), square-wave output, crystals other than 32.768 kHz, NMI (its mask
bit in port 0x70 is stored). A clock that is set to no valid time stands still (undefined in the data sheet).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar

from devices.base import Device, DeviceState, PortRange
from devices.rtc_calendar import Calendar, alarm_delay

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
SECOND, MINUTE, HOUR, CENTURY = 0x00, 0x02, 0x04, 0x32
CLOCK_REGISTERS = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY)
A_UIP, A_DIVIDER, A_DIVIDER_RUNS, A_RATE = 0x80, 0x70, 0x20, 0x0F
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_DM, B_24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10  # PF, AF, UF stand where PIE, AIE, UIE stand in B
D_VRT = 0x80
INDEX_NMI_MASK, INDEX = 0x80, 0x7F
FLOATING = 0xFF  # port 0x70 is write-only
NS = 1_000_000_000
UIP_BEFORE_UPDATE_NS = 244_000 + 1_984_000  # t_BUC and t_UC: it is up until the update is done [table 6]
FIRST_UPDATE_NS = 500_000_000  # after the divider is released [register A, DV]
RATE_FASTEST_HZ = 32_768

EQUIPMENT, BASE_KIB, EXTENDED_KIB, EXTENDED_KIB_2, ABOVE_16M = 0x14, 0x15, 0x17, 0x30, 0x34
EQUIPMENT_FPU = 0x02
CHECKSUM, CHECKSUMMED = 0x2E, slice(0x10, 0x2E)
EXTENDED_KIB_MAX = 63 << 10
ABOVE_16M_UNIT_KIB = 64


def host_wall_offset_ns() -> int:
    return time.time_ns() - time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class RtcSettings:
    base_kib: int = 640
    extended_kib: int = 0  # memory above 1 MiB
    wall_offset_ns: int = field(default_factory=host_wall_offset_ns)  # Unix time minus the machine's now_ns()


@dataclass(slots=True)
class RtcState(DeviceState):
    VERSION: ClassVar[int] = 1
    index: int = 0
    nmi_masked: bool = False
    cells: list[int] = field(default_factory=lambda: [0] * 128)  # C is kept as PF, AF, UF only
    update_ns: int = 0  # when the clock registers were last brought forward
    chain_ns: int = 0  # since when the divider chain runs
    periods_done: int = 0  # periodic edges since chain_ns that are in PF already


class RtcCmos(Device[RtcState]):
    NAME = "rtc_cmos"
    PORTS = (PortRange("regs", length=2, posted=frozenset({0, 1}), names={0: "INDEX", 1: "DATA"}),)
    IRQS = ("irq",)
    SETTINGS = RtcSettings
    STATE = RtcState

    def reset(self) -> None:
        """RESET clears the interrupt enables and flags; time and RAM have a battery [RESET]."""
        if not hasattr(self, "state"):
            self.state = self._power_on()
        self._advance()
        cells = self.state.cells
        cells[B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
        cells[C] = 0
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        if offset == 0:
            return FLOATING
        now_ns, s = self._advance(), self.state
        match s.index:
            case 0x0A:
                value = s.cells[A] | (A_UIP if self._update_in_progress(now_ns) else 0)
            case 0x0C:
                value = s.cells[C] | (C_IRQF if self._irqf() else 0)
                s.cells[C] = 0
            case index:
                value = s.cells[index]
        self.drive_lines()
        return value

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        s = self.state
        if offset == 0:
            s.index, s.nmi_masked = value & INDEX, bool(value & INDEX_NMI_MASK)
            return
        now_ns = self._advance()
        match s.index:
            case 0x0A:
                self._write_a(value & ~A_UIP, now_ns)
            case 0x0B:
                s.cells[B] = value & ~B_UIE if value & B_SET else value  # SET clears UIE [register B]
            case 0x0C | 0x0D:
                pass  # read-only
            case index:
                s.cells[index] = value
        self.drive_lines()

    def timer(self, name: str) -> None:
        self._advance()
        self.drive_lines()

    def drive_lines(self) -> None:
        irq = self._irqf()
        self.wiring.set_irq("irq", irq)
        self.wiring.set_timer("irq", None if irq else self._next_interrupt_ns())

    def _write_a(self, value: int, now_ns: int) -> None:
        s = self.state
        released = not self._divider_runs() and value & A_DIVIDER == A_DIVIDER_RUNS
        s.cells[A] = value
        if released:
            s.chain_ns, s.update_ns = now_ns, now_ns - (NS - FIRST_UPDATE_NS)
        s.periods_done = self._periods(now_ns)

    def _advance(self) -> int:
        """Bring clock and flags up to the present; returns the present."""
        now_ns, s = self.wiring.now_ns(), self.state
        if not self._divider_runs():
            return now_ns
        periods = self._periods(now_ns)
        if periods > s.periods_done:
            s.cells[C] |= C_PF
            s.periods_done = periods
        seconds = (now_ns - s.update_ns) // NS
        if seconds <= 0:
            return now_ns
        s.update_ns += seconds * NS
        if s.cells[B] & B_SET:  # no update cycles [register B]
            return now_ns
        s.cells[C] |= C_UF
        alarm = self._alarm_delay()
        if alarm is not None and alarm <= seconds:
            s.cells[C] |= C_AF
        calendar = self._calendar()
        later = calendar.later(seconds) if calendar else None
        if later:
            for register, value in zip(CLOCK_REGISTERS, later.registers(s.cells[B]), strict=True):
                s.cells[register] = value
        return now_ns

    def _next_interrupt_ns(self) -> int | None:
        """When the first enabled interrupt whose flag isn't set comes."""
        s = self.state
        if not self._divider_runs():
            return None
        times = []
        if s.cells[B] & B_PIE and self._rate_hz():
            times.append(s.chain_ns - -(s.periods_done + 1) * NS // self._rate_hz())
        if not s.cells[B] & B_SET:
            if s.cells[B] & B_UIE:
                times.append(s.update_ns + NS)
            alarm = self._alarm_delay() if s.cells[B] & B_AIE else None
            if alarm is not None:
                times.append(s.update_ns + alarm * NS)
        return min(times, default=None)

    def _irqf(self) -> bool:
        cells = self.state.cells
        return bool(cells[C] & cells[B] & (C_PF | C_AF | C_UF))

    def _divider_runs(self) -> bool:
        return self.state.cells[A] & A_DIVIDER == A_DIVIDER_RUNS

    def _update_in_progress(self, now_ns: int) -> bool:
        s = self.state
        if s.cells[B] & B_SET or not self._divider_runs():
            return False
        return s.update_ns + NS - now_ns <= UIP_BEFORE_UPDATE_NS

    def _rate_hz(self) -> int:
        """Periodic rate, 0 = none [table 5]."""
        select = self.state.cells[A] & A_RATE
        if select == 0:
            return 0
        return RATE_FASTEST_HZ >> (select + 6 if select < 3 else select - 1)

    def _periods(self, now_ns: int) -> int:
        return (now_ns - self.state.chain_ns) * self._rate_hz() // NS

    def _calendar(self) -> Calendar | None:
        cells = self.state.cells
        return Calendar.of([cells[register] for register in CLOCK_REGISTERS], cells[B])

    def _alarm_delay(self) -> int | None:
        cells, calendar = self.state.cells, self._calendar()
        if calendar is None:
            return None
        wanted = cells[HOUR + 1], cells[MINUTE + 1], cells[SECOND + 1]
        return alarm_delay(calendar, wanted, cells[B])

    def _power_on(self) -> RtcState:
        """As a machine's firmware leaves it: the time from the settings, 24 hours, BCD."""
        s, now_ns = RtcState(), self.wiring.now_ns()
        wall_ns = now_ns + self.settings.wall_offset_ns
        s.update_ns = s.chain_ns = now_ns - wall_ns % NS
        s.cells[A], s.cells[B], s.cells[D] = A_DIVIDER_RUNS | 0x6, B_24H, D_VRT
        s.periods_done = (now_ns - s.chain_ns) * (RATE_FASTEST_HZ >> 5) // NS
        wall = datetime.fromtimestamp(wall_ns // NS, UTC).replace(tzinfo=None)
        for register, value in zip(CLOCK_REGISTERS, Calendar.at(wall).registers(B_24H), strict=True):
            s.cells[register] = value
        self._store_equipment(s.cells)
        return s

    def _store_equipment(self, cells: list[int]) -> None:
        base, extended = self.settings.base_kib, self.settings.extended_kib
        above_16m = max(extended - (15 << 10), 0) // ABOVE_16M_UNIT_KIB
        words = {
            BASE_KIB: base,
            EXTENDED_KIB: min(extended, EXTENDED_KIB_MAX),
            EXTENDED_KIB_2: min(extended, EXTENDED_KIB_MAX),
            ABOVE_16M: min(above_16m, 0xFFFF),
        }
        for cell, word in words.items():
            cells[cell], cells[cell + 1] = word & 0xFF, word >> 8 & 0xFF
        cells[EQUIPMENT] = EQUIPMENT_FPU
        checksum = sum(cells[CHECKSUMMED])
        cells[CHECKSUM], cells[CHECKSUM + 1] = checksum >> 8 & 0xFF, checksum & 0xFF

"""ACPI fixed hardware: power-management timer, PM1 event and control registers, reset register.

Reference: ACPI Specification 6.4, 4.8 (fixed hardware), [section]. One block of 16 ports:
  0 PM1_STS, 2 PM1_EN, 4 PM1_CNT, 8 PM_TMR, 12 reset register (write 1)
The machine is in ACPI mode from the start: SCI_EN is always set, there is no SMI command port. The timer's
status bit is computed from the time of the access, so that nothing runs while its interrupt is disabled.
Left out: sleep states but S5 (refused, with a log event); GPE blocks, bus-master and C-state registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from devices.base import Channel, Counter, Device, DeviceState, MirrorValue, PortRange

STATUS, ENABLE, CONTROL, TIMER, RESET, LENGTH = 0, 2, 4, 8, 12, 16
TIMER_WIDTH = 4
TIMER_HZ = 3_579_545  # [4.8.2.1]
STS_TMR, STS_GBL, STS_PWRBTN, STS_SLPBTN, STS_RTC, STS_WAK = 0x0001, 0x0020, 0x0100, 0x0200, 0x0400, 0x8000
STS_USED = STS_TMR | STS_GBL | STS_PWRBTN | STS_SLPBTN | STS_RTC | STS_WAK
EN_USED = STS_TMR | STS_GBL | STS_PWRBTN | STS_SLPBTN | STS_RTC  # each enables the status bit of its place
CNT_SCI_EN, CNT_GBL_RLS, CNT_SLP_TYP_SHIFT, CNT_SLP_TYP, CNT_SLP_EN = 0x0001, 0x0004, 10, 0x1C00, 0x2000
CNT_KEPT = 0x0002 | CNT_SLP_TYP  # BM_RLD and SLP_TYP; GBL_RLS and SLP_EN read as 0 [table 4.13]
SLP_TYP_S5 = 5  # the launcher's DSDT says it in _S5_
RESET_VALUE = 1
NAMES = {STATUS: "PM1_STS", ENABLE: "PM1_EN", CONTROL: "PM1_CNT", TIMER: "PM_TMR", RESET: "RESET_REG"}
BUTTONS = {"p": STS_PWRBTN, "s": STS_SLPBTN}
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class AcpiPmSettings:
    timer_bits: Literal[24, 32] = 32  # the FADT's TMR_VAL_EXT says the same
    backend: Literal["console", "log", "null"] = "null"  # takes button presses: p power, s sleep


@dataclass(slots=True)
class AcpiPmState(DeviceState):
    VERSION: ClassVar[int] = 1
    base_ns: int = 0  # when the timer was 0
    carries_done: int = 0  # changes of the timer's highest bit that are in TMR_STS already
    status: int = 0
    enable: int = 0
    control: int = 0


class AcpiPm(Device[AcpiPmState]):
    NAME = "acpi_pm"
    PORTS = (
        PortRange(
            "pm", length=LENGTH, widths=(1, 2, 4), mirrored=frozenset(range(TIMER, TIMER + 4)), names=NAMES
        ),
    )
    IRQS = ("sci",)
    CHANNELS = (Channel("buttons-out", "buttons"),)  # nothing is sent
    SETTINGS = AcpiPmSettings
    STATE = AcpiPmState

    def reset(self) -> None:
        self.state = AcpiPmState(base_ns=self.wiring.now_ns())
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        self._advance()
        self.drive_lines()
        registers = self._registers()
        return int.from_bytes(registers[offset : offset + width], "little")

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        """Byte by byte: bytes of a register that aren't written stay as they are."""
        self._advance()
        for place in range(width):
            self._write_byte(offset + place, value >> 8 * place & 0xFF)
        self.drive_lines()

    def room(self, channel: str) -> int:
        return 1

    def receive(self, channel: str, data: bytes) -> None:
        for letter in data.decode("latin-1"):
            self.state.status |= BUTTONS.get(letter, 0)
        self.drive_lines()

    def timer(self, name: str) -> None:
        self._advance()
        self.drive_lines()

    def drive_lines(self) -> None:
        s = self.state
        self.wiring.set_irq("sci", bool(s.status & s.enable & EN_USED))  # [4.8.3.1]
        waits = s.enable & STS_TMR and not s.status & STS_TMR
        self.wiring.set_timer("carry", self._next_carry_ns() if waits else None)

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        return {("pm", TIMER): Counter(self.state.base_ns, TIMER_HZ, (1 << self._bits()) - 1, TIMER_WIDTH)}

    def _registers(self) -> bytes:
        s = self.state
        timer = self._ticks() & (1 << self._bits()) - 1
        words = ((s.status, 2), (s.enable, 2), (s.control | CNT_SCI_EN, 4), (timer, TIMER_WIDTH), (0, 4))
        return b"".join(word.to_bytes(size, "little") for word, size in words)

    def _write_byte(self, offset: int, value: int) -> None:
        s, shift = self.state, 8 * (offset & 1)
        kept, word = ~(0xFF << shift), value << shift
        match offset & ~1:
            case 0:
                s.status &= ~word  # a 1 clears [4.8.3.1.1]
            case 2:
                s.enable = (s.enable & kept | word) & EN_USED
            case 4:
                s.control = (s.control & kept | word) & CNT_KEPT
                if word & CNT_SLP_EN:
                    self._sleep()
            case _ if offset == RESET and value == RESET_VALUE:  # [4.8.3.6]
                self.wiring.event("reset", "ACPI reset register")
            case _:
                pass  # the timer is read-only

    def _sleep(self) -> None:
        kind = (self.state.control & CNT_SLP_TYP) >> CNT_SLP_TYP_SHIFT
        if kind == SLP_TYP_S5:
            self.wiring.event("poweroff", "ACPI S5")
        else:
            self.wiring.event("log", f"ACPI sleep type {kind} is not there: only {SLP_TYP_S5}, S5")

    def _advance(self) -> None:
        """TMR_STS: set whenever the timer's highest bit changes [4.8.3.1.1]."""
        s, carries = self.state, self._carries()
        if carries > s.carries_done:
            s.status, s.carries_done = s.status | STS_TMR, carries

    def _bits(self) -> int:
        bits: int = self.settings.timer_bits
        return bits

    def _ticks(self) -> int:
        return (self.wiring.now_ns() - self.state.base_ns) * TIMER_HZ // NS

    def _carries(self) -> int:
        return self._ticks() >> self._bits() - 1

    def _next_carry_ns(self) -> int:
        ticks = self.state.carries_done + 1 << self._bits() - 1
        return self.state.base_ns - -ticks * NS // TIMER_HZ

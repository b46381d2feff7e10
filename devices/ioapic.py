"""I/O APIC with 24 inputs.

Reference: Intel 82093AA data sheet, 290566-001 (May 1996), [section]. Messages go to the CPU nodes as they
stand in the redirection table; who is addressed, and which CPU of lowest priority, they decide.
Left out: the APIC bus with its arbitration (messages are delivered at once, so "delivery status" reads idle),
pin polarity (lines are active high inside this machine, the bit is stored), the EOI register of later parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from devices.base import ApicMessage, Device, DeviceState, MmioRange

PINS = 24
REGISTER_SELECT, WINDOW = 0x00, 0x10  # [3.1]
ID, TABLE = 0x00, 0x10
PART = 0x11  # the 82093AA's version
ID_SHIFT, ID_MASK, MAX_ENTRY_SHIFT = 24, 0x0F00_0000, 16
VECTOR, DELIVERY_SHIFT, DELIVERY = 0xFF, 8, 0x0700  # [3.2.4]
LOGICAL_SHIFT, LOGICAL, POLARITY, REMOTE_IRR = 11, 0x0800, 0x2000, 0x4000
LEVEL, MASKED = 0x8000, 0x0001_0000
LOW_WRITABLE = VECTOR | DELIVERY | LOGICAL | POLARITY | LEVEL | MASKED
DEST_SHIFT, HIGH_WRITABLE = 24, 0xFF00_0000
DELIVERY_FIXED, DELIVERY_LOWEST = 0, 1


@dataclass(frozen=True, slots=True)
class IoApicSettings:
    irq0_pin: int = 2  # the 8254's output; a PC has it here, and the 8259's output at pin 0
    id: int = 1  # as firmware leaves it, and as the MADT or MP table says


@dataclass(slots=True)
class IoApicState(DeviceState):
    VERSION: ClassVar[int] = 2
    id: int = 0  # in bits 27 to 24
    select: int = 0
    lines: int = 0  # bit n: the level of pin n
    # the table, by pin, as the two registers of an entry hold it
    low: list[int] = field(default_factory=lambda: [MASKED] * PINS)
    high: list[int] = field(default_factory=lambda: [0] * PINS)


def _in_two_lists(fields: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had a record for each entry."""
    kept = {name: value for name, value in fields.items() if name != "table"}
    return {**kept, **{half: [entry[half] for entry in fields["table"]] for half in ("low", "high")}}


class IoApic(Device[IoApicState]):
    NAME = "ioapic"
    MMIO = (
        MmioRange(
            "regs",
            length=0x1000,  # its page; what isn't one of the two registers reads 0
            widths=(4,),
            posted=frozenset({REGISTER_SELECT, WINDOW}),
            prompt=frozenset({WINDOW}),  # unmasking may deliver an interrupt
            names={REGISTER_SELECT: "IOREGSEL", WINDOW: "IOWIN"},
        ),
    )
    CONTROLLER = True
    SETTINGS = IoApicSettings
    STATE = IoApicState
    UPGRADES = {1: _in_two_lists}

    def reset(self) -> None:
        lines = self.state.lines if hasattr(self, "state") else 0
        self.state = IoApicState(id=self.settings.id << ID_SHIFT & ID_MASK, lines=lines)
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        if offset == REGISTER_SELECT:
            return self.state.select
        return self._read_register(self.state.select) if offset == WINDOW else 0

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        if offset == REGISTER_SELECT:
            self.state.select = value & 0xFF
        elif offset == WINDOW:
            self._write_register(self.state.select, value)

    def line_in(self, irq: int, level: bool) -> None:
        pin = self._pin(irq)
        if pin is None:
            return
        s, bit = self.state, 1 << pin
        rises = level and not s.lines & bit
        s.lines = s.lines | bit if level else s.lines & ~bit
        if rises and not s.low[pin] & LEVEL:
            self._deliver_edge(pin)
        self._deliver_level(pin)

    def eoi(self, vector: int) -> None:
        """The EOI message clears remote IRR; a line that is still active interrupts again [3.2.4]."""
        low = self.state.low
        for pin, entry in enumerate(low):
            if entry & REMOTE_IRR and entry & VECTOR == vector:
                low[pin] = entry & ~REMOTE_IRR
                self._deliver_level(pin)

    def drive_lines(self) -> None:
        pass  # messages are no levels: what was sent stays sent

    def _pin(self, irq: int) -> int | None:
        """The input of an ISA IRQ; None for the one whose place IRQ 0 has taken."""
        irq0_pin: int = self.settings.irq0_pin
        if irq == 0:
            return irq0_pin
        return None if irq == irq0_pin else irq

    def _read_register(self, index: int) -> int:
        s = self.state
        match index:
            case 0x00 | 0x02:  # the arbitration ID is loaded with the ID [3.2.3]
                return s.id
            case 0x01:
                return PINS - 1 << MAX_ENTRY_SHIFT | PART
            case _ if TABLE <= index < TABLE + 2 * PINS:
                return (s.high if index & 1 else s.low)[index - TABLE >> 1]
            case _:
                return 0

    def _write_register(self, index: int, value: int) -> None:
        s = self.state
        if index == ID:
            s.id = value & ID_MASK
        elif TABLE <= index < TABLE + 2 * PINS:
            pin = index - TABLE >> 1
            if index & 1:
                s.high[pin] = value & HIGH_WRITABLE
                return
            kept = s.low[pin] & REMOTE_IRR if value & LEVEL else 0  # remote IRR is of level mode only
            s.low[pin] = value & LOW_WRITABLE | kept
            self._deliver_level(pin)

    def _deliver_edge(self, pin: int) -> None:
        if not self.state.low[pin] & MASKED:  # an edge on a masked pin is lost [3.2.4, interrupt mask]
            self._send(pin)

    def _deliver_level(self, pin: int) -> None:
        """A level-triggered pin that is active, unmasked and not in service interrupts."""
        s = self.state
        if s.lines & 1 << pin and s.low[pin] & (LEVEL | MASKED | REMOTE_IRR) == LEVEL:
            if s.low[pin] >> DELIVERY_SHIFT & 7 in (DELIVERY_FIXED, DELIVERY_LOWEST):
                s.low[pin] |= REMOTE_IRR
            self._send(pin)

    def _send(self, pin: int) -> None:
        low = self.state.low[pin]
        self.wiring.mark("irq", 0 if pin == self.settings.irq0_pin else pin)
        self.wiring.apic_message(
            ApicMessage(
                vector=low & VECTOR,
                delivery_mode=(low & DELIVERY) >> DELIVERY_SHIFT,
                dest=self.state.high[pin] >> DEST_SHIFT,
                dest_mode=(low & LOGICAL) >> LOGICAL_SHIFT,
                trigger_level=bool(low & LEVEL),
                level_assert=True,
            )
        )

"""The local APIC's state, register offsets and bits.

Source: Intel SDM vol. 3A chapter 11, as in lapic.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar

BASE_RESET = 0xFEE0_0900  # enabled, boot processor [11.4.4]
BASE_BSP, BASE_ENABLE, BASE_ADDRESS = 0x100, 0x800, 0xFFFF_F000
BASE_DEFINED = BASE_BSP | BASE_ENABLE | BASE_ADDRESS
VERSION_REGISTER = 0x0005_0014  # highest LVT entry 5, version 14h [11.4.8]

TIMER, THERMAL, COUNTER, LINT0, LINT1, ERROR = range(6)  # LVT entries, in order of their registers
LVT_MASKED, LVT_LEVEL, LVT_TIMER_MODE = 0x1_0000, 0x8000, 0x6_0000
LVT_WRITABLE = (0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF)
TIMER_PERIODIC, TIMER_TSC_DEADLINE = 0x2_0000, 0x4_0000
SVR_ENABLE, SVR_WRITABLE = 0x100, 0x3FF
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ILLEGAL_REGISTER = 0x20, 0x40, 0x80  # [11.5.3]
ICR_WRITABLE = 0x000C_CFFF
DIVISORS = (2, 4, 8, 16, 32, 64, 128, 1)  # by divide-configuration bits 3, 1, 0 [11.5.4]
BROADCAST = 0xFF
SECOND = 1_000_000_000


class Mode(IntEnum):
    """Delivery modes [11.5.1]."""

    FIXED, LOWEST_PRIORITY, SMI, RESERVED, NMI, INIT, STARTUP, EXTINT = range(8)


class Reg(IntEnum):
    """Register offsets [table 11-1]; ISR, TMR and IRR are eight registers each."""

    ID, VERSION, TPR, APR, PPR, EOI, RRD = 0x020, 0x030, 0x080, 0x090, 0x0A0, 0x0B0, 0x0C0
    LDR, DFR, SVR, ISR, TMR, IRR, ESR = 0x0D0, 0x0E0, 0x0F0, 0x100, 0x180, 0x200, 0x280
    ICR_LOW, ICR_HIGH, LVT_TIMER, LVT_ERROR = 0x300, 0x310, 0x320, 0x370
    INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0


class LapicStateMismatch(ValueError):
    """A saved state does not fit LapicState."""


@dataclass(slots=True)
class LapicState:
    """Guest-visible state after reset [11.4.7]; isr, irr and tmr have bit n for vector n."""

    VERSION: ClassVar[int] = 1
    WIDE: ClassVar[tuple[str, ...]] = ("isr", "irr", "tmr")  # too wide for msgpack: saved as bytes

    id: int
    base: int = BASE_RESET
    tpr: int = 0
    ldr: int = 0
    dfr: int = 0xFFFF_FFFF
    svr: int = 0xFF
    isr: int = 0
    irr: int = 0
    tmr: int = 0
    esr: int = 0
    errors: int = 0  # what the next write of ESR shows
    icr_low: int = 0
    icr_high: int = 0
    lvt: list[int] = field(default_factory=lambda: [LVT_MASKED] * 6)
    initial_count: int = 0
    divide: int = 0
    base_count: int = 0  # the current count at base_ns, 0 when the counter is stopped
    base_ns: int = 0
    deadline_ns: int | None = None  # when the timer expires next
    tsc_deadline: int = 0
    lint: list[bool] = field(default_factory=lambda: [False, False])
    nmi_pending: bool = False
    extint_pending: bool = False  # from a message; LINT0's is its level

    def dump(self) -> dict[str, Any]:
        """Plain data that msgpack carries."""
        values = asdict(self)
        for name in self.WIDE:
            values[name] = values[name].to_bytes(32, "little")
        return {"kind": type(self).__name__, "version": self.VERSION, "fields": values}

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> LapicState:
        """The inverse of dump; LapicStateMismatch if it doesn't fit."""
        values = dict(saved["fields"])
        if saved["version"] != cls.VERSION or set(values) != {f.name for f in fields(cls)}:
            raise LapicStateMismatch(f"saved state {saved!r} does not fit {cls.__name__}")
        for name in cls.WIDE:
            values[name] = int.from_bytes(values[name], "little")
        return cls(**values)

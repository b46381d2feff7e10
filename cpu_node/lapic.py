"""Local APIC: pure logic; time comes in through `now_ns`, interrupts go out when the CPU asks.

Source: Intel SDM vol. 3A chapter 11 ("Advanced Programmable Interrupt Controller", chapter 10 before 2023).
Sections in brackets. Version 14h, six LVT entries, xAPIC mode; one-shot, periodic and TSC-deadline timer.
Left out: x2APIC, INIT and SIPI (one CPU has nobody to start; both are ignored), SMI, focus checking,
the arbitration registers (they read as zero), level-triggered LINT1. IPIs to other APIC ids vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpu_node.lapic_state import (
    BASE_ADDRESS,
    BASE_DEFINED,
    BASE_ENABLE,
    BROADCAST,
    DIVISORS,
    ERROR,
    ESR_ILLEGAL_REGISTER,
    ESR_RECEIVE_ILLEGAL,
    ESR_SEND_ILLEGAL,
    ICR_WRITABLE,
    LINT0,
    LINT1,
    LVT_LEVEL,
    LVT_MASKED,
    LVT_TIMER_MODE,
    LVT_WRITABLE,
    SECOND,
    SVR_ENABLE,
    SVR_WRITABLE,
    TIMER,
    TIMER_PERIODIC,
    TIMER_TSC_DEADLINE,
    VERSION_REGISTER,
    LapicState,
    Mode,
    Reg,
)


class LocalApic:
    def __init__(self, apic_id: int, crystal_hz: int, tsc_hz: int, now_ns: Callable[[], int]) -> None:
        """`crystal_hz` is the timer's input clock before the divider, as in CPUID leaf 15h."""
        self.apic_id, self.crystal_hz, self.tsc_hz, self.now_ns = apic_id, crystal_hz, tsc_hz, now_ns
        self.on_eoi: Callable[[int], None] = lambda vector: None  # which interrupt has ended
        self.reset()

    def reset(self) -> None:
        """Power-up and RESET [11.4.7.1]."""
        self.state = LapicState(id=self.apic_id)

    def virtual_wire(self) -> None:
        """What firmware leaves behind: the 8259 through LINT0, NMI on LINT1 [MP specification 3.6.2.2]."""
        s = self.state
        s.svr = SVR_ENABLE | 0x0F
        s.lvt[LINT0], s.lvt[LINT1] = Mode.EXTINT << 8, Mode.NMI << 8

    def save(self) -> dict[str, Any]:
        """The state as plain data that msgpack carries."""
        return self.state.dump()

    def load(self, saved: dict[str, Any]) -> None:
        """Take a saved state; LapicStateMismatch if it doesn't fit."""
        self.state = LapicState.restore(saved)

    # The CPU's side

    @property
    def base(self) -> int:
        """IA32_APIC_BASE."""
        return self.state.base

    @property
    def enabled(self) -> bool:
        """Globally enabled: the registers are decoded and CPUID shows the APIC."""
        return bool(self.state.base & BASE_ENABLE)

    @property
    def mmio_base(self) -> int:
        return self.state.base & BASE_ADDRESS

    def set_base(self, value: int) -> bool:
        """WRMSR IA32_APIC_BASE; False if reserved bits are set. Disabling resets the rest [11.4.7.2]."""
        if value & ~BASE_DEFINED:
            return False
        s = self.state
        if s.base & BASE_ENABLE and not value & BASE_ENABLE:
            self.state = LapicState(id=self.apic_id, lint=s.lint)
        self.state.base = value
        return True

    def pending_vector(self) -> int | None:
        """The interrupt to deliver if IF allows, or None."""
        s = self.state
        if not s.irr:
            return None
        vector = s.irr.bit_length() - 1
        return vector if vector >> 4 > self._ppr() >> 4 else None

    def acknowledge(self) -> int:
        """The CPU takes the pending interrupt: IRR to ISR; the spurious vector if it went away [11.9]."""
        s, vector = self.state, self.pending_vector()
        if vector is None:
            return s.svr & 0xFF
        s.irr &= ~(1 << vector)
        s.isr |= 1 << vector
        return vector

    def intr_pending(self) -> bool:
        """An interrupt that the 8259 must be asked for (INTA): LINT0 as ExtINT or INTR, or a message."""
        s = self.state
        if not s.lint[0]:
            return s.extint_pending
        if not s.base & BASE_ENABLE:
            return True
        return s.lvt[LINT0] & (LVT_MASKED | 0x700) == Mode.EXTINT << 8 or s.extint_pending

    def acknowledge_intr(self) -> None:
        """The 8259 is being asked: forget a message's request (LINT0 is a level)."""
        self.state.extint_pending = False

    def take_nmi(self) -> bool:
        """Whether an NMI is pending; it no longer is afterwards."""
        pending, self.state.nmi_pending = self.state.nmi_pending, False
        return pending

    # Inputs

    def set_lint(self, pin: int, level: bool) -> None:
        """LINT0 (the 8259's INTR) or LINT1 (NMI) changes."""
        s = self.state
        rising, s.lint[pin] = level and not s.lint[pin], level
        if not rising:
            return
        if s.base & BASE_ENABLE:
            self._local(LINT0 + pin)
        elif pin == 1:
            s.nmi_pending = True

    def accept(
        self,
        vector: int,
        mode: int,
        destination: int = BROADCAST,
        logical: bool = False,
        level_triggered: bool = False,
        level_assert: bool = True,
    ) -> bool:
        """A message from the I/O APIC; False if it isn't for this APIC or isn't taken."""
        s = self.state
        if not s.base & BASE_ENABLE or not self._matches(destination, logical):
            return False
        if mode in (Mode.FIXED, Mode.LOWEST_PRIORITY):
            if not s.svr & SVR_ENABLE or (level_triggered and not level_assert):
                return False
            return self._request(vector, level_triggered)
        if mode == Mode.NMI:
            s.nmi_pending = True
        elif mode == Mode.EXTINT:
            s.extint_pending = True
        else:
            return False
        return True

    def tick(self, now_ns: int) -> None:
        """Let the timer expire if its time has come; missed periods count once."""
        s = self.state
        if s.deadline_ns is None or now_ns < s.deadline_ns:
            return
        s.tsc_deadline = 0
        if s.lvt[TIMER] & LVT_TIMER_MODE == TIMER_PERIODIC and s.initial_count:
            s.base_count, s.base_ns = self._elapse(now_ns)
            s.deadline_ns = s.base_ns + self._duration(s.base_count)
        else:
            s.base_count, s.deadline_ns = 0, None
        self._local(TIMER)

    def next_deadline_ns(self) -> int | None:
        """When tick() has work to do; None while nothing would come of it."""
        s = self.state
        return None if s.lvt[TIMER] & LVT_MASKED else s.deadline_ns

    # Registers

    def read(self, offset: int) -> int:
        """A 32-bit read at an offset into the page."""
        s, reg = self.state, offset & 0xFF0
        match reg:
            case Reg.ID:
                return s.id << 24
            case Reg.VERSION:
                return VERSION_REGISTER
            case Reg.TPR:
                return s.tpr
            case Reg.PPR:
                return self._ppr()
            case Reg.APR | Reg.RRD | Reg.EOI:
                return 0
            case Reg.LDR:
                return s.ldr
            case Reg.DFR:
                return s.dfr
            case Reg.SVR:
                return s.svr
            case Reg.ESR:
                return s.esr
            case Reg.ICR_LOW:
                return s.icr_low
            case Reg.ICR_HIGH:
                return s.icr_high
            case Reg.INITIAL_COUNT:
                return s.initial_count
            case Reg.CURRENT_COUNT:
                return self._current_count()
            case Reg.DIVIDE:
                return s.divide
        if Reg.LVT_TIMER <= reg <= Reg.LVT_ERROR:
            return s.lvt[(reg - Reg.LVT_TIMER) >> 4]
        if Reg.ISR <= reg < Reg.ESR:
            bits = (s.isr, s.tmr, s.irr)[(reg - Reg.ISR) >> 7]
            return bits >> ((reg & 0x70) << 1) & 0xFFFFFFFF
        self._error(ESR_ILLEGAL_REGISTER)
        return 0

    def write(self, offset: int, value: int) -> int | None:
        """A 32-bit write. Writing EOI returns the vector to broadcast to the I/O APICs, or None [11.8.5]."""
        s, reg = self.state, offset & 0xFF0
        match reg:
            case Reg.EOI:
                return self._eoi()
            case Reg.TPR:
                s.tpr = value & 0xFF
            case Reg.INITIAL_COUNT:
                self._start(value)
            case Reg.ICR_LOW:
                s.icr_low = value & ICR_WRITABLE
                self._send()
            case Reg.ICR_HIGH:
                s.icr_high = value & 0xFF000000
            case Reg.ID:
                s.id = value >> 24
            case Reg.LDR:
                s.ldr = value & 0xFF000000
            case Reg.DFR:
                s.dfr = value | 0x0FFFFFFF
            case Reg.SVR:
                s.svr = value & SVR_WRITABLE
                if not value & SVR_ENABLE:
                    s.lvt = [entry | LVT_MASKED for entry in s.lvt]  # [11.4.7.2]
            case Reg.ESR:
                s.esr, s.errors = s.errors, 0
            case Reg.DIVIDE:
                self._rebase(value & 0xB)
            case Reg.VERSION | Reg.APR | Reg.PPR | Reg.RRD | Reg.CURRENT_COUNT:
                pass  # read-only
            case _ if Reg.LVT_TIMER <= reg <= Reg.LVT_ERROR:
                self._write_lvt((reg - Reg.LVT_TIMER) >> 4, value)
            case _ if not Reg.ISR <= reg < Reg.ESR:  # ISR, TMR and IRR are read-only
                self._error(ESR_ILLEGAL_REGISTER)
        return None

    def read_tsc_deadline(self) -> int:
        """RDMSR IA32_TSC_DEADLINE: 0 once it has expired."""
        self.tick(self.now_ns())
        return self.state.tsc_deadline

    def set_tsc_deadline(self, value: int, tsc: int) -> None:
        """WRMSR IA32_TSC_DEADLINE at TSC value `tsc`; ignored in the other timer modes [11.5.4.1]."""
        s = self.state
        if s.lvt[TIMER] & LVT_TIMER_MODE != TIMER_TSC_DEADLINE:
            return
        s.tsc_deadline = value
        if value:
            s.deadline_ns = self.now_ns() + -(-max(0, value - tsc) * SECOND // self.tsc_hz)
        else:
            s.deadline_ns = None

    # Inside

    def _ppr(self) -> int:
        """Processor priority [11.8.3.1]."""
        s = self.state
        in_service = s.isr.bit_length() - 1 if s.isr else 0
        return s.tpr if s.tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def _request(self, vector: int, level_triggered: bool) -> bool:
        """Put a fixed interrupt into IRR and TMR."""
        s = self.state
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return False
        bit = 1 << vector
        s.irr |= bit
        s.tmr = s.tmr | bit if level_triggered else s.tmr & ~bit
        return True

    def _local(self, entry: int) -> None:
        """A local source fires [11.5.1]. ExtINT needs no latch here: intr_pending() looks at the pin."""
        s = self.state
        lvt = s.lvt[entry]
        if lvt & LVT_MASKED:
            return
        mode = lvt >> 8 & 7 if entry not in (TIMER, ERROR) else Mode.FIXED
        if mode == Mode.FIXED:
            self._request(lvt & 0xFF, entry == LINT0 and bool(lvt & LVT_LEVEL))
        elif mode == Mode.NMI:
            s.nmi_pending = True

    def _error(self, bit: int) -> None:
        s = self.state
        if not s.errors & bit:
            s.errors |= bit
            self._local(ERROR)

    def _eoi(self) -> int | None:
        s = self.state
        if not s.isr:
            return None
        vector = s.isr.bit_length() - 1
        self.on_eoi(vector)
        s.isr &= ~(1 << vector)
        if not s.tmr >> vector & 1:
            return None
        if s.lint[0] and s.lvt[LINT0] & (LVT_LEVEL | 0x7FF) == LVT_LEVEL | vector:
            self._local(LINT0)
        return vector

    def _matches(self, destination: int, logical: bool) -> bool:
        """[11.6.2]"""
        s = self.state
        if not logical:
            return destination in (s.id, BROADCAST)
        own = s.ldr >> 24
        if s.dfr >> 28 == 0xF:
            return bool(own & destination)
        return destination >> 4 in (own >> 4, 0xF) and bool(own & destination & 0xF)

    def _send(self) -> None:
        """Carry out a write of the ICR [11.6.1]; only messages to this CPU have an effect."""
        s = self.state
        low = s.icr_low
        shorthand, mode, vector = low >> 18 & 3, low >> 8 & 7, low & 0xFF
        if mode in (Mode.FIXED, Mode.LOWEST_PRIORITY) and vector < 16:
            self._error(ESR_SEND_ILLEGAL)
            return
        if shorthand == 0:
            to_self = self._matches(s.icr_high >> 24, bool(low & 0x800))
        else:
            to_self = shorthand in (1, 2)  # self, all including self
        if not to_self:
            return
        if mode in (Mode.FIXED, Mode.LOWEST_PRIORITY) and s.svr & SVR_ENABLE:
            self._request(vector, level_triggered=False)
        elif mode == Mode.NMI and shorthand == 0:
            s.nmi_pending = True

    def _write_lvt(self, entry: int, value: int) -> None:
        s = self.state
        value &= LVT_WRITABLE[entry]
        if not s.svr & SVR_ENABLE:
            value |= LVT_MASKED
        if entry == TIMER:
            self.tick(self.now_ns())  # what expired until now did so under the old setting
            if (value ^ s.lvt[TIMER]) & TIMER_TSC_DEADLINE:  # into or out of this mode: disarmed
                s.initial_count = s.base_count = s.tsc_deadline = 0
                s.deadline_ns = None
        s.lvt[entry] = value
        if entry == LINT0 and s.lint[0] and value & LVT_LEVEL:
            self._local(LINT0)

    # Timer [11.5.4]

    def _divisor(self) -> int:
        divide = self.state.divide
        return DIVISORS[divide >> 1 & 4 | divide & 3]

    def _duration(self, count: int) -> int:
        """Nanoseconds for `count` ticks, rounded up."""
        return -(-count * self._divisor() * SECOND // self.crystal_hz)

    def _start(self, count: int) -> None:
        """Write of the initial count."""
        s = self.state
        if s.lvt[TIMER] & TIMER_TSC_DEADLINE:
            return
        s.initial_count = s.base_count = count
        s.base_ns = self.now_ns()
        s.deadline_ns = s.base_ns + self._duration(count) if count else None

    def _elapse(self, now_ns: int) -> tuple[int, int]:
        """(count, when it was reached) at the last reload, or at the base if there was none since."""
        s = self.state
        ticks = (now_ns - s.base_ns) * self.crystal_hz // (self._divisor() * SECOND)
        if ticks < s.base_count or not s.initial_count:
            return s.base_count, s.base_ns
        reload = s.base_count + (ticks - s.base_count) // s.initial_count * s.initial_count
        return s.initial_count, s.base_ns + self._duration(reload)

    def _current_count(self) -> int:
        s, now = self.state, self.now_ns()
        self.tick(now)
        if not s.base_count or s.lvt[TIMER] & TIMER_TSC_DEADLINE:
            return 0
        ticks = (now - s.base_ns) * self.crystal_hz // (self._divisor() * SECOND)
        return max(0, s.base_count - ticks)

    def _rebase(self, divide: int) -> None:
        """Write of the divide configuration: a running count goes on at the new rate."""
        s = self.state
        count, s.base_ns = self._current_count(), self.now_ns()
        s.divide = divide
        if count:
            s.base_count = count
            s.deadline_ns = s.base_ns + self._duration(count)

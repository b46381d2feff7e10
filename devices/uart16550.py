"""16550A serial port.

Reference: National Semiconductor PC16550D data sheet, June 1995; [8.x] is a section of that edition (TI's
reprint numbers them 8.6.x). The PC's wiring on top: OUT2 gates INTR, and the other end of the line is a
null-modem cable, so CTS, DSR and DCD are always active.
Left out: transmission takes no time (THR and the transmitter are always empty); parity, framing and break
errors; DMA mode. The rate and the format matter for the character time-out only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Literal

from devices.base import Channel, Device, DeviceState, Latch, MirrorValue, PortRange

FIFO_DEPTH = 16
RX_TRIGGER = (1, 4, 8, 14)  # bytes, by FCR bits 7..6 [8.5]
IER_RX, IER_THRE, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_MODEM, IIR_NONE, IIR_THRE, IIR_RX, IIR_LINE, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
IIR_CAUSE, IIR_FIFOS = 0x0F, 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_KEPT = 0x01, 0x02, 0xC9
LCR_WORD_LENGTH, LCR_STOP, LCR_PARITY, LCR_DLAB = 0x03, 0x04, 0x08, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP, MCR_USED = 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F
LSR_READY, LSR_OVERRUN, LSR_TX_IDLE = 0x01, 0x02, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_TERI, MSR_DELTA_SHIFT = 0x04, 4
LOOP_WIRES = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))  # [8.8]
BIT_CLOCKS = 16
CRYSTAL_HZ = 1_843_200
TIMEOUT_CHARACTERS = 4  # [8.11 FIFO interrupt mode operation]
NS = 1_000_000_000


class Reg(IntEnum):  # the names are also those in traces, but for RBR|THR
    DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)


@dataclass(frozen=True, slots=True)
class UartSettings:
    backend: Literal["console", "log", "null"] = "console"


@dataclass(slots=True)
class UartState(DeviceState):
    VERSION: ClassVar[int] = 1
    divisor: int = 12  # 9600 baud; undefined in the data sheet, so firmware-friendly
    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    msr_delta: int = 0  # MSR bits 3..0, cleared by reading MSR [8.9]
    overrun: bool = False
    thre_latched: bool = False  # set when THR empties, cleared by reading IIR [8.6]
    timed_out: bool = False  # the character time-out interrupt is pending
    active_ns: int = 0  # when the receiver FIFO was last filled or read
    rx: list[int] = field(default_factory=list)


class Uart16550(Device[UartState]):
    """LSR is mirrored although reading it clears the overrun bit: while that bit is set, and in loopback,
    where a posted write to THR changes LSR, the mirror leaves it out and the read is synchronous.
    The same goes for MSR and its delta bits. Reading IIR takes back the interrupt of the empty transmitter,
    which the next character makes again: a latch, so that a driver that sends a long text asks nothing.
    """

    NAME = "uart16550"
    PORTS = (
        PortRange(
            "regs",
            length=8,
            posted=frozenset({Reg.DATA, Reg.IER}),
            prompt=frozenset({Reg.IER}),  # enabling the THRE interrupt raises it
            mirrored=frozenset({Reg.IER, Reg.LCR, Reg.MCR, Reg.LSR, Reg.MSR, Reg.SCR}),
            relaxed=frozenset({Reg.LCR, Reg.MCR, Reg.LSR, Reg.MSR, Reg.SCR}),
            own=frozenset({Reg.IER}),
            latched=((Reg.IIR_FCR, Reg.DATA),),
            names={int(reg): reg.name.replace("_", "|") for reg in Reg} | {0: "RBR|THR"},
        ),
    )
    IRQS = ("intr",)
    CHANNELS = (Channel("tx", "rx"),)
    SETTINGS = UartSettings
    STATE = UartState

    def reset(self) -> None:
        old = getattr(self, "state", UartState())
        self.state = UartState(divisor=old.divisor, scr=old.scr)  # reset leaves both [table I]
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        s, value = self.state, 0
        match offset, bool(s.lcr & LCR_DLAB):
            case Reg.DATA, True:
                value = s.divisor & 0xFF
            case Reg.IER, True:
                value = s.divisor >> 8
            case Reg.DATA, False:
                if s.rx:
                    value = s.rx.pop(0)
                    s.timed_out, s.active_ns = False, self.wiring.now_ns()
            case Reg.IER, False:
                value = s.ier
            case Reg.IIR_FCR, _:
                value = self._iir()
                if value & IIR_CAUSE == IIR_THRE:
                    s.thre_latched = False
            case Reg.LCR, _:
                value = s.lcr
            case Reg.MCR, _:
                value = s.mcr
            case Reg.LSR, _:
                value, s.overrun = self._lsr(), False
            case Reg.MSR, _:
                value, s.msr_delta = self._modem_lines() | s.msr_delta, 0
            case Reg.SCR, _:
                value = s.scr
        self.drive_lines()
        return value

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        s = self.state
        match offset, bool(s.lcr & LCR_DLAB):
            case Reg.DATA, True:
                s.divisor = s.divisor & 0xFF00 | value
            case Reg.IER, True:
                s.divisor = s.divisor & 0x00FF | value << 8
            case Reg.DATA, False:
                latched_before, s.thre_latched = s.thre_latched, True  # instant: THR empties
                if s.mcr & MCR_LOOP:
                    self._take(value)
                else:
                    self.wiring.send("tx", bytes([value]))
                    if latched_before:
                        return  # no line changes: the polled console's case, thousands of times in a boot
            case Reg.IER, False:
                if value & ~s.ier & IER_THRE:
                    s.thre_latched = True  # enabling while THR is empty interrupts [8.7]
                s.ier = value & 0x0F
            case Reg.IIR_FCR, _:
                if value & FCR_CLEAR_RX or (value ^ s.fcr) & FCR_ENABLE:
                    s.rx.clear()
                    s.timed_out = False
                s.fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
            case Reg.LCR, _:
                s.lcr = value
            case Reg.MCR, _:
                self._set_mcr(value & MCR_USED)
            case Reg.SCR, _:
                s.scr = value
            case ((Reg.LSR | Reg.MSR), _):
                pass  # read-only; the data sheet keeps writes to them for factory tests [8.4]
        self.drive_lines()

    def room(self, channel: str) -> int:
        if self.state.mcr & MCR_LOOP:  # loopback disconnects SIN [8.8]: the sender waits
            return 0
        return max(self._rx_depth() - len(self.state.rx), 0)

    def receive(self, channel: str, data: bytes) -> None:
        for byte in data:
            self._take(byte)
        self.drive_lines()

    def timer(self, name: str) -> None:
        self.state.timed_out = True
        self.drive_lines()

    def drive_lines(self) -> None:
        s = self.state
        out2 = s.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2  # loopback forces the output pins inactive [8.8]
        self.wiring.set_irq("intr", out2 and self._iir() & IIR_CAUSE != IIR_NONE)
        waits = s.ier & IER_RX and not s.timed_out and 0 < len(s.rx) < self._rx_trigger()
        deadline_ns = s.active_ns + TIMEOUT_CHARACTERS * self._character_ns() if waits else None
        self.wiring.set_timer("rx-timeout", deadline_ns)

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        s = self.state
        values: dict[tuple[str, int], MirrorValue] = {
            ("regs", Reg.IER): s.divisor >> 8 if s.lcr & LCR_DLAB else s.ier,
            ("regs", Reg.LCR): s.lcr,
            ("regs", Reg.MCR): s.mcr,
            ("regs", Reg.SCR): s.scr,
        }
        if not s.overrun and not s.mcr & MCR_LOOP:
            values["regs", Reg.LSR] = self._lsr()
        if not s.msr_delta:
            values["regs", Reg.MSR] = self._modem_lines()
        fifos = IIR_FIFOS if s.fcr & FCR_ENABLE else 0
        if self._cause(thre=False) == IIR_NONE:
            if not s.ier & IER_THRE:
                values["regs", Reg.IIR_FCR] = IIR_NONE | fifos
            elif not s.mcr & MCR_LOOP and not s.lcr & LCR_DLAB:  # writing DATA is sending
                values["regs", Reg.IIR_FCR] = Latch(IIR_THRE | fifos, IIR_NONE | fifos, s.thre_latched)
        return values

    def seen(self, region: str, offset: int, value: int) -> None:
        self.state.thre_latched = False
        self.drive_lines()

    def _take(self, byte: int) -> None:
        s = self.state
        if len(s.rx) >= self._rx_depth():
            s.overrun = True
            if not s.fcr & FCR_ENABLE:
                s.rx[:] = [byte]  # without FIFOs the new character destroys the old one [8.4 bit 1]
        else:
            s.rx.append(byte)
        s.active_ns = self.wiring.now_ns()

    def _set_mcr(self, value: int) -> None:
        """The modem status lines may change with it, when loopback starts, ends or is on [8.9]."""
        before = self._modem_lines()
        self.state.mcr = value
        after = self._modem_lines()
        changed = (before ^ after) >> MSR_DELTA_SHIFT & ~MSR_TERI
        ring_ended = MSR_TERI if before & ~after & MSR_RI else 0
        self.state.msr_delta |= changed | ring_ended

    def _rx_depth(self) -> int:
        return FIFO_DEPTH if self.state.fcr & FCR_ENABLE else 1

    def _rx_trigger(self) -> int:
        return RX_TRIGGER[self.state.fcr >> 6] if self.state.fcr & FCR_ENABLE else 1

    def _character_ns(self) -> int:
        s = self.state
        parity, stop = bool(s.lcr & LCR_PARITY), 2 if s.lcr & LCR_STOP else 1
        bits = 1 + 5 + (s.lcr & LCR_WORD_LENGTH) + parity + stop
        return bits * max(s.divisor, 1) * BIT_CLOCKS * NS // CRYSTAL_HZ

    def _modem_lines(self) -> int:
        """MSR bits 7..4."""
        mcr = self.state.mcr
        if mcr & MCR_LOOP:
            return sum(line for wire, line in LOOP_WIRES if mcr & wire)
        return MSR_CTS | MSR_DSR | MSR_DCD

    def _lsr(self) -> int:
        s = self.state
        return LSR_TX_IDLE | (LSR_READY if s.rx else 0) | (LSR_OVERRUN if s.overrun else 0)

    def _iir(self) -> int:
        s = self.state
        return self._cause(s.thre_latched) | (IIR_FIFOS if s.fcr & FCR_ENABLE else 0)

    def _cause(self, thre: bool) -> int:
        """The one of highest priority, computed, never stored [8.6 table IV]. `thre`: THR's latch."""
        s = self.state
        if s.ier & IER_LINE and s.overrun:
            cause = IIR_LINE
        elif s.ier & IER_RX and len(s.rx) >= self._rx_trigger():
            cause = IIR_RX
        elif s.ier & IER_RX and s.timed_out:
            cause = IIR_TIMEOUT
        elif s.ier & IER_THRE and thre:
            cause = IIR_THRE
        elif s.ier & IER_MODEM and s.msr_delta:
            cause = IIR_MODEM
        else:
            cause = IIR_NONE
        return cause

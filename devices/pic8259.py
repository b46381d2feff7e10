"""Two cascaded 8259A interrupt controllers, as in a PC/AT.

Reference: Intel 8259A data sheet, 231468-003 (December 1988), 8086 mode; [section]. ELCR (port 0x4D0, edge or
level per line): Intel 82371AB (PIIX4) data sheet, 290562-001, 4.2.6.
The slave's INT is the master's IR2. A chip's IRR is a function of its input lines: an edge-triggered request
is withdrawn when its line falls before INTA; the vector is then that of IR7 (spurious)
[edge and level triggered modes].
Left out: MCS-80/85 mode (ICW4 bit 0 is taken as set), buffered mode, ICW1's LTIM (the PC/AT's successor ELCR
decides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from devices.base import Device, DeviceState, MirrorValue, PortRange

CASCADE = 2  # the master's input that carries the slave's INT
SPURIOUS = 7
ICW1, ICW1_SINGLE, ICW1_ICW4 = 0x10, 0x02, 0x01
ICW4_AEOI, ICW4_SFNM = 0x02, 0x10
OCW3, OCW3_POLL, OCW3_RR, OCW3_RIS, OCW3_ESMM, OCW3_SMM = 0x08, 0x04, 0x02, 0x01, 0x40, 0x20
OCW2_R, OCW2_SL, OCW2_EOI, OCW2_LEVEL = 0x80, 0x40, 0x20, 0x07
POLL_PENDING = 0x80
ELCR_FIXED = (0b0000_0111, 0b0010_0001)  # IRQ 0, 1, 2 and 8, 13 are edge-triggered always [PIIX4 4.2.6]
COMMAND, DATA = 0, 1
NAMES = {COMMAND: "IRR/ISR|ICW1/OCW2/OCW3", DATA: "IMR|ICW2-4/OCW1"}  # A0 = 0, 1 [basic operation]


@dataclass(slots=True)
class Chip:
    """One 8259A. Bit n of a mask is IRn; `lines` and `elcr` are the board's, initialization leaves them."""

    lines: int = 0
    latch: int = 0  # edges seen since the last acknowledge
    elcr: int = 0
    imr: int = 0
    isr: int = 0
    vector: int = 0  # ICW2, T7..T3
    icw3: int = 0
    icw4: int = 0
    lowest: int = 7  # the input of lowest priority; rotation moves it
    rotate_aeoi: bool = False
    special_mask: bool = False
    read_isr: bool = False
    polled: bool = False  # the next read is the poll's INTA
    init_step: int = 0  # the ICW awaited at the data port, 0 = initialized
    init_icw1: int = 0

    @property
    def irr(self) -> int:
        return self.lines & (self.latch | self.elcr)

    def set_line(self, n: int, level: bool) -> None:
        bit = 1 << n
        if level and not self.lines & bit:
            self.latch |= bit
        elif not level:
            self.latch &= ~bit
        self.lines = self.lines | bit if level else self.lines & ~bit

    def request(self, cascade: int | None = None) -> int | None:
        """The input that INT is active for, if any; `cascade` is the input that has a slave
        [fully nested mode; special mask mode; the special fully nested mode]."""
        pending = self.irr & ~self.imr
        if not pending:
            return None
        for step in range(1, 9):
            n = (self.lowest + step) & 7
            bit = 1 << n
            if self.special_mask and self.isr & bit:
                continue  # inhibits its own level only
            nested = n == cascade and self.icw4 & ICW4_SFNM
            if self.isr & bit and not nested:
                return None
            if pending & bit:
                return n
            if self.isr & bit:
                return None
        return None

    def acknowledge(self, n: int) -> None:
        """INTA for input n: the latch is consumed, the level goes in service unless AEOI ends it at once."""
        self.latch &= ~(1 << n)
        if not self.icw4 & ICW4_AEOI:
            self.isr |= 1 << n
        elif self.rotate_aeoi:
            self.lowest = n

    def highest_in_service(self) -> int | None:
        """What a non-specific EOI ends; masked levels are skipped in special mask mode [idem]."""
        isr = self.isr & ~self.imr if self.special_mask else self.isr
        ordered = ((self.lowest + step) & 7 for step in range(1, 9))
        return next((n for n in ordered if isr & 1 << n), None)

    def write_command(self, value: int) -> None:
        if value & ICW1:
            self.init_step, self.init_icw1 = 2, value
            self.imr = self.isr = self.latch = 0  # the edge sense circuit is reset [ICW1]
            self.icw4, self.lowest = 0, 7
            self.rotate_aeoi = self.special_mask = self.read_isr = self.polled = False
        elif value & OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)

    def _write_ocw3(self, value: int) -> None:
        self.polled = bool(value & OCW3_POLL)
        if value & OCW3_RR:
            self.read_isr = bool(value & OCW3_RIS)
        if value & OCW3_ESMM:
            self.special_mask = bool(value & OCW3_SMM)

    def _write_ocw2(self, value: int) -> None:
        rotate, specific, eoi = value & OCW2_R, value & OCW2_SL, value & OCW2_EOI
        n = value & OCW2_LEVEL if specific else self.highest_in_service()
        if eoi and n is not None:
            self.isr &= ~(1 << n)
        if rotate and (eoi or specific):
            self.lowest = self.lowest if n is None else n
        elif not eoi and not specific:
            self.rotate_aeoi = bool(rotate)  # set and clear of rotation in AEOI mode [OCW2]

    def write_data(self, value: int) -> None:
        if self.init_step == 0:
            self.imr = value
        elif self.init_step == 2:
            self.vector = value & 0xF8
            self._next_icw(4 if self.init_icw1 & ICW1_SINGLE else 3)
        elif self.init_step == 3:
            self.icw3 = value
            self._next_icw(4)
        else:
            self.icw4 = value
            self.init_step = 0

    def _next_icw(self, step: int) -> None:
        self.init_step = 0 if step == 4 and not self.init_icw1 & ICW1_ICW4 else step


@dataclass(slots=True)
class PicState(DeviceState):
    VERSION: ClassVar[int] = 1
    master: Chip = field(default_factory=Chip)
    slave: Chip = field(default_factory=Chip)


class Pic8259(Device[PicState]):
    NAME = "pic8259"
    PORTS = (
        PortRange(
            "master",
            length=2,
            posted=frozenset({COMMAND, DATA}),
            prompt=frozenset({COMMAND}),  # an EOI may raise INT again
            mirrored=frozenset({COMMAND, DATA}),
            names=NAMES,
        ),
        PortRange(
            "slave",
            length=2,
            posted=frozenset({COMMAND, DATA}),
            prompt=frozenset({COMMAND}),
            mirrored=frozenset({COMMAND, DATA}),
            names=NAMES,
        ),
        PortRange(
            "elcr",
            length=2,
            mirrored=frozenset({0, 1}),
            relaxed=frozenset({0, 1}),
            names={0: "ELCR1", 1: "ELCR2"},
        ),
    )
    CONTROLLER = True
    STATE = PicState

    def reset(self) -> None:
        """The chip has no reset pin; power-on leaves it undefined until ICW1, here: idle. ELCR is cleared."""
        old = getattr(self, "state", PicState())
        self.state = PicState(Chip(lines=old.master.lines), Chip(lines=old.slave.lines))
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        if region == "elcr":
            return self._chips()[offset].elcr
        chip = self._chip(region)
        if chip.polled:
            chip.polled = False
            value = self._poll(region)
        elif offset == DATA:
            value = chip.imr
        else:
            value = chip.isr if chip.read_isr else chip.irr
        self.drive_lines()
        return value

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        if region == "elcr":
            self._chips()[offset].elcr = value & ~ELCR_FIXED[offset]
        elif offset == COMMAND:
            self._chip(region).write_command(value)
        else:
            self._chip(region).write_data(value)
        self.drive_lines()

    def line_in(self, irq: int, level: bool) -> None:
        if irq == CASCADE:
            return  # not on the ISA bus: IRQ 2 of the old PC arrives as IRQ 9
        self._chips()[irq >> 3].set_line(irq & 7, level)
        self.drive_lines()

    def int_ack(self) -> int:
        """INTA cycles: master, and if it was IR2 the slave, give the vector [interrupt sequence]."""
        s = self.state
        n = s.master.request(CASCADE)
        if n is None:
            return s.master.vector | SPURIOUS  # without an ISR bit: no EOI follows
        s.master.acknowledge(n)
        vector, irq = s.master.vector | n, n
        if n == CASCADE:
            slave_n = s.slave.request()
            if slave_n is not None:
                s.slave.acknowledge(slave_n)
            vector = s.slave.vector | (SPURIOUS if slave_n is None else slave_n)
            irq = 8 + (SPURIOUS if slave_n is None else slave_n)
            s.master.set_line(CASCADE, False)  # INT drops during INTA, so a further request is a new edge
        self.wiring.mark("irq", irq)
        self.drive_lines()
        return vector

    def drive_lines(self) -> None:
        s = self.state
        s.master.set_line(CASCADE, s.slave.request() is not None)
        self.wiring.intr(s.master.request(CASCADE) is not None)

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        s = self.state
        values: dict[tuple[str, int], MirrorValue] = {("elcr", 0): s.master.elcr, ("elcr", 1): s.slave.elcr}
        for region, chip in (("master", s.master), ("slave", s.slave)):
            if not chip.polled:  # else the read is an INTA
                values[region, DATA] = chip.imr
                if chip.imr != 0xFF:  # else it is out of use, beside an APIC: not to be shown for each edge
                    values[region, COMMAND] = chip.isr if chip.read_isr else chip.irr
        return values

    def _poll(self, region: str) -> int:
        """Poll command: the read is the INTA, of this chip alone [poll command]."""
        chip = self._chip(region)
        n = chip.request(CASCADE if region == "master" else None)
        if n is None:
            return SPURIOUS
        chip.acknowledge(n)
        if region == "slave":
            self.state.master.set_line(CASCADE, False)
        return POLL_PENDING | n

    def _chip(self, region: str) -> Chip:
        return self.state.master if region == "master" else self.state.slave

    def _chips(self) -> tuple[Chip, Chip]:
        return self.state.master, self.state.slave

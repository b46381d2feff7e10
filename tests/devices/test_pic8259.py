"""8259A pair against its data sheet, and against what Linux's i8259.c does."""

from __future__ import annotations

import pytest

from devices.pic8259 import Pic8259
from tests.devices.rig import Rig

COMMAND, DATA = 0, 1
MASTER_BASE, SLAVE_BASE = 0x30, 0x38


def make(master_icw4: int = 0x01, slave_icw4: int = 0x01, mask: int = 0) -> Rig[Pic8259]:
    """Initialized as Linux does it (init_8259A)."""
    pic = Rig(Pic8259, "master")
    for region, base, icw3, icw4 in (
        ("master", MASTER_BASE, 0x04, master_icw4),
        ("slave", SLAVE_BASE, 0x02, slave_icw4),
    ):
        pic.w(COMMAND, 0x11, region)
        for icw in (base, icw3, icw4):
            pic.w(DATA, icw, region)
        pic.w(DATA, mask, region)
    return pic


def raise_irq(pic: Rig[Pic8259], *irqs: int) -> None:
    for irq in irqs:
        pic.device.line_in(irq, True)


def pulse(pic: Rig[Pic8259], irq: int) -> None:
    pic.device.line_in(irq, False)
    pic.device.line_in(irq, True)


def ack(pic: Rig[Pic8259]) -> int:
    assert pic.wiring.int_pin
    return pic.device.int_ack()


def read_irr_isr(pic: Rig[Pic8259], region: str = "master") -> tuple[int, int]:
    pic.w(COMMAND, 0x0A, region)
    irr = pic.r(COMMAND, region)
    pic.w(COMMAND, 0x0B, region)
    return irr, pic.r(COMMAND, region)


def test_an_edge_interrupts_once() -> None:
    pic = make()
    assert not pic.wiring.int_pin
    raise_irq(pic, 4)
    assert read_irr_isr(pic) == (0x10, 0)
    assert ack(pic) == MASTER_BASE + 4
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic) == (0, 0x10)
    pic.w(COMMAND, 0x64)  # specific EOI; the line is high still, but no new edge
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic) == (0, 0)
    pulse(pic, 4)
    assert ack(pic) == MASTER_BASE + 4


def test_fixed_priority_and_nesting() -> None:
    pic = make()
    raise_irq(pic, 5)
    assert ack(pic) == MASTER_BASE + 5
    raise_irq(pic, 6)
    assert not pic.wiring.int_pin, "lower priority waits"
    raise_irq(pic, 1)
    assert ack(pic) == MASTER_BASE + 1
    assert read_irr_isr(pic) == (0x40, 0x22)
    pic.w(COMMAND, 0x20)
    assert read_irr_isr(pic)[1] == 0x20, "a non-specific EOI ends the highest"
    assert not pic.wiring.int_pin
    pic.w(COMMAND, 0x20)
    assert ack(pic) == MASTER_BASE + 6


def test_masked_requests_wait_in_irr() -> None:
    pic = make(mask=0xFF)
    raise_irq(pic, 0)
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic)[0] == 0x01
    pic.w(DATA, 0xFE)
    assert ack(pic) == MASTER_BASE


def test_imr_reads_back() -> None:
    """probe_8259A: else Linux runs without the legacy PIC."""
    pic = make()
    pic.w(DATA, 0xFB)
    assert pic.r(DATA) == 0xFB
    assert pic.device.mirror()["master", DATA] == 0xFB


def test_a_chip_that_is_masked_as_a_whole_shows_no_requests_in_its_mirror() -> None:
    """The CPU asks then; beside an I/O APIC nobody does, and no edge is a change to be seen."""
    pic = make()
    pic.w(DATA, 0xFF)
    before = pic.device.mirror()
    raise_irq(pic, 3)
    assert pic.device.mirror() == before
    assert pic.r(COMMAND) == 0x08
    pic.w(DATA, 0xFE)
    assert pic.device.mirror()["master", COMMAND] == 0x08


def test_icw1_clears_mask_service_and_edges() -> None:
    pic = make()
    raise_irq(pic, 3)
    assert ack(pic) == MASTER_BASE + 3
    raise_irq(pic, 4)
    pic.w(COMMAND, 0x11)
    for icw in (MASTER_BASE, 4, 1):
        pic.w(DATA, icw)
    assert pic.r(DATA) == 0
    assert read_irr_isr(pic) == (0, 0), "line 4 is high, but needs a new edge"
    assert not pic.wiring.int_pin


def test_single_mode_and_no_icw4() -> None:
    pic = Rig(Pic8259, "master")
    pic.w(COMMAND, 0x12)  # single, no ICW4
    pic.w(DATA, 0x50)
    pic.w(DATA, 0xFE)  # the mask already
    assert pic.r(DATA) == 0xFE
    raise_irq(pic, 0)
    assert ack(pic) == 0x50


def test_cascade() -> None:
    pic = make()
    raise_irq(pic, 12)
    assert read_irr_isr(pic)[0] == 0x04
    assert ack(pic) == SLAVE_BASE + 4
    assert (read_irr_isr(pic)[1], read_irr_isr(pic, "slave")[1]) == (0x04, 0x10)
    pic.w(COMMAND, 0x64, "slave")
    raise_irq(pic, 9)
    assert not pic.wiring.int_pin, "the master's IR2 is in service"
    pic.w(COMMAND, 0x62)
    assert ack(pic) == SLAVE_BASE + 1


def test_cascade_has_ir2s_priority() -> None:
    pic = make()
    raise_irq(pic, 3, 8, 1)
    vectors = []
    for eoi in (("master",), ("slave", "master"), ("master",)):
        vectors.append(ack(pic))
        for region in eoi:
            pic.w(COMMAND, 0x20, region)
    assert vectors == [MASTER_BASE + 1, SLAVE_BASE, MASTER_BASE + 3]


def test_special_fully_nested_mode_lets_the_slave_nest() -> None:
    pic = make(master_icw4=0x11)
    raise_irq(pic, 12)
    assert ack(pic) == SLAVE_BASE + 4
    raise_irq(pic, 14)
    assert not pic.wiring.int_pin
    raise_irq(pic, 9)
    assert ack(pic) == SLAVE_BASE + 1


def test_auto_eoi() -> None:
    pic = make(master_icw4=0x03, slave_icw4=0x03)
    raise_irq(pic, 12, 13)
    assert [ack(pic), ack(pic)] == [SLAVE_BASE + 4, SLAVE_BASE + 5], "INT drops and rises between them"
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic) == (0, 0)


def test_rotation_on_eoi() -> None:
    pic = make()
    raise_irq(pic, 0, 1)
    assert ack(pic) == MASTER_BASE
    pic.w(COMMAND, 0xA0)  # rotate on non-specific EOI: IR0 is lowest now
    pulse(pic, 0)
    assert ack(pic) == MASTER_BASE + 1
    assert not pic.wiring.int_pin
    pic.w(COMMAND, 0xE1)  # rotate on specific EOI
    assert ack(pic) == MASTER_BASE


def test_set_priority_and_rotation_in_aeoi_mode() -> None:
    pic = make(master_icw4=0x03)
    pic.w(COMMAND, 0xC4)  # IR4 lowest, so IR5 highest
    raise_irq(pic, 0, 5)
    assert ack(pic) == MASTER_BASE + 5
    pic.w(COMMAND, 0x80)
    assert ack(pic) == MASTER_BASE
    pulse(pic, 0)
    raise_irq(pic, 6)
    assert ack(pic) == MASTER_BASE + 6, "IR0 has gone to the end"
    pic.w(COMMAND, 0x00)
    assert ack(pic) == MASTER_BASE


def test_special_mask_mode() -> None:
    pic = make()
    raise_irq(pic, 2 + 1)
    assert ack(pic) == MASTER_BASE + 3
    raise_irq(pic, 5)
    assert not pic.wiring.int_pin
    pic.w(DATA, 0x08)
    pic.w(COMMAND, 0x68)
    assert ack(pic) == MASTER_BASE + 5
    pic.w(COMMAND, 0x20)
    assert read_irr_isr(pic)[1] == 0x08, "the masked level is passed over"
    raise_irq(pic, 6)
    assert ack(pic) == MASTER_BASE + 6
    pic.w(COMMAND, 0x48)
    raise_irq(pic, 7)
    assert not pic.wiring.int_pin


def test_poll() -> None:
    pic = make()
    pic.w(COMMAND, 0x0C)
    assert pic.r(COMMAND) & 0x80 == 0
    raise_irq(pic, 6)
    pic.w(COMMAND, 0x0C)
    assert ("master", COMMAND) not in pic.device.mirror()
    assert pic.r(COMMAND) == 0x86
    assert read_irr_isr(pic)[1] == 0x40, "the read was the INTA"
    assert not pic.wiring.int_pin


def test_a_request_withdrawn_before_inta_is_spurious() -> None:
    pic = make()
    raise_irq(pic, 4)
    assert pic.wiring.int_pin
    pic.device.line_in(4, False)
    assert not pic.wiring.int_pin
    assert pic.device.int_ack() == MASTER_BASE + 7  # a CPU that had begun its INTA
    assert read_irr_isr(pic) == (0, 0), "without a bit in ISR: Linux tells it from IRQ 7 by that"


def test_slave_spurious_is_irq_15_and_holds_the_masters_ir2() -> None:
    pic = make()
    raise_irq(pic, 10)
    state = pic.device.state
    state.slave.set_line(2, False)  # falls between the two INTA pulses
    assert pic.device.int_ack() == SLAVE_BASE + 7
    assert read_irr_isr(pic, "slave") == (0, 0)
    assert read_irr_isr(pic) == (0, 0x04)


def test_elcr_makes_a_line_level_triggered() -> None:
    pic = make()
    pic.w(0, 0xFF, "elcr")
    pic.w(1, 0xFF, "elcr")
    assert (pic.r(0, "elcr"), pic.r(1, "elcr")) == (0xF8, 0xDE), "0, 1, 2, 8 and 13 stay edge-triggered"
    raise_irq(pic, 9)
    for _ in range(2):
        assert ack(pic) == SLAVE_BASE + 1
        assert not pic.wiring.int_pin
        pic.w(COMMAND, 0x61, "slave")
        pic.w(COMMAND, 0x62)
    pic.device.line_in(9, False)
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic, "slave") == (0, 0)


def test_irq_2_of_the_bus_leads_nowhere() -> None:
    pic = make()
    raise_irq(pic, 2)
    assert not pic.wiring.int_pin


@pytest.mark.parametrize("irq", [n for n in range(16) if n != 2])
def test_linux_mask_and_ack(irq: int) -> None:
    """mask_and_ack_8259A and the unmask after it, line by line."""
    pic = make(mask=0xFF)
    pic.w(DATA, 0xFF & ~(1 << irq if irq < 8 else 0x04))
    if irq >= 8:
        pic.w(DATA, 0xFF & ~(1 << irq - 8), "slave")
    region, bit = ("master", irq) if irq < 8 else ("slave", irq - 8)
    for _ in range(3):
        pulse(pic, irq)
        assert ack(pic) == MASTER_BASE + irq
        unmasked = pic.r(DATA, region)
        pic.w(DATA, unmasked | 1 << bit, region)
        pic.w(COMMAND, 0x60 + bit, region)
        if irq >= 8:
            pic.w(COMMAND, 0x62)
        pic.w(DATA, unmasked, region)
        assert not pic.wiring.int_pin
        assert read_irr_isr(pic) == (0, 0)


def test_reset_keeps_the_levels_of_the_lines() -> None:
    pic = make()
    raise_irq(pic, 4)
    pic.device.reset()
    assert not pic.wiring.int_pin
    assert read_irr_isr(pic) == (0, 0)
    assert pic.device.state.master.lines == 0x10

"""Priorities, destinations, IPIs, messages, LINT pins [SDM vol. 3A 11.5, 11.6, 11.8]."""

import pytest

from cpu_node.lapic_state import Mode, Reg
from tests.cpu_node.lapic.kit import V, bits, make


def test_one_interrupt(apic):
    assert apic.accept(V, Mode.FIXED)
    assert bits(apic, Reg.IRR) == 1 << V
    assert apic.pending_vector() == V
    assert apic.acknowledge() == V
    assert (bits(apic, Reg.IRR), bits(apic, Reg.ISR)) == (0, 1 << V)
    assert apic.read(Reg.PPR) == 0x40
    assert apic.pending_vector() is None
    assert apic.write(Reg.EOI, 0) is None
    assert (bits(apic, Reg.ISR), apic.read(Reg.PPR)) == (0, 0)


def test_priorities(apic):
    for vector in (0x31, 0x52, 0x51):
        apic.accept(vector, Mode.FIXED)
    assert apic.acknowledge() == 0x52
    assert apic.pending_vector() is None  # 51h is of the same class
    apic.accept(0x61, Mode.FIXED)
    assert apic.acknowledge() == 0x61
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == 0x51
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == 0x31


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"), [(0, None, 0), (0x35, None, 0x35), (0x35, 0x52, 0x50),
    (0x52, 0x51, 0x52), (0x62, 0x51, 0x62)]
)
def test_processor_priority(apic, tpr, in_service, ppr):
    if in_service is not None:
        apic.accept(in_service, Mode.FIXED)
        apic.acknowledge()
    apic.write(Reg.TPR, tpr)
    assert apic.read(Reg.PPR) == ppr
    apic.accept((ppr & 0xF0) | 0xF, Mode.FIXED) if ppr >= 0x10 else None
    assert apic.pending_vector() is None
    apic.accept((ppr & 0xF0) + 0x10, Mode.FIXED)
    assert apic.pending_vector() == (ppr & 0xF0) + 0x10


def test_spurious_when_the_task_priority_rose(apic):
    apic.accept(V, Mode.FIXED)
    apic.write(Reg.TPR, 0xF0)
    assert apic.acknowledge() == 0xFF
    assert bits(apic, Reg.ISR) == 0


def test_level_triggered_eoi_is_broadcast(apic):
    apic.accept(V, Mode.FIXED, level_triggered=True)
    assert bits(apic, Reg.TMR) == 1 << V
    apic.acknowledge()
    assert apic.write(Reg.EOI, 0) == V
    apic.accept(V, Mode.FIXED)  # the same vector, edge-triggered now
    apic.acknowledge()
    assert apic.write(Reg.EOI, 0) is None
    assert apic.write(Reg.EOI, 0) is None  # nothing in service


def test_level_deassert_is_no_request(apic):
    assert not apic.accept(V, Mode.FIXED, level_triggered=True, level_assert=False)


DESTINATIONS = [
    # id, LDR, DFR, destination, logical, mine
    (3, 0, ~0, 3, False, True), (3, 0, ~0, 4, False, False), (3, 0, ~0, 0xFF, False, True),
    (3, 0x04, ~0, 0x0C, True, True), (3, 0x04, ~0, 0x03, True, False), (3, 0x04, ~0, 0xFF, True, True),
    (3, 0, ~0, 0xFF, True, False), (3, 0x24, 0, 0x24, True, True), (3, 0x24, 0, 0x2C, True, True),
    (3, 0x24, 0, 0x34, True, False), (3, 0x24, 0, 0xF4, True, True), (3, 0x24, 0, 0x2B, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("apic_id", "ldr", "dfr", "destination", "logical", "mine"), DESTINATIONS)
def test_destinations(apic, apic_id, ldr, dfr, destination, logical, mine):
    apic.write(Reg.ID, apic_id << 24)
    apic.write(Reg.LDR, ldr << 24)
    apic.write(Reg.DFR, dfr & 0xFFFFFFFF)
    assert apic.accept(V, Mode.LOWEST_PRIORITY, destination, logical) == mine
    assert bits(apic, Reg.IRR) == (1 << V if mine else 0)
    apic.write(Reg.ICR_HIGH, destination << 24)
    apic.write(Reg.ICR_LOW, 0x55 | (0x800 if logical else 0))
    assert bool(bits(apic, Reg.IRR) >> 0x55 & 1) == mine


@pytest.mark.parametrize(("shorthand", "arrives"), [(0, True), (1, True), (2, True), (3, False)])
def test_ipi_shorthands(apic, shorthand, arrives):
    apic.write(Reg.ICR_LOW, shorthand << 18 | V)
    assert (apic.pending_vector() == V) == arrives
    assert apic.read(Reg.ICR_LOW) == shorthand << 18 | V  # never busy


def test_ipi_modes(apic):
    apic.write(Reg.ICR_LOW, Mode.NMI << 8)
    assert apic.take_nmi()
    assert not apic.take_nmi()
    for mode in (Mode.INIT, Mode.STARTUP, Mode.SMI):
        apic.write(Reg.ICR_LOW, mode << 8 | 0x4000)
    apic.write(Reg.ICR_LOW, 2 << 18 | Mode.INIT << 8)
    assert apic.state.irr == 0


def test_message_modes(apic):
    assert apic.accept(0, Mode.NMI)
    assert apic.take_nmi()
    assert apic.accept(0, Mode.EXTINT)
    assert apic.intr_pending()
    apic.acknowledge_intr()
    assert not apic.intr_pending()
    assert not apic.accept(0, Mode.INIT)
    assert not apic.accept(0, Mode.SMI)


# LINT pins


def test_virtual_wire():
    apic, _ = make(enabled=False)
    apic.virtual_wire()
    apic.set_lint(0, True)
    assert apic.intr_pending()
    apic.acknowledge_intr()
    assert apic.intr_pending()  # a level
    apic.set_lint(0, False)
    assert not apic.intr_pending()
    apic.set_lint(1, True)
    apic.set_lint(1, True)
    assert apic.take_nmi()
    assert not apic.take_nmi()


def test_masked_extint(apic):
    apic.write(0x350, 0x10700)
    apic.set_lint(0, True)
    assert not apic.intr_pending()
    apic.write(0x350, 0x700)
    assert apic.intr_pending()


def test_fixed_edge_lint(apic):
    apic.write(0x350, V)
    apic.set_lint(0, True)
    assert apic.acknowledge() == V
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None
    apic.set_lint(0, False)
    apic.set_lint(0, True)
    assert apic.pending_vector() == V
    assert not apic.intr_pending()


def test_fixed_level_lint(apic):
    apic.write(0x350, 0x8000 | V)
    apic.set_lint(0, True)
    apic.acknowledge()
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == V  # still high
    apic.set_lint(0, False)
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None

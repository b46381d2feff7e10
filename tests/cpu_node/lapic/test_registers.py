"""Registers, errors, disabled APICs [SDM vol. 3A 11.4, 11.5.3]."""

import pytest

from cpu_node.lapic_state import Mode, Reg
from tests.cpu_node.lapic.kit import V, make

RESET = [
    (Reg.ID, 0), (Reg.VERSION, 0x50014), (Reg.TPR, 0), (Reg.APR, 0), (Reg.PPR, 0), (Reg.LDR, 0),
    (Reg.DFR, 0xFFFFFFFF), (Reg.SVR, 0xFF), (Reg.ESR, 0), (Reg.ICR_LOW, 0), (Reg.ICR_HIGH, 0),
    (0x320, 0x10000), (0x330, 0x10000), (0x340, 0x10000), (0x350, 0x10000), (0x360, 0x10000),
    (0x370, 0x10000),
    (Reg.INITIAL_COUNT, 0), (Reg.CURRENT_COUNT, 0), (Reg.DIVIDE, 0),
]  # fmt: skip


@pytest.mark.parametrize(("reg", "value"), RESET)
def test_reset_values(reg, value):
    apic, _ = make(enabled=False)
    assert apic.read(reg) == value


WRITES = [
    (Reg.ID, 0xFFFFFFFF, 0xFF000000), (Reg.TPR, 0xFFFFFFFF, 0xFF), (Reg.LDR, 0xFFFFFFFF, 0xFF000000),
    (Reg.DFR, 0, 0x0FFFFFFF), (Reg.SVR, 0xFFFFFFFF, 0x3FF), (Reg.VERSION, 0, 0x50014), (Reg.PPR, 0xFF, 0),
    (Reg.ICR_HIGH, 0xFFFFFFFF, 0xFF000000), (Reg.DIVIDE, 0xFFFFFFFF, 0xB),
    (0x320, 0xFFFFFFFF, 0x700FF), (0x330, 0xFFFFFFFF, 0x107FF), (0x340, 0xFFFFFFFF, 0x107FF),
    (0x350, 0xFFFFFFFF, 0x1A7FF), (0x360, 0xFFFFFFFF, 0x1A7FF), (0x370, 0xFFFFFFFF, 0x100FF),
    (Reg.ISR, 0xFFFFFFFF, 0), (Reg.IRR, 0xFFFFFFFF, 0), (Reg.CURRENT_COUNT, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize(("reg", "value", "back"), WRITES)
def test_writable_bits(apic, reg, value, back):
    apic.write(reg, value)
    assert apic.read(reg) == back


# Errors [11.5.3]


def test_illegal_vectors(apic):
    apic.write(0x370, 0xFE)
    assert not apic.accept(5, Mode.FIXED)
    assert apic.pending_vector() == 0xFE
    assert apic.read(Reg.ESR) == 0  # only a write shows it
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x40
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0
    apic.write(Reg.ICR_LOW, 1 << 18 | 3)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x20


@pytest.mark.parametrize("offset", [0x000, 0x010, 0x040, 0x290, 0x3F0, 0x2F0])
def test_illegal_registers(apic, offset):
    assert apic.read(offset) == 0
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x80
    apic.write(offset, 1)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x80


def test_an_illegal_error_vector_ends(apic):
    apic.write(0x370, 0x05)
    apic.read(0)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0xC0


# Disabled APICs [11.4.7.2]


def test_software_disable(apic):
    apic.accept(V, Mode.FIXED)
    apic.write(0x350, 0x700)
    apic.write(Reg.SVR, 0xFF)
    assert apic.read(0x350) == 0x10700
    apic.write(0x350, 0x700)
    assert apic.read(0x350) == 0x10700  # can't be unmasked
    assert not apic.accept(0x51, Mode.FIXED)
    apic.write(Reg.ICR_LOW, 1 << 18 | 0x61)
    assert apic.pending_vector() == V  # what was pending stays
    assert apic.accept(0, Mode.NMI)


def test_global_disable_gives_the_pins_back(apic):
    apic.set_lint(0, True)
    assert not apic.intr_pending()  # LINT0 is masked
    assert apic.set_base(0xFEE00100)
    assert not apic.enabled
    assert apic.intr_pending()
    apic.set_lint(1, True)
    assert apic.take_nmi()
    assert not apic.accept(V, Mode.FIXED)
    assert apic.set_base(0xFEE00900)
    assert apic.read(Reg.SVR) == 0xFF


@pytest.mark.parametrize("value", [0xFEE00901, 0xFEE00D00, 0x1FEE00900])
def test_reserved_base_bits(apic, value):
    assert not apic.set_base(value)
    assert apic.base == 0xFEE00900

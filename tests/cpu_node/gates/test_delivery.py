"""Delivery through gates of all kinds [SDM vol. 3A chapter 6, vol. 2 INT n]."""

import pytest

from cpu_node import gates
from cpu_node.cpu import ESP
from cpu_node.descriptor import (
    BUSY_RAW,
    CS,
    DS,
    INTERRUPT_GATE16,
    INTERRUPT_GATE32,
    SS,
    TRAP_GATE16,
    TRAP_GATE32,
    pack_gate,
    parse,
)
from cpu_node.errors import DB, DE, GP, PF, UD, GuestFault
from cpu_node.flags import AC, CF, FIXED, IF, NT, OF, RF, TF
from tests.cpu_node.gates.kit import EIP, V
from tests.cpu_node.kit import (
    CODE0,
    CODE1,
    CODE3,
    CONFORMING,
    DATA0,
    DATA1,
    DATA3,
    DATA16,
    HANDLER,
    TOP0,
    TOP1,
    TOP3,
    TSS_16,
    TSS_16_SEL,
)


@pytest.mark.parametrize(("kind", "clears_if"), [(INTERRUPT_GATE32, True), (TRAP_GATE32, False)])
def test_same_privilege(m, kind, clears_if):
    m.interrupt_gate(V, kind=kind)
    m.cpu.eflags = FIXED | IF | TF | NT | CF
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.eip == HANDLER + V
    assert m.cpu.regs[ESP] == TOP0 - 12
    assert m.stack32(3) == [EIP, CODE0, FIXED | IF | TF | NT | CF]
    assert m.cpu.eflags == FIXED | CF | (0 if clears_if else IF)
    assert (m.cpu.cpl, m.cpu.seg[CS].selector) == (0, CODE0)
    assert m.hooks.calls == []


@pytest.mark.parametrize("error", [None, 0x1234])
def test_from_user_mode(m, error):
    m.interrupt_gate(V)
    m.ring(3)
    m.cpu.eflags = FIXED | IF | AC
    gates.deliver(m.cpu, V, error)
    expected = [EIP, CODE3, FIXED | IF | AC, TOP3, DATA3]
    if error is not None:
        expected.insert(0, error)
    assert m.cpu.regs[ESP] == TOP0 - 4 * len(expected)
    assert m.stack32(len(expected)) == expected
    assert (m.cpu.cpl, m.cpu.seg[CS].selector, m.cpu.seg[SS].selector) == (0, CODE0, DATA0)
    assert m.cpu.eflags == FIXED | AC
    assert ("privilege_changed",) in m.hooks.calls
    assert m.cpu.seg[DS].selector == DATA3  # data segments stay


def test_to_ring_1(m):
    m.interrupt_gate(V, selector=CODE1)
    m.ring(3)
    gates.deliver(m.cpu, V, external=True)
    assert (m.cpu.cpl, m.cpu.seg[CS].selector, m.cpu.seg[SS].selector) == (1, CODE1, DATA1)
    assert m.cpu.regs[ESP] == TOP1 - 20


def test_selector_rpl_is_replaced_by_the_cpl(m):
    m.interrupt_gate(V, selector=CODE0 | 3)
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.seg[CS].selector == CODE0


def test_conforming_handler_keeps_the_privilege(m):
    m.interrupt_gate(V, selector=CONFORMING)
    m.ring(3)
    gates.deliver(m.cpu, V, external=True)
    assert (m.cpu.cpl, m.cpu.seg[CS].selector, m.cpu.regs[ESP]) == (3, CONFORMING | 3, TOP3 - 12)


@pytest.mark.parametrize("kind", [INTERRUPT_GATE16, TRAP_GATE16])
def test_16_bit_gate(m, kind):
    m.gate(V, pack_gate(kind, CODE0, 0xDEAD1234))
    m.ring(3)
    m.cpu.eflags = FIXED | IF | AC
    gates.deliver(m.cpu, V, 0x55)
    assert m.cpu.eip == 0x1234
    assert m.cpu.regs[ESP] == TOP0 - 12
    assert m.stack16(6) == [0x55, EIP & 0xFFFF, CODE3, FIXED | IF, TOP3, DATA3]


def test_16_bit_stack_keeps_the_upper_half_of_esp(m):
    m.interrupt_gate(V)
    m.cpu.seg[SS] = parse(DATA16, m.descriptor(DATA16) | 1 << 40)
    m.cpu.regs[ESP] = 0xABCD0004
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.regs[ESP] == 0xABCDFFF8  # wrapped round the 64 KiB segment
    assert [m.memory.read32(0x8000 + at) for at in (0xFFF8, 0xFFFC, 0)] == [EIP, CODE0, FIXED]


def test_16_bit_tss(m):
    m.memory.write32s(TSS_16 + 2, [0x8000 | DATA0 << 16])
    m.cpu.tr = parse(TSS_16_SEL, m.descriptor(TSS_16_SEL) | BUSY_RAW)
    m.interrupt_gate(V)
    m.ring(3)
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.regs[ESP] == 0x8000 - 20


@pytest.mark.parametrize(
    ("action", "vector", "dpl", "cpl", "allowed"),
    [
        (lambda c: gates.int_n(c, V), V, 0, 3, False),
        (lambda c: gates.int_n(c, V), V, 3, 3, True),
        (lambda c: gates.int_n(c, V), V, 1, 3, False),
        (lambda c: gates.int_n(c, V), V, 0, 0, True),
        (gates.int3, 3, 0, 3, False),
        (gates.int3, 3, 3, 3, True),
        (gates.into, 4, 0, 3, False),
        (gates.into, 4, 3, 3, True),
        (gates.int1, 1, 0, 3, True),  # no DPL check
        (lambda c: gates.deliver(c, V, external=True), V, 0, 3, True),
        (lambda c: gates.deliver(c, V), V, 0, 3, True),
    ],
)
def test_gate_dpl(m, action, vector, dpl, cpl, allowed):
    m.interrupt_gate(vector, dpl=dpl)
    m.ring(cpl)
    m.cpu.eflags |= OF
    if allowed:
        action(m.cpu)
        assert m.cpu.eip == HANDLER + vector
    else:
        assert m.faults(action, m.cpu) == (GP, 8 * vector | 2)


def test_into_without_overflow(m):
    before = m.snapshot()
    assert not gates.into(m.cpu)
    assert m.snapshot() == before


@pytest.mark.parametrize(
    ("index", "lower", "upper", "size", "inside"),
    [
        (5, 0, 10, 4, True), (0, 0, 10, 4, True), (10, 0, 10, 4, True), (11, 0, 10, 4, False),
        (0xFFFFFFFF, 0, 10, 4, False), (0xFFFFFFFF, 0xFFFFFFF0, 10, 4, True),
        (0x80000000, 0x80000000, 0x7FFFFFFF, 4, True), (0xFFFF, 0, 10, 2, False),
        (0x7FFF, 0x8000, 0x7FFF, 2, True),
    ],
)  # fmt: skip
def test_bound(index, lower, upper, size, inside):
    if inside:
        gates.bound(index, lower, upper, size)
    else:
        with pytest.raises(GuestFault) as caught:
            gates.bound(index, lower, upper, size)
        assert caught.value.vector == 5


@pytest.mark.parametrize(
    ("vector", "error", "kwargs", "rf"),
    [
        (PF, 0, {}, True), (GP, 0, {}, True), (UD, None, {}, True), (DE, None, {}, True), (7, None, {}, True),
        (DB, None, {}, False), (3, None, {"software": True}, False), (0x80, None, {"software": True}, False),
        (PF, None, {"software": True}, False), (PF, None, {"external": True}, False),
        (2, None, {"external": True}, False),
    ],
)  # fmt: skip
def test_rf_in_the_saved_flags(m, vector, error, kwargs, rf):
    m.interrupt_gate(vector)
    gates.deliver(m.cpu, vector, error, **kwargs)
    assert m.stack32(4)[2 + (error is not None)] == FIXED | (RF if rf else 0)


def test_cr2_and_deliver_fault(m):
    m.interrupt_gate(PF)
    gates.deliver_fault(m.cpu, GuestFault(PF, 6, 0xDEAD0000))
    assert m.cpu.cr2 == 0xDEAD0000
    assert m.stack32(2) == [6, EIP]


def test_delivery_ends_halt_and_shadow(m):
    m.interrupt_gate(2)
    m.cpu.halted = m.cpu.inhibit_interrupts = True
    gates.deliver(m.cpu, 2, external=True)
    assert (m.cpu.halted, m.cpu.inhibit_interrupts, m.cpu.nmi_blocked) == (False, False, True)


def test_debug_exception_clears_general_detect(m):
    m.interrupt_gate(DB)
    m.cpu.dr[7] |= 0x2000
    gates.deliver(m.cpu, DB)
    assert m.cpu.dr[7] == 0x400

"""From virtual-8086 mode [SDM vol. 3B 20.3], in real mode [20.1.4], through task gates [vol. 3A 6.12.2]."""

import pytest

from cpu_node import gates
from cpu_node.cpu import CR0_TS, EBP, ESP
from cpu_node.descriptor import (
    BUSY_RAW,
    CS,
    DS,
    ES,
    FS,
    GS,
    TASK_GATE,
    pack,
    pack_gate,
)
from cpu_node.errors import DF, GP, NP, TS, TripleFault
from cpu_node.flags import AC, CF, FIXED, IF, NT, RF, TF, VM
from tests.cpu_node.gates.kit import EIP, V
from tests.cpu_node.kit import (
    BEYOND,
    CODE0,
    CODE1,
    CODE3,
    CONFORMING,
    DATA0,
    FREE,
    HANDLER,
    TOP0,
    TOP3,
    TOP_B,
    TSS,
    TSS_B,
    TSS_B_SEL,
    TSS_SEL,
)

# Virtual-8086 mode [20.3]


def test_from_virtual_8086_mode(m):
    m.interrupt_gate(V)
    m.virtual8086()
    m.cpu.eflags |= IF | NT
    gates.deliver(m.cpu, V, 0x77)
    flags = FIXED | VM | 0x3000 | IF | NT
    assert m.cpu.regs[ESP] == TOP0 - 40
    assert m.stack32(10) == [0x77, 0x200, 0x100, flags, 0x400, 0x300, 0x11, 0x22, 0x33, 0x44]
    assert m.cpu.eflags == FIXED | 0x3000
    assert m.cpu.cpl == 0
    assert all(not m.cpu.seg[i].usable and m.cpu.seg[i].selector == 0 for i in (ES, DS, FS, GS))
    assert ("mode_changed",) in m.hooks.calls


@pytest.mark.parametrize("selector", [CODE1, CONFORMING, CODE3])
def test_virtual_8086_needs_a_ring_0_handler(m, selector):
    m.interrupt_gate(V, dpl=3, selector=selector)
    m.virtual8086()
    assert m.faults(gates.int_n, m.cpu, V) == (GP, selector & ~3)


@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_virtual_8086_int_n_is_iopl_sensitive(m, iopl):
    m.interrupt_gate(V, dpl=3)
    m.interrupt_gate(3, dpl=3)
    m.virtual8086(iopl)
    assert m.faults(gates.int_n, m.cpu, V) == (GP, 0)
    gates.int3(m.cpu)  # is not
    assert m.cpu.eip == HANDLER + 3


# Real mode [20.1.4]


def test_real_mode(m):
    m.real()
    m.memory.write32(4 * V, 0xF000_1234)
    m.cpu.eflags = FIXED | IF | TF | AC | CF
    gates.int_n(m.cpu, V)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.seg[CS].base) == (0x1234, 0xF000, 0xF0000)
    assert m.cpu.regs[ESP] == 0x400 - 6
    assert m.stack16(3) == [0x200, 0x100, FIXED | IF | TF | CF]
    assert m.cpu.eflags == FIXED | CF


def test_real_mode_pushes_no_error_code(m):
    m.real()
    m.memory.write32(4 * GP, 0x0050_0000)
    gates.deliver(m.cpu, GP, 0)
    assert m.stack16(2) == [0x200, 0x100]


def test_real_mode_vector_beyond_the_limit(m):
    m.real()
    m.cpu.idt_limit = 4 * 14
    m.memory.write32(4 * GP, 0x0050_0000)
    assert m.faults(gates.int_n, m.cpu, V) == (GP, None)
    m.cpu.idt_limit = 4 * 8 + 3
    m.memory.write32(4 * DF, 0x0060_0000)
    gates.deliver(m.cpu, GP)
    assert m.cpu.seg[CS].selector == 0x60
    m.cpu.idt_limit = 0
    with pytest.raises(TripleFault):
        gates.deliver(m.cpu, GP)


# Task gates [6.12.2]


def _task(m, **words):
    """TSS_B as a runnable ring-0 task."""
    state = {"eip": 0x7777, "eflags": FIXED, "esp": TOP_B, "cs": CODE0, "ss": DATA0, "ds": DATA0, "ldt": 0}
    state |= words
    m.memory.write32s(TSS_B + 0x20, [state["eip"], state["eflags"], 1, 2, 3, 4, state["esp"], 6, 7, 8])
    m.memory.write32s(TSS_B + 0x48, [0, state["cs"], state["ss"], state["ds"], 0, 0, state["ldt"], 0])


def test_double_fault_through_a_task_gate(m):
    m.gate(DF, pack_gate(TASK_GATE, TSS_B_SEL, 0))
    _task(m)
    m.ring(3)
    m.cpu.regs[EBP] = 0x1234
    m.cpu.eflags = FIXED | IF
    gates.deliver(m.cpu, DF, 0)
    assert (m.cpu.eip, m.cpu.cpl, m.cpu.regs[ESP], m.cpu.tr.selector) == (0x7777, 0, TOP_B - 4, TSS_B_SEL)
    assert m.stack32(1) == [0]
    assert m.cpu.eflags == FIXED | NT
    assert m.cpu.cr0 & CR0_TS
    assert m.memory.read16(TSS_B) == TSS_SEL  # back link
    assert list(m.memory.read32s(TSS + 0x20, 2)) == [EIP, FIXED | IF | RF]
    assert list(m.memory.read32s(TSS + 0x38, 2)) == [TOP3, 0x1234]
    assert m.memory.read16(TSS + 0x4C) == CODE3
    assert m.descriptor(TSS_SEL) & BUSY_RAW
    assert m.descriptor(TSS_B_SEL) & BUSY_RAW


@pytest.mark.parametrize(
    ("selector", "change", "vector", "error"),
    [
        (TSS_B_SEL | 4, None, GP, TSS_B_SEL | 4),
        (TSS_SEL, None, GP, TSS_SEL),  # busy
        (DATA0, None, GP, DATA0),
        (BEYOND, None, GP, BEYOND),
        (FREE, pack(TSS_B, 0x67, 0x09), NP, FREE),
        (FREE, pack(TSS_B, 0x66, 0x89), TS, FREE),
    ],
)
def test_task_gate_faults(m, selector, change, vector, error):
    if change is not None:
        m.describe(FREE, change)
    m.gate(V, pack_gate(TASK_GATE, selector, 0, dpl=3))
    assert m.faults(gates.int_n, m.cpu, V) == (vector, error)


def test_fault_after_the_commit_point_is_the_new_tasks(m):
    m.gate(V, pack_gate(TASK_GATE, TSS_B_SEL, 0, dpl=3))
    m.interrupt_gate(TS)
    _task(m, ds=CODE3 & ~3 | 0x1000)
    m.ring(3)
    gates.int_n(m.cpu, V)
    assert m.cpu.eip == HANDLER + TS
    assert m.stack32(3) == [0x1018, 0x7777, CODE0]
    assert m.cpu.tr.selector == TSS_B_SEL
    assert m.cpu.regs[ESP] == TOP_B - 16

"""What is wrong with gate, segment, stack or table is a fault with its error code [SDM vol. 2 INT n]."""

import pytest

from cpu_node import gates
from cpu_node.cpu import ESP
from cpu_node.descriptor import (
    CALL_GATE32,
    INTERRUPT_GATE32,
    SS,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import GP, NP, PF, TS
from cpu_node.errors import SS as SS_FAULT
from tests.cpu_node.gates.kit import EIP, V
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_DATA,
    BEYOND,
    CODE0,
    CODE1,
    CODE3,
    CONFORMING,
    DATA0,
    DATA3,
    FREE,
    GDT,
    HANDLER,
    IDT,
    SMALL_CODE,
    TOP0,
    TOP3,
    TSS,
    TSS_SEL,
)


# A row: what to break, the fault expected (EXT clear), from CPL 3.
def _absent_gate(m):
    m.gate(V, pack_gate(INTERRUPT_GATE32, CODE0, HANDLER, dpl=3, present=False))


def _gate_to(selector):
    return lambda m: m.interrupt_gate(V, dpl=3, selector=selector)


def _stack(selector, esp=TOP0):
    def change(m):
        m.interrupt_gate(V, dpl=3)
        m.memory.write32s(TSS + 4, [esp, selector])

    return change


def _small_tss(m):
    m.interrupt_gate(V, dpl=3)
    m.cpu.tr = parse(TSS_SEL, pack(TSS, 8, 0x8B))


def _small_code(m):
    m.gate(V, pack_gate(INTERRUPT_GATE32, SMALL_CODE, 0x1000, dpl=3))


def _small_stack(m):
    m.describe(FREE, pack(0, 0x8FFF, 0x4093))
    _stack(FREE, 0x9004)(m)


def _expand_down_stack(m):
    m.describe(FREE, pack(0, 8, 0xC097))
    _stack(FREE, 0x9000 + 16)(m)


def _idt_ends(m):
    m.cpu.idt_limit = 8 * V + 6


DELIVERY_FAULTS = [
    ("IDT limit", _idt_ends, GP, 8 * V | 2),
    ("empty gate", lambda m: None, GP, 8 * V | 2),
    ("call gate", lambda m: m.gate(V, pack_gate(CALL_GATE32, CODE0, 0, dpl=3)), GP, 8 * V | 2),
    ("gate absent", _absent_gate, NP, 8 * V | 2),
    ("null code", _gate_to(0), GP, 0),
    ("code beyond GDT", _gate_to(BEYOND), GP, BEYOND),
    ("not code", _gate_to(DATA0), GP, DATA0),
    ("a TSS", _gate_to(TSS_SEL), GP, TSS_SEL),
    ("code absent", _gate_to(ABSENT_CODE), NP, ABSENT_CODE),
    ("EIP beyond limit", _small_code, GP, 0),
    ("TSS too small", _small_tss, TS, TSS_SEL),
    ("null stack", _stack(0), TS, 0),
    ("stack beyond GDT", _stack(BEYOND), TS, BEYOND),
    ("stack RPL", _stack(DATA0 | 3), TS, DATA0),
    ("stack DPL", _stack(DATA3), TS, DATA3 & ~3),
    ("stack is code", _stack(CODE0), TS, CODE0),
    ("stack absent", _stack(ABSENT_DATA), SS_FAULT, ABSENT_DATA),
    ("stack limit", _small_stack, SS_FAULT, FREE),
    ("stack limit, expand-down", _expand_down_stack, SS_FAULT, FREE),
]


@pytest.mark.parametrize(("what", "change", "vector", "error"), DELIVERY_FAULTS)
def test_faults_of_a_software_interrupt(m, what, change, vector, error):
    m.ring(3)
    change(m)
    assert m.faults(gates.int_n, m.cpu, V) == (vector, error)


@pytest.mark.parametrize(("what", "change", "vector", "error"), DELIVERY_FAULTS)
def test_faults_of_an_external_interrupt_carry_ext(m, what, change, vector, error):
    """The second fault is delivered instead, with the EXT bit, through an LDT-independent ring-1 gate."""
    m.interrupt_gate(vector, selector=CODE1)
    m.ring(3)
    if what == "IDT limit":
        m.cpu.idt_limit = 8 * V - 1
    change(m)
    if what in ("IDT limit", "TSS too small"):
        m.interrupt_gate(vector, selector=CONFORMING)
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.eip == HANDLER + vector
    assert m.stack32(3) == [error | 1, EIP, CODE3]


def test_same_privilege_stack_fault_has_error_zero(m):
    m.interrupt_gate(V)
    m.cpu.seg[SS] = parse(FREE, pack(0, 0xFF, 0x4093))
    m.cpu.regs[ESP] = 0x108
    assert m.faults(gates.int_n, m.cpu, V) == (SS_FAULT, 0)


def test_page_fault_on_the_new_stack(m):
    m.interrupt_gate(V, dpl=3)
    m.ring(3)
    m.memory.absent.add((TOP0 - 4) >> 12)
    assert m.faults(gates.int_n, m.cpu, V) == (PF, 2)  # a supervisor write


def test_pushes_at_cpl_3_are_user_writes(m):
    m.interrupt_gate(V, selector=CONFORMING, dpl=3)
    m.ring(3)
    m.memory.supervisor.add((TOP3 - 4) >> 12)
    assert m.faults(gates.int_n, m.cpu, V) == (PF, 7)


def test_tables_are_read_as_supervisor(m):
    m.interrupt_gate(V, dpl=3)
    m.ring(3)
    m.memory.supervisor.update({GDT >> 12, IDT >> 12, TSS >> 12, (TOP0 - 4) >> 12})
    gates.int_n(m.cpu, V)
    assert m.cpu.cpl == 0

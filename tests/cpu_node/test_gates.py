"""Delivery of interrupts and exceptions [SDM vol. 3A chapter 6, vol. 2 INT n], all gate kinds and modes."""

import pytest

from cpu_node import gates, quick
from cpu_node.cpu import CR0_TS, EBP, ESP
from cpu_node.descriptor import (
    BUSY_RAW,
    CALL_GATE32,
    CS,
    DS,
    ES,
    FS,
    GS,
    INTERRUPT_GATE16,
    INTERRUPT_GATE32,
    SS,
    TASK_GATE,
    TRAP_GATE16,
    TRAP_GATE32,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import DB, DE, DF, GP, NP, PF, TS, UD, GuestFault, TripleFault
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import AC, CF, FIXED, IF, NT, OF, RF, TF, VM
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_DATA,
    BEYOND,
    CODE0,
    CODE1,
    CODE3,
    CONFORMING,
    DATA0,
    DATA1,
    DATA3,
    DATA16,
    FREE,
    GDT,
    HANDLER,
    IDT,
    SMALL_CODE,
    TOP0,
    TOP1,
    TOP3,
    TOP_B,
    TSS,
    TSS_16,
    TSS_16_SEL,
    TSS_B,
    TSS_B_SEL,
    TSS_SEL,
    Machine,
)

V = 0x30  # an ordinary vector
EIP = 0x0010_0000


@pytest.fixture(params=["quick", "full"])
def m(request, monkeypatch) -> Machine:
    if request.param == "full":
        monkeypatch.setattr(quick, "enter", lambda *args: False)
    return Machine()


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


# Second faults [table 6-5]


B, C, P = UD, GP, PF  # benign, contributory, page fault


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (None, GuestFault(C, 5), C), (None, GuestFault(P, 2, 7), P), (B, GuestFault(C, 5), C),
        (B, GuestFault(P, 2, 7), P),
        (C, GuestFault(B), B), (C, GuestFault(TS, 5), DF), (DE, GuestFault(SS_FAULT, 5), DF),
        (C, GuestFault(P, 2, 7), P),
        (P, GuestFault(B), B), (P, GuestFault(NP, 5), DF), (P, GuestFault(P, 2, 7), DF),
        (DF, GuestFault(B), B),
        (DB, GuestFault(C, 5), C), (17, GuestFault(C, 5), C),
    ],
)  # fmt: skip
def test_second_faults(first, second, result):
    assert gates.combined(first, second) == (result, 0 if result == DF else second.error)


@pytest.mark.parametrize("second", [GuestFault(GP, 0), GuestFault(PF, 0, 0), GuestFault(NP, 3)])
def test_triple_fault(second):
    with pytest.raises(TripleFault):
        gates.combined(DF, second)


def test_double_fault_in_the_whole(m):
    """#PF whose stack page is absent: #PF again, so #DF through a gate with a good stack."""
    m.interrupt_gate(PF)
    m.interrupt_gate(DF, selector=CODE1)
    m.ring(3)
    m.memory.absent.add((TOP0 - 4) >> 12)
    gates.deliver(m.cpu, PF, 4, cr2=0x1000)
    assert m.cpu.eip == HANDLER + DF
    assert m.stack32(3) == [0, EIP, CODE3]
    assert m.cpu.cr2 == TOP0 - 4  # of the second #PF: the first push


def test_triple_fault_in_the_whole(m):
    m.cpu.idt_limit = 0
    before = m.snapshot()
    with pytest.raises(TripleFault):
        gates.deliver(m.cpu, GP, 0)
    assert m.snapshot() == before


def test_three_in_a_row(m):
    """An interrupt whose gate is bad gives #GP, whose gate is bad too: #DF."""
    m.interrupt_gate(DF)
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.eip == HANDLER + DF
    assert m.stack32(2) == [0, EIP]


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

"""Far JMP, CALL and RET, SYSENTER and SYSEXIT [SDM vol. 2; vol. 3A 5.8]. Task switches are in test_tasks."""

import pytest

from cpu_node import far
from cpu_node.cpu import CR0_PE, ECX, EDX, ESP
from cpu_node.descriptor import (
    CALL_GATE16,
    CALL_GATE32,
    CS,
    DS,
    ES,
    FS,
    GS,
    INTERRUPT_GATE32,
    SS,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import GP, NP, PF, TS
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import FIXED, IF, VM
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_DATA,
    ABSENT_STACK3,
    BEYOND,
    CALL_SEL,
    CODE0,
    CODE1,
    CODE3,
    CODE16,
    CONFORMING,
    CONFORMING3,
    DATA0,
    DATA3,
    DATA16,
    DATA16_3,
    FLAT,
    FREE,
    HANDLER,
    LDT_SEL,
    SMALL_CODE,
    TOP0,
    TOP3,
    TSS,
    TSS_SEL,
    Machine,
)

EIP = 0x0010_0000
TARGET = 0x0020_0000


@pytest.fixture
def m() -> Machine:
    return Machine()


DIRECT = [
    # CPL, selector, resulting CS or fault
    (0, CODE0, CODE0), (0, CODE0 | 3, (GP, CODE0)), (3, CODE3, CODE3), (3, CODE3 & ~3, CODE3),
    (3, CODE0, (GP, CODE0)), (0, CODE3, (GP, CODE3 & ~3)), (1, CODE1, CODE1), (1, CODE0, (GP, CODE0)),
    (0, CONFORMING, CONFORMING), (3, CONFORMING, CONFORMING | 3), (3, CONFORMING | 3, CONFORMING | 3),
    (0, CONFORMING | 3, CONFORMING), (0, CONFORMING3, (GP, CONFORMING3)), (3, CONFORMING3, CONFORMING3 | 3),
    (0, 0, (GP, 0)), (0, 3, (GP, 0)), (0, BEYOND, (GP, BEYOND)), (0, DATA0, (GP, DATA0)),
    (0, FREE, (GP, FREE)),
    (0, ABSENT_CODE, (NP, ABSENT_CODE)), (0, LDT_SEL, (GP, LDT_SEL)), (0, TSS_SEL, (GP, TSS_SEL)),
    (0, SMALL_CODE, (GP, 0)),
]  # fmt: skip


@pytest.mark.parametrize("action", [far.far_jump, far.far_call])
@pytest.mark.parametrize(("cpl", "selector", "result"), DIRECT)
def test_direct(m, action, cpl, selector, result):
    m.ring(cpl)
    top, old = m.cpu.regs[ESP], m.cpu.seg[CS].selector
    if isinstance(result, tuple):
        assert m.faults(action, m.cpu, selector, TARGET, 4) == result
        return
    action(m.cpu, selector, TARGET, 4)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.cpl) == (TARGET, result, cpl)
    if action is far.far_call:
        assert m.cpu.regs[ESP] == top - 8
        assert m.stack32(2) == [EIP, old]
    else:
        assert m.cpu.regs[ESP] == top


def test_16_bit_call(m):
    far.far_call(m.cpu, CODE16, 0x1234, 2)
    assert m.cpu.regs[ESP] == TOP0 - 4
    assert m.stack16(2) == [EIP & 0xFFFF, CODE0]
    assert not m.cpu.seg[CS].big
    assert ("mode_changed",) in m.hooks.calls


def test_call_on_a_full_stack(m):
    m.cpu.seg[SS] = parse(FREE, pack(0x9000, 0xFF, 0x4093))
    m.cpu.regs[ESP] = 0x104
    assert m.faults(far.far_call, m.cpu, CODE0, TARGET, 4) == (SS_FAULT, 0)
    m.cpu.regs[ESP] = 0x100
    far.far_call(m.cpu, CODE0, TARGET, 4)
    assert m.cpu.regs[ESP] == 0xF8


def test_call_pushes_as_the_user(m):
    m.ring(3)
    m.memory.supervisor.add((TOP3 - 4) >> 12)
    assert m.faults(far.far_call, m.cpu, CODE3, TARGET, 4) == (PF, 7)


# Call gates


def test_call_gate_inward_copies_parameters(m):
    m.ring(3)
    m.push32(0xAAAA, 0xBBBB, 0xCCCC)
    far.far_call(m.cpu, CALL_SEL, 0xDEAD, 4)
    assert (m.cpu.eip, m.cpu.cpl) == (HANDLER, 0)
    assert (m.cpu.seg[CS].selector, m.cpu.seg[SS].selector) == (CODE0, DATA0)
    assert m.cpu.regs[ESP] == TOP0 - 24
    assert m.stack32(6) == [EIP, CODE3, 0xAAAA, 0xBBBB, TOP3 - 12, DATA3]


def test_16_bit_call_gate_inward(m):
    m.describe(FREE, pack_gate(CALL_GATE16, CODE0, 0x99991234, dpl=3, parameters=1))
    m.ring(3)
    m.push32(0x2222_1111)
    far.far_call(m.cpu, FREE, 0, 4)
    assert m.cpu.eip == 0x1234
    assert m.stack16(5) == [EIP & 0xFFFF, CODE3, 0x1111, TOP3 - 4, DATA3]


@pytest.mark.parametrize("action", [far.far_jump, far.far_call])
@pytest.mark.parametrize(("cpl", "target"), [(0, CODE0), (3, CODE3 & ~3), (3, CONFORMING), (0, CODE0 | 3)])
def test_call_gate_at_the_same_privilege(m, action, cpl, target):
    m.describe(FREE, pack_gate(CALL_GATE32, target, HANDLER, dpl=3, parameters=5))
    m.ring(cpl)
    top = m.cpu.regs[ESP]
    action(m.cpu, FREE, 0, 4)
    assert (m.cpu.eip, m.cpu.cpl, m.cpu.seg[CS].selector) == (HANDLER, cpl, target & ~3 | cpl)
    assert m.cpu.regs[ESP] == (top - 8 if action is far.far_call else top)


GATE_FAULTS = [
    # CPL, gate, selector used, fault
    (3, pack_gate(CALL_GATE32, CODE0, HANDLER, dpl=0), FREE, (GP, FREE)),
    (0, pack_gate(CALL_GATE32, CODE0, HANDLER, dpl=0), FREE | 3, (GP, FREE)),
    (3, pack_gate(CALL_GATE32, CODE0, HANDLER, dpl=3, present=False), FREE, (NP, FREE)),
    (3, pack_gate(CALL_GATE32, 0, HANDLER, dpl=3), FREE, (GP, 0)),
    (3, pack_gate(CALL_GATE32, BEYOND, HANDLER, dpl=3), FREE, (GP, BEYOND)),
    (3, pack_gate(CALL_GATE32, DATA0, HANDLER, dpl=3), FREE, (GP, DATA0)),
    (0, pack_gate(CALL_GATE32, CODE3, HANDLER, dpl=3), FREE, (GP, CODE3 & ~3)),
    (3, pack_gate(CALL_GATE32, ABSENT_CODE, HANDLER, dpl=3), FREE, (NP, ABSENT_CODE)),
    (3, pack_gate(CALL_GATE32, SMALL_CODE, 0x1000, dpl=3), FREE, (GP, 0)),
    (3, pack_gate(INTERRUPT_GATE32, CODE0, HANDLER, dpl=3), FREE, (GP, FREE)),
]


@pytest.mark.parametrize(("cpl", "raw", "selector", "fault"), GATE_FAULTS)
def test_call_gate_faults(m, cpl, raw, selector, fault):
    m.describe(FREE, raw)
    m.ring(cpl)
    assert m.faults(far.far_call, m.cpu, selector, 0, 4) == fault


def test_a_jump_gains_no_privilege(m):
    m.ring(3)
    assert m.faults(far.far_jump, m.cpu, CALL_SEL, 0, 4) == (GP, CODE0)


STACKS = [
    (0, TOP0, (TS, 0)), (BEYOND, TOP0, (TS, BEYOND)), (DATA0 | 3, TOP0, (TS, DATA0)),
    (DATA3, TOP0, (TS, DATA3 & ~3)),
    (CODE0, TOP0, (TS, CODE0)), (ABSENT_DATA, TOP0, (SS_FAULT, ABSENT_DATA)), (FREE, 0x114, (SS_FAULT, FREE)),
]  # fmt: skip


@pytest.mark.parametrize(("selector", "esp", "fault"), STACKS)
def test_call_gate_stack_faults(m, selector, esp, fault):
    m.describe(FREE, pack(0x9000, 0xFF, 0x4093))
    m.memory.write32s(TSS + 4, [esp, selector])
    m.ring(3)
    m.push32(1, 2)
    assert m.faults(far.far_call, m.cpu, CALL_SEL, 0, 4) == fault


def test_call_gate_with_a_small_tss(m):
    m.cpu.tr = parse(TSS_SEL, pack(TSS, 8, 0x8B))
    m.ring(3)
    assert m.faults(far.far_call, m.cpu, CALL_SEL, 0, 4) == (TS, TSS_SEL)


# Returns

RETURNS = [
    # CPL, CS on the stack, result
    (0, CODE0, CODE0), (3, CODE3, CODE3), (3, CODE0, (GP, CODE0)), (3, CODE3 & ~3, (GP, CODE3 & ~3)),
    (0, 0, (GP, 0)), (0, BEYOND, (GP, BEYOND)), (0, DATA0, (GP, DATA0)), (0, ABSENT_CODE, (NP, ABSENT_CODE)),
    (0, CODE0 | 3, (GP, CODE0)), (0, CONFORMING, CONFORMING), (3, CONFORMING | 3, CONFORMING | 3),
    (0, CONFORMING3, (GP, CONFORMING3)), (0, SMALL_CODE, (GP, 0)), (0, TSS_SEL, (GP, TSS_SEL)),
]  # fmt: skip


@pytest.mark.parametrize("parameters", [0, 8])
@pytest.mark.parametrize(("cpl", "selector", "result"), RETURNS)
def test_same_level_return(m, cpl, selector, result, parameters):
    m.ring(cpl)
    m.push32(TARGET, selector | 0xABCD0000)
    top = m.cpu.regs[ESP]
    if isinstance(result, tuple):
        assert m.faults(far.far_return, m.cpu, 4, parameters) == result
        return
    far.far_return(m.cpu, 4, parameters)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.cpl) == (TARGET, result, cpl)
    assert m.cpu.regs[ESP] == top + 8 + parameters


def test_16_bit_return(m):
    m.push32(CODE16 << 16 | 0x1234)
    far.far_return(m.cpu, 2)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.regs[ESP]) == (0x1234, CODE16, TOP0)


def test_return_outward_releases_both_stacks_and_drops_segments(m):
    m.cpu.seg[FS] = parse(DATA3, m.descriptor(DATA3))
    m.cpu.seg[GS] = parse(CONFORMING, m.descriptor(CONFORMING))
    m.push32(TARGET, CODE3, 1, 2, TOP3 - 8, DATA3)
    far.far_return(m.cpu, 4, 8)
    assert (m.cpu.eip, m.cpu.cpl, m.cpu.seg[CS].selector, m.cpu.seg[SS].selector) == (TARGET, 3, CODE3, DATA3)
    assert m.cpu.regs[ESP] == TOP3
    assert [m.cpu.seg[i].selector for i in (ES, DS, FS, GS)] == [0, 0, DATA3, CONFORMING]
    assert not m.cpu.seg[DS].usable


def test_return_to_a_16_bit_stack_keeps_the_upper_half_of_esp(m):
    m.push32(TARGET, CODE3, 0x1234_5678, DATA16_3)
    m.cpu.seg[SS] = parse(FREE, pack(0xF000_0000, FLAT, 0xC093))
    m.cpu.regs[ESP] += 0x1000_0000
    far.far_return(m.cpu, 4)
    assert m.cpu.regs[ESP] == 0x1000_5678


OUTER_STACKS = [
    (0, (GP, 0)), (3, (GP, 0)), (DATA0, (GP, DATA0)), (DATA3 & ~3, (GP, DATA3 & ~3)),
    (CODE3, (GP, CODE3 & ~3)),
    (BEYOND | 3, (GP, BEYOND)), (ABSENT_STACK3, (SS_FAULT, ABSENT_STACK3 & ~3)),
]  # fmt: skip


@pytest.mark.parametrize(("selector", "fault"), OUTER_STACKS)
def test_return_outward_stack_faults(m, selector, fault):
    m.push32(TARGET, CODE3, TOP3, selector)
    assert m.faults(far.far_return, m.cpu, 4) == fault


def test_return_beyond_the_stack_limit(m):
    m.cpu.seg[SS] = parse(FREE, pack(0x8000, 0xFFF, 0x4093))
    m.memory.write32s(0x8FF8, [TARGET, CODE3])
    m.cpu.regs[ESP] = 0xFFC
    assert m.faults(far.far_return, m.cpu, 4) == (SS_FAULT, 0)
    m.cpu.regs[ESP] = 0xFF8
    assert m.faults(far.far_return, m.cpu, 4) == (SS_FAULT, 0)  # the outer SS:ESP is missing


def test_call_gate_and_return_are_inverse(m):
    m.ring(3)
    m.push32(7, 8)
    for index in (ES, DS):
        m.cpu.seg[index] = parse(DATA3, m.descriptor(DATA3))
    far.far_call(m.cpu, CALL_SEL, 0, 4)
    far.far_return(m.cpu, 4, 8)
    assert (m.cpu.eip, m.cpu.cpl, m.cpu.regs[ESP]) == (EIP, 3, TOP3)
    assert (m.cpu.seg[CS].selector, m.cpu.seg[SS].selector, m.cpu.seg[DS].selector) == (CODE3, DATA3, DATA3)


# Real and virtual-8086 mode


@pytest.mark.parametrize("mode", ["real", "virtual8086"])
def test_paragraph_transfers(m, mode):
    getattr(m, mode)()
    far.far_call(m.cpu, 0x2000, 0x10, 2)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.seg[CS].base) == (0x10, 0x2000, 0x20000)
    assert m.stack16(2) == [0x200, 0x100]
    far.far_return(m.cpu, 2, 2)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.regs[ESP]) == (0x200, 0x100, 0x402)
    far.far_jump(m.cpu, 0x3000, 0x20, 4)
    assert (m.cpu.eip, m.cpu.seg[CS].base) == (0x20, 0x30000)
    assert m.faults(far.far_jump, m.cpu, 0x3000, 0x10000, 4) == (GP, 0)
    m.push32(0x10000, 0x3000)
    assert m.faults(far.far_return, m.cpu, 4) == (GP, 0)


def test_the_way_into_protected_mode(m):
    m.real()
    m.cpu.cr0 |= CR0_PE
    far.far_jump(m.cpu, CODE0, TARGET, 4)
    assert (m.cpu.cpl, m.cpu.seg[CS].flat, m.cpu.seg[CS].big) == (0, True, True)


# SYSENTER, SYSEXIT [5.8.7]


def test_sysenter_and_sysexit(m):
    cpu = m.cpu
    cpu.sysenter_cs, cpu.sysenter_esp, cpu.sysenter_eip = 0x0B, TOP0, HANDLER  # RPL ignored
    m.ring(3)
    cpu.eflags = FIXED | IF
    far.sysenter(cpu)
    assert (cpu.eip, cpu.regs[ESP], cpu.cpl, cpu.eflags) == (HANDLER, TOP0, 0, FIXED)
    assert (cpu.seg[CS].selector, cpu.seg[SS].selector) == (0x08, 0x10)
    assert cpu.seg[CS].flat
    assert cpu.seg[SS].flat
    cpu.regs[ECX], cpu.regs[EDX] = TOP3, TARGET
    far.sysexit(cpu)
    assert (cpu.eip, cpu.regs[ESP], cpu.cpl, cpu.eflags) == (TARGET, TOP3, 3, FIXED)
    assert (cpu.seg[CS].selector, cpu.seg[SS].selector) == (0x1B, 0x23)
    assert cpu.seg[SS].dpl == 3
    assert m.hooks.calls.count(("privilege_changed",)) == 2


def test_sysenter_from_virtual_8086_mode(m):
    m.cpu.sysenter_cs, m.cpu.sysenter_eip = 8, HANDLER
    m.virtual8086()
    far.sysenter(m.cpu)
    assert not m.cpu.eflags & VM
    assert m.cpu.cpl == 0


def test_sysenter_and_sysexit_faults(m):
    assert m.faults(far.sysenter, m.cpu) == (GP, 0)
    assert m.faults(far.sysexit, m.cpu) == (GP, 0)
    m.cpu.sysenter_cs = 8
    m.ring(3)
    assert m.faults(far.sysexit, m.cpu) == (GP, 0)
    m.real()
    assert m.faults(far.sysenter, m.cpu) == (GP, 0)
    assert m.faults(far.sysexit, m.cpu) == (GP, 0)


def test_far_call_with_a_16_bit_stack(m):
    m.cpu.seg[SS] = parse(DATA16, m.descriptor(DATA16))
    m.cpu.regs[ESP] = 0x1234_0004
    far.far_call(m.cpu, CODE0, TARGET, 4)
    assert m.cpu.regs[ESP] == 0x1234_FFFC
    assert m.memory.read32(0x8000 + 0xFFFC) == EIP
    assert m.memory.read32(0x8000) == CODE0

"""IRET and IRETD in protected, virtual-8086 and real mode [SDM vol. 2]. Nested tasks are in test_tasks."""

import pytest

from cpu_node import gates, quick
from cpu_node.cpu import ESP
from cpu_node.descriptor import CS, DS, ES, FS, GS, SS, pack, parse
from cpu_node.errors import GP, NP, PF
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import AC, CF, DF, FIXED, ID, IF, IOPL, NT, OF, RF, TF, VIF, VIP, VM
from cpu_node.iret import iret
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_STACK3,
    BEYOND,
    CODE0,
    CODE1,
    CODE3,
    CODE16,
    CONFORMING,
    DATA0,
    DATA1,
    DATA3,
    DATA16_3,
    FREE,
    SMALL_CODE,
    TOP0,
    TOP1,
    TOP3,
    Machine,
)

TARGET = 0x0020_0000
ALL = FIXED | CF | OF | DF | TF | IF | IOPL | RF | AC | VIF | VIP | ID


@pytest.fixture(params=["quick", "full"])
def m(request, monkeypatch) -> Machine:
    if request.param == "full":
        monkeypatch.setattr(quick, "leave", lambda *args: False)
    return Machine()


def test_same_privilege(m):
    m.push32(TARGET, 0xDEAD0000 | CODE0, FIXED | IF | CF)
    m.cpu.nmi_blocked = True
    iret(m.cpu, 4)
    assert (m.cpu.eip, m.cpu.regs[ESP], m.cpu.eflags, m.cpu.cpl) == (TARGET, TOP0, FIXED | IF | CF, 0)
    assert not m.cpu.nmi_blocked
    assert m.hooks.calls == [("mode_changed",)]


def test_to_user_mode(m):
    m.push32(TARGET, CODE3, FIXED | IF, TOP3, DATA3)
    m.cpu.seg[FS] = parse(DATA3, m.descriptor(DATA3))
    iret(m.cpu, 4)
    assert (m.cpu.eip, m.cpu.regs[ESP], m.cpu.eflags, m.cpu.cpl) == (TARGET, TOP3, FIXED | IF, 3)
    assert (m.cpu.seg[CS].selector, m.cpu.seg[SS].selector) == (CODE3, DATA3)
    assert [m.cpu.seg[i].selector for i in (ES, DS, FS, GS)] == [0, 0, DATA3, 0]
    assert m.hooks.calls[-1] == ("privilege_changed",)


def test_a_frame_that_crosses_a_page(m):
    """The two words of an outer stack may lie in an absent page, which counts only if they are needed."""
    m.cpu.regs[ESP] = 0x9000 - 12
    m.memory.write32s(0x9000 - 12, [TARGET, CODE0, FIXED])
    m.memory.absent.add(9)
    iret(m.cpu, 4)
    assert m.cpu.regs[ESP] == 0x9000
    m.cpu.regs[ESP] = 0x9000 - 12
    m.memory.write32(0x9000 - 8, CODE3)
    assert m.faults(iret, m.cpu, 4) == (PF, 0)


FLAGS = [
    # CPL, IOPL before, operand size, bits that the image changes
    (0, 0, 4, ALL | NT), (0, 0, 2, (ALL | NT) & 0xFFFF), (1, 0, 4, (ALL | NT) & ~(IF | IOPL | VIF | VIP)),
    (1, 1, 4, (ALL | NT) & ~(IOPL | VIF | VIP)), (3, 2, 4, (ALL | NT) & ~(IF | IOPL | VIF | VIP)),
    (3, 3, 4, (ALL | NT) & ~(IOPL | VIF | VIP)), (3, 3, 2, (ALL | NT) & 0xFFFF & ~IOPL),
    (3, 0, 2, (ALL | NT) & 0xFFFF & ~(IF | IOPL)),
]  # fmt: skip


@pytest.mark.parametrize("set_bits", [True, False])
@pytest.mark.parametrize(("cpl", "iopl", "size", "changes"), FLAGS)
def test_flags_by_privilege(m, cpl, iopl, size, changes, set_bits):
    code = {0: CODE0, 1: CODE1, 3: CODE3}[cpl]
    m.ring(cpl)
    old = FIXED | iopl << 12 if set_bits else (ALL & ~IOPL) | iopl << 12
    image = ALL | NT if set_bits else 0
    m.cpu.eflags = old
    if size == 4:
        m.push32(0x1234, code, image)
    else:
        m.push32(code << 16 | 0x1234, image & 0xFFFF)
    iret(m.cpu, size)
    assert m.cpu.eflags == old & ~changes | image & changes | FIXED


CODES = [
    (0, 0, (GP, 0)), (0, 3, (GP, 0)), (0, BEYOND, (GP, BEYOND)), (0, DATA0, (GP, DATA0)),
    (0, ABSENT_CODE, (NP, ABSENT_CODE)), (3, CODE0, (GP, CODE0)), (0, CODE0 | 3, (GP, CODE0)),
    (0, SMALL_CODE, (GP, 0)), (1, CODE0, (GP, CODE0)), (3, CONFORMING, (GP, CONFORMING)),
]  # fmt: skip


@pytest.mark.parametrize(("cpl", "selector", "fault"), CODES)
def test_bad_code_segments(m, cpl, selector, fault):
    m.ring(cpl)
    m.push32(TARGET, selector, FIXED, TOP3, DATA3)
    assert m.faults(iret, m.cpu, 4) == fault


STACKS = [
    (CODE3, 0, (GP, 0)), (CODE3, DATA0, (GP, DATA0)), (CODE3, DATA3 & ~3, (GP, DATA3 & ~3)),
    (CODE3, BEYOND | 3, (GP, BEYOND)), (CODE3, ABSENT_STACK3, (SS_FAULT, ABSENT_STACK3 & ~3)),
    (CODE3, CODE3, (GP, CODE3 & ~3)), (CODE1, DATA3, (GP, DATA3 & ~3)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "selector", "fault"), STACKS)
@pytest.mark.parametrize("offset", [0, 0xFF4])
def test_bad_outer_stacks(m, code, selector, fault, offset):
    m.cpu.regs[ESP] = 0x8014 + offset  # in one page, and across two
    m.push32(TARGET, code, FIXED, TOP3, selector)
    assert m.faults(iret, m.cpu, 4) == fault


def test_to_ring_1(m):
    m.push32(TARGET, CODE1, FIXED, TOP1, DATA1)
    iret(m.cpu, 4)
    assert (m.cpu.cpl, m.cpu.seg[SS].selector, m.cpu.regs[ESP]) == (1, DATA1, TOP1)


def test_16_bit_forms(m):
    m.push32(CODE16 << 16 | 0x1234, FIXED)
    m.cpu.regs[ESP] += 2
    m.memory.write16(m.cpu.regs[ESP], 0x1234)
    m.memory.write16(m.cpu.regs[ESP] + 2, CODE16)
    m.memory.write16(m.cpu.regs[ESP] + 4, FIXED)
    iret(m.cpu, 2)
    assert (m.cpu.eip, m.cpu.seg[CS].selector, m.cpu.regs[ESP]) == (0x1234, CODE16, TOP0)
    m.push32(CODE3 << 16 | 0x1234, 0x5678 << 16 | FIXED, DATA3)
    m.cpu.seg[CS] = parse(CODE0, m.descriptor(CODE0))
    iret(m.cpu, 2)
    assert (m.cpu.cpl, m.cpu.regs[ESP]) == (3, 0x5678)


def test_to_a_16_bit_stack_keeps_the_upper_half_of_esp(m):
    m.cpu.seg[SS] = parse(FREE, pack(0xF000_0000, 0xFFFFF, 0xC093))
    m.cpu.regs[ESP] = 0x1000_9000
    m.push32(TARGET, CODE3, FIXED, 0xAAAA_5678, DATA16_3)
    iret(m.cpu, 4)
    assert m.cpu.regs[ESP] == 0x1000_5678


def test_stack_limit(m):
    m.cpu.seg[SS] = parse(FREE, pack(0x8000, 0xFFF, 0x4093))
    for esp, words in ((0xFF8, 2), (0xFF0, 4)):
        m.cpu.regs[ESP] = esp
        m.memory.write32s(0x8000 + esp, [TARGET, CODE3, FIXED, TOP3][:words])
        assert m.faults(iret, m.cpu, 4) == (SS_FAULT, 0)


@pytest.mark.parametrize("cpl", [1, 3])
def test_vm_in_the_image_counts_only_at_ring_0(m, cpl):
    m.ring(cpl)
    m.push32(TARGET, {1: CODE1, 3: CODE3}[cpl], FIXED | VM)
    iret(m.cpu, 4)
    assert m.cpu.eflags == FIXED


def test_to_virtual_8086_mode(m):
    flags = FIXED | VM | IF | IOPL | NT
    m.push32(0x1234, 0x100, flags, 0x8765_4321, 0x300, 0x11, 0x22, 0x33, 0x44)
    iret(m.cpu, 4)
    assert (m.cpu.eip, m.cpu.cpl, m.cpu.eflags, m.cpu.regs[ESP]) == (0x1234, 3, flags, 0x8765_4321)
    assert [s.selector for s in m.cpu.seg] == [0x11, 0x100, 0x300, 0x22, 0x33, 0x44]
    assert all(s.base == s.selector << 4 and s.highest == 0xFFFF and s.dpl == 3 for s in m.cpu.seg)
    assert m.hooks.calls[-1] == ("mode_changed",)


def test_to_virtual_8086_mode_beyond_64_kib(m):
    m.push32(0x10000, 0x100, FIXED | VM, 0, 0x300, 0, 0, 0, 0)
    assert m.faults(iret, m.cpu, 4) == (GP, 0)


def test_interrupt_and_iret_from_virtual_8086_mode_are_inverse(m):
    m.interrupt_gate(0x30)
    m.virtual8086()
    before = m.cpu.dump()
    gates.deliver(m.cpu, 0x30, external=True)
    iret(m.cpu, 4)
    assert m.cpu.dump() == before


@pytest.mark.parametrize("cpl", [0, 1, 3])
def test_interrupt_and_iret_are_inverse(m, cpl):
    m.interrupt_gate(0x30)
    m.ring(cpl)
    m.cpu.eflags = FIXED | IF | CF | DF | AC
    before = m.cpu.dump()
    gates.deliver(m.cpu, 0x30, external=True)
    for index in (ES, DS):
        m.cpu.seg[index] = parse(DATA3, m.descriptor(DATA3))
    iret(m.cpu, 4)
    after = m.cpu.dump()
    for state in (before, after):
        del state["es"], state["ds"]
    assert after == before


@pytest.mark.parametrize("iopl", [0, 1, 2])
def test_in_virtual_8086_mode_it_is_iopl_sensitive(m, iopl):
    m.virtual8086(iopl)
    assert m.faults(iret, m.cpu, 2) == (GP, 0)


def test_in_virtual_8086_mode(m):
    m.virtual8086()
    m.push32(0x2000_1234, FIXED | IF | NT)
    iret(m.cpu, 2)
    assert (m.cpu.eip, m.cpu.seg[CS].base, m.cpu.regs[ESP]) == (0x1234, 0x20000, 0x402 - 4)
    assert m.cpu.eflags == FIXED | VM | IOPL | IF | NT


def test_in_real_mode(m):
    m.real()
    m.cpu.eflags = FIXED | VIP
    m.push32(0x1234, 0x2000, ALL | VM | NT)
    iret(m.cpu, 4)
    assert (m.cpu.eip, m.cpu.seg[CS].base, m.cpu.regs[ESP]) == (0x1234, 0x20000, 0x400)
    assert m.cpu.eflags == (ALL | NT) & ~(VIF | VIP) | VIP
    m.push32(0x10000, 0x2000, FIXED)
    assert m.faults(iret, m.cpu, 4) == (GP, 0)

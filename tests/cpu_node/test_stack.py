"""Stack instructions and stack addressing [SDM vol. 2 ENTER, LEAVE, PUSHF, POPF; vol. 3A 3.4.5.1, 5.3]."""

import pytest

from cpu_node import stack
from cpu_node.cpu import EBP, ESP
from cpu_node.descriptor import SS, pack, parse
from cpu_node.errors import GP, PF, GuestFault
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import AC, CF, DF, FIXED, ID, IF, IOPL, NT, OF, RF, TF, VIF, VIP, VM, popf_merged
from tests.cpu_node.kit import DATA16, FREE, TOP0, TOP3, Machine

ALL = 0x003F_7FD7  # every defined flag


@pytest.fixture
def m() -> Machine:
    return Machine()


def set_stack(m, raw, esp):
    m.cpu.seg[SS] = parse(FREE, raw)
    m.cpu.regs[ESP] = esp


LIMITS = [
    # SS descriptor, ESP, size, the offset written or None for #SS
    (pack(0x8000, 0xFFF, 0x4093), 0x1000, 4, 0xFFC),
    (pack(0x8000, 0xFFF, 0x4093), 0x1001, 4, None),
    (pack(0x8000, 0xFFF, 0x4093), 0, 4, None),
    (pack(0x8000, 0xFFFF, 0x0093), 0, 4, 0xFFFC),  # SP wraps
    (pack(0x8000, 0xFFFF, 0x0093), 2, 4, None),  # would wrap within the dword
    (pack(0x8000, 0xFFFF, 0x0093), 2, 2, 0),
    (pack(0x8000, 0xFFFF, 0x0093), 0xABCD_0002, 2, 0),
    (pack(0, 0xFFFFF, 0xC093), 0, 4, 0xFFFF_FFFC),
    (pack(0, 0xFFF, 0x4097), 0x1004, 4, 0x1000),  # expand-down: 1000h and up
    (pack(0, 0xFFF, 0x4097), 0x1003, 4, None),
    (pack(0, 0xFFF, 0x0097), 0, 4, 0xFFFC),
    (pack(0, 0xFFF, 0x4097), 0, 4, 0xFFFF_FFFC),
]


@pytest.mark.parametrize(("raw", "esp", "size", "offset"), LIMITS)
def test_push_limits(m, raw, esp, size, offset):
    set_stack(m, raw, esp)
    if offset is None:
        assert m.faults(stack.push, m.cpu, (0x11223344,), size) == (SS_FAULT, 0)
        return
    stack.push(m.cpu, (0x11223344,), size)
    span = m.cpu.seg[SS].span
    assert m.cpu.regs[ESP] == esp & ~span | offset
    value = m.memory.read32(m.cpu.seg[SS].base + offset)
    assert value & ((1 << 8 * size) - 1) == 0x11223344 & ((1 << 8 * size) - 1)
    assert list(stack.peek(m.cpu, 1, size)) == [0x11223344 & ((1 << 8 * size) - 1)]
    stack.release(m.cpu, size)
    assert m.cpu.regs[ESP] == esp


def test_a_frame_is_written_whole_or_not_at_all(m):
    m.cpu.regs[ESP] = 0x9008
    m.memory.absent.add(8)
    assert m.faults(stack.push, m.cpu, (1, 2, 3), 4) == (PF, 2)
    m.cpu.regs[ESP] = 0x9004
    assert m.faults(stack.push, m.cpu, (1, 2, 3), 2) == (PF, 2)


PUSHED = ALL & ~(VM | RF)


@pytest.mark.parametrize(("size", "expected"), [(4, PUSHED), (2, PUSHED & 0xFFFF)])
def test_pushf(m, size, expected):
    m.cpu.eflags = ALL & ~VM
    stack.pushf(m.cpu, size)
    assert m.cpu.regs[ESP] == TOP0 - size
    assert m.memory.read32(TOP0 - size) & (1 << 8 * size) - 1 == expected


ARITHMETIC = CF | 0x14 | 0xC0 | OF | DF | TF | NT
POPF = [
    # CPL, IOPL before, size, changeable
    (0, 0, 4, ARITHMETIC | IF | IOPL | AC | ID), (0, 0, 2, ARITHMETIC | IF | IOPL),
    (1, 0, 4, ARITHMETIC | AC | ID), (1, 1, 4, ARITHMETIC | IF | AC | ID), (3, 2, 4, ARITHMETIC | AC | ID),
    (3, 3, 4, ARITHMETIC | IF | AC | ID), (3, 3, 2, ARITHMETIC | IF), (3, 0, 2, ARITHMETIC),
]  # fmt: skip


@pytest.mark.parametrize(("cpl", "iopl", "size", "changeable"), POPF)
def test_popf(cpl, iopl, size, changeable):
    old = FIXED | iopl << 12 | VIF | VIP
    assert popf_merged(old, ALL, cpl, size) == old & ~changeable | changeable | FIXED
    old = ALL & ~(VM | RF | IOPL) | iopl << 12
    assert popf_merged(old, 0, cpl, size) == old & ~changeable | FIXED


def test_popfd_clears_rf(m):
    m.cpu.eflags = FIXED | RF
    m.push32(RF | VM)
    stack.popf(m.cpu, 4)
    assert m.cpu.eflags == FIXED
    assert m.cpu.regs[ESP] == TOP0


@pytest.mark.parametrize("action", [stack.pushf, stack.popf])
@pytest.mark.parametrize("iopl", [0, 3])
def test_flags_in_virtual_8086_mode(m, action, iopl):
    m.virtual8086(iopl)
    if iopl == 3:
        action(m.cpu, 2)
        assert m.cpu.eflags & VM
    else:
        assert m.faults(action, m.cpu, 2) == (GP, 0)


def test_popf_in_virtual_8086_mode(m):
    m.virtual8086()
    m.push32(IF | NT)
    stack.popf(m.cpu, 2)
    assert m.cpu.eflags == FIXED | VM | IOPL | IF | NT


def test_enter_and_leave(m):
    m.cpu.regs[EBP] = 0xCAFE
    stack.enter(m.cpu, 0x20, 0, 4)
    assert (m.cpu.regs[EBP], m.cpu.regs[ESP]) == (TOP0 - 4, TOP0 - 0x24)
    assert m.memory.read32(TOP0 - 4) == 0xCAFE
    stack.leave(m.cpu, 4)
    assert (m.cpu.regs[EBP], m.cpu.regs[ESP]) == (0xCAFE, TOP0)


def test_nested_enter(m):
    """Level 3 copies two pointers of the enclosing frames and adds its own."""
    m.memory.write32s(0x8800 - 8, [0x2222, 0x1111])
    m.cpu.regs[EBP] = 0x8800
    stack.enter(m.cpu, 0x10, 3 + 32, 4)
    frame = TOP0 - 4
    assert (m.cpu.regs[EBP], m.cpu.regs[ESP]) == (frame, TOP0 - 16 - 0x10)
    assert list(m.memory.read32s(TOP0 - 16, 4)) == [frame, 0x2222, 0x1111, 0x8800]


def test_nested_enter_reads_what_it_just_pushed(m):
    m.cpu.regs[EBP] = TOP0
    stack.enter(m.cpu, 0, 2, 4)
    assert list(m.memory.read32s(TOP0 - 12, 3)) == [TOP0 - 4, TOP0, TOP0]


def test_16_bit_enter_and_leave(m):
    m.cpu.seg[SS] = parse(DATA16, m.descriptor(DATA16))
    m.cpu.regs[ESP], m.cpu.regs[EBP] = 0x1234_1000, 0x5678_2000
    stack.enter(m.cpu, 8, 1, 2)
    assert (m.cpu.regs[ESP], m.cpu.regs[EBP]) == (0x1234_0FF4, 0x5678_0FFE)
    assert [m.memory.read16(0x8000 + at) for at in (0xFFC, 0xFFE)] == [0xFFE, 0x2000]
    stack.leave(m.cpu, 2)
    assert (m.cpu.regs[ESP], m.cpu.regs[EBP]) == (0x1234_1000, 0x5678_2000)


def test_enter_faults_change_no_register(m):
    m.memory.absent.add(7)
    m.cpu.regs[EBP] = 0x1234_5678
    before = m.cpu.dump()
    with pytest.raises(GuestFault) as fault:  # the final stack pointer's page
        stack.enter(m.cpu, 0x1800, 0, 4)
    assert (fault.value.vector, fault.value.error, m.cpu.dump()) == (PF, 2, before)
    assert m.memory.read32(m.cpu.regs[ESP] - 4) == 0x1234_5678  # pushed before that page is looked at
    m.cpu.regs[EBP] = 0x7800
    before = m.cpu.dump()
    with pytest.raises(GuestFault) as fault:  # the display
        stack.enter(m.cpu, 0, 2, 4)
    assert (fault.value.vector, fault.value.error, m.cpu.dump()) == (PF, 0, before)
    assert m.memory.read32(m.cpu.regs[ESP] - 4) == 0x7800
    set_stack(m, pack(0x8000, 0xFFF, 0x4093), 0x10)
    assert m.faults(stack.enter, m.cpu, 0x20, 0, 4) == (SS_FAULT, 0)
    assert m.faults(stack.enter, m.cpu, 0, 5, 4)[0] == SS_FAULT


def test_leave_beyond_the_limit(m):
    set_stack(m, pack(0x8000, 0xFFF, 0x4093), 0x10)
    m.cpu.regs[EBP] = 0x1000
    assert m.faults(stack.leave, m.cpu, 4) == (SS_FAULT, 0)


def test_user_stack_accesses_are_user_accesses(m):
    m.ring(3)
    m.memory.supervisor.add((TOP3 - 1) >> 12)
    assert m.faults(stack.push, m.cpu, (1,), 4) == (PF, 7)
    m.cpu.regs[ESP] -= 4
    assert m.faults(stack.popf, m.cpu, 4) == (PF, 5)


def test_a_frame_of_no_values_is_not_looked_for(m):
    """A call gate without parameters: the caller's ESP may point to where no page is [SDM vol. 2 CALL]."""
    nowhere = object()
    for size in (2, 4):
        assert list(stack.read_frame(nowhere, m.cpu.seg[SS], 0x1000, 0, size, True)) == []

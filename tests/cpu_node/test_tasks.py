"""Task switches by CALL, JMP and IRET [SDM vol. 3A chapter 7, table 7-2], and the I/O permission bitmap."""

import pytest

from cpu_node import far, tasks
from cpu_node.cpu import CR0_PG, CR0_TS, DR6_BT, EAX, EDI, ESP
from cpu_node.descriptor import (
    BUSY_RAW,
    CS,
    DS,
    ES,
    FS,
    SS,
    TASK_GATE,
    TSS32_AVAILABLE,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import GP, NP, PF, TS
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import CF, FIXED, IF, NT, VM
from cpu_node.iret import iret
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_DATA,
    BEYOND,
    CODE0,
    CODE3,
    CONFORMING,
    CONFORMING3,
    DATA0,
    DATA3,
    EXEC_ONLY3,
    FREE,
    GDT,
    HANDLER,
    LDT_SEL,
    SMALL_CODE,
    TASK_SEL,
    TOP0,
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

EIP = 0x0010_0000
B_EIP = 0x7000


@pytest.fixture
def m() -> Machine:
    machine = Machine()
    describe_task(machine)
    return machine


def describe_task(m, **changes):
    """TSS_B as a runnable ring-0 task."""
    s = {"cr3": 0, "eip": B_EIP, "eflags": FIXED | IF, "esp": TOP_B, "trap": 0, "ldt": LDT_SEL}
    s |= {"es": 0, "cs": CODE0, "ss": DATA0, "ds": DATA0, "fs": 0, "gs": 0} | changes
    regs = [0x10, 0x11, 0x12, 0x13, s["esp"], 0x15, 0x16, 0x17]
    m.memory.write32s(TSS_B + 0x1C, [s["cr3"], s["eip"], s["eflags"], *regs])
    m.memory.write32s(TSS_B + 0x48, [s[n] for n in ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap")])


def busy(m, selector):
    return bool(m.descriptor(selector) & BUSY_RAW)


@pytest.mark.parametrize("selector", [TSS_B_SEL, TASK_SEL, TSS_B_SEL | 3])
@pytest.mark.parametrize("action", [far.far_jump, far.far_call])
def test_switch(m, action, selector):
    m.cpu.regs[EAX], m.cpu.regs[EDI] = 0xAAAA, 0xDDDD
    m.cpu.eflags = FIXED | CF
    m.cpu.dr[7] = 0x000F_07FF
    action(m.cpu, selector, 0xDEAD, 4)
    cpu = m.cpu
    nested = action is far.far_call
    assert (cpu.eip, cpu.cpl, cpu.tr.selector & ~3, cpu.tr.type) == (B_EIP, 0, TSS_B_SEL, 11)
    assert list(cpu.regs) == [0x10, 0x11, 0x12, 0x13, TOP_B, 0x15, 0x16, 0x17]
    assert cpu.eflags == FIXED | IF | (NT if nested else 0)
    assert [s.selector for s in cpu.seg] == [0, CODE0, DATA0, DATA0, 0, 0]
    assert cpu.ldtr.selector == LDT_SEL
    assert cpu.cr0 & CR0_TS
    assert cpu.dr[7] == 0x000F_06AA  # the local enables are gone
    assert cpu.pending_debug == 0
    assert (busy(m, TSS_SEL), busy(m, TSS_B_SEL)) == (nested, True)
    assert m.memory.read16(TSS_B) == (TSS_SEL if nested else 0)
    assert list(m.memory.read32s(TSS + 0x20, 3)) == [EIP, FIXED | CF, 0xAAAA]
    assert list(m.memory.read32s(TSS + 0x38, 4)) == [TOP0, 0, 0, 0xDDDD]
    assert [m.memory.read16(TSS + 0x48 + 4 * i) for i in range(6)] == [DATA0, CODE0, DATA0, DATA0, 0, 0]
    assert ("mode_changed",) in m.hooks.calls
    assert ("flush_tlb", False) not in m.hooks.calls


def test_call_and_iret(m):
    m.cpu.regs[EAX] = 0xAAAA
    m.memory.write16(TSS + 0x60, LDT_SEL)  # the LDT is read from the TSS but never saved there
    before = m.cpu.dump()
    far.far_call(m.cpu, TSS_B_SEL, 0, 4)
    m.cpu.eip = B_EIP + 1  # past its IRET
    iret(m.cpu, 4)
    after = m.cpu.dump()
    assert after["cr0"] == before["cr0"] | CR0_TS
    before["cr0"] |= CR0_TS
    assert after == before
    assert (busy(m, TSS_SEL), busy(m, TSS_B_SEL)) == (True, False)
    assert list(m.memory.read32s(TSS_B + 0x20, 2)) == [B_EIP + 1, FIXED | IF]  # NT cleared in the image


def test_switch_to_user_mode(m):
    describe_task(m, cs=CODE3, ss=DATA3, ds=DATA3, es=DATA3, esp=TOP3)
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert (m.cpu.cpl, m.cpu.seg[SS].selector, m.cpu.seg[ES].selector) == (3, DATA3, DATA3)


def test_switch_to_virtual_8086_mode(m):
    describe_task(m, eflags=FIXED | VM, eip=0x200, cs=0x100, ss=0x300, ds=0x400, es=0, ldt=0)
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert (m.cpu.cpl, m.cpu.seg[CS].base, m.cpu.seg[FS].usable) == (3, 0x1000, True)


def test_16_bit_tss(m):
    words = [0x1234, FIXED, 1, 2, 3, 4, 0x8000, 6, 7, 8, DATA0, CODE0, DATA0, DATA0, 0]
    for i, word in enumerate(words):
        m.memory.write16(TSS_16 + 0x0E + 2 * i, word)
    m.cpu.seg[FS] = parse(DATA0, m.descriptor(DATA0))
    far.far_call(m.cpu, TSS_16_SEL, 0, 4)
    assert (m.cpu.eip, m.cpu.regs[ESP] & 0xFFFF, m.cpu.regs[EDI] & 0xFFFF) == (0x1234, 0x8000, 8)
    assert m.cpu.eflags == FIXED | NT
    assert [s.selector for s in m.cpu.seg] == [DATA0, CODE0, DATA0, DATA0, 0, 0]
    m.cpu.eip = 0x1300
    iret(m.cpu, 4)
    assert (m.cpu.eip, m.cpu.regs[ESP], m.cpu.tr.selector) == (EIP, TOP0, TSS_SEL)
    assert m.memory.read16(TSS_16 + 0x0E) == 0x1300


@pytest.mark.parametrize("same", [True, False])
def test_cr3_is_loaded_only_with_paging(m, same):
    describe_task(m, cr3=0x3000)
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert m.cpu.cr3 == 0
    m = Machine()
    describe_task(m, cr3=0x3000)
    m.cpu.cr0 |= CR0_PG
    m.cpu.cr3 = 0x3000 if same else 0x2000
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert m.cpu.cr3 == 0x3000
    assert (("flush_tlb", False) in m.hooks.calls) == (not same)


def test_the_trap_bit_asks_for_a_debug_trap(m):
    describe_task(m, trap=1)
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert m.cpu.pending_debug == DR6_BT


GATE = pack_gate(TASK_GATE, BEYOND, 0, dpl=3)
REFUSED = [
    # CPL, descriptor of FREE, selector used, fault
    (0, pack(TSS_B, 0x67, 0x8B), FREE, (GP, FREE)),  # busy
    (3, pack(TSS_B, 0x67, 0x89), FREE, (GP, FREE)),  # DPL
    (0, pack(TSS_B, 0x67, 0x89), FREE | 3, (GP, FREE)),
    (0, pack(TSS_B, 0x67, 0x09), FREE, (NP, FREE)),
    (0, pack(TSS_B, 0x66, 0x89), FREE, (TS, FREE)),
    (0, pack(TSS_16, 0x2A, 0x81), FREE, (TS, FREE)),
    (3, pack_gate(TASK_GATE, TSS_B_SEL, 0, dpl=0), FREE, (GP, FREE)),
    (0, pack_gate(TASK_GATE, TSS_B_SEL, 0, present=False), FREE, (NP, FREE)),
    (0, GATE, FREE, (GP, BEYOND)),
    (0, pack_gate(TASK_GATE, TSS_B_SEL | 4, 0), FREE, (GP, TSS_B_SEL | 4)),
    (0, pack_gate(TASK_GATE, TSS_SEL, 0), FREE, (GP, TSS_SEL)),
    (0, pack_gate(TASK_GATE, 0, 0), FREE, (GP, 0)),
]


@pytest.mark.parametrize("action", [far.far_jump, far.far_call])
@pytest.mark.parametrize(("cpl", "raw", "selector", "fault"), REFUSED)
def test_refused_before_the_switch(m, action, cpl, raw, selector, fault):
    m.describe(FREE, raw)
    m.ring(cpl)
    assert m.faults(action, m.cpu, selector, 0, 4) == fault


def test_a_tss_in_the_ldt_is_refused(m):
    m.describe(0x0C, pack(TSS_B, 0x67, 0x89))
    assert m.faults(far.far_jump, m.cpu, 0x0C, 0, 4) == (GP, 0x0C)


@pytest.mark.parametrize("page", [TSS_B >> 12, TSS >> 12])
def test_a_page_fault_before_the_switch_changes_nothing(m, page):
    m.memory.absent.add(page)
    assert m.faults(far.far_call, m.cpu, TSS_B_SEL, 0, 4)[0] == PF


@pytest.mark.parametrize("page", [TSS >> 12, GDT >> 12])
def test_a_read_only_page_before_the_switch_changes_nothing(m, page):
    m.memory.read_only.add(page)
    assert m.faults(far.far_jump, m.cpu, TSS_B_SEL, 0, 4) == (PF, 3)


# Faults after the commit point are delivered in the new task [7.3].
LATE = [
    ({"ldt": DATA0}, TS, DATA0), ({"ldt": LDT_SEL | 4}, TS, LDT_SEL | 4), ({"ldt": BEYOND}, TS, BEYOND),
    ({"ss": 0}, TS, 0), ({"ss": DATA3}, TS, DATA3 & ~3), ({"ss": ABSENT_DATA}, SS_FAULT, ABSENT_DATA),
    ({"ds": CODE3 | 0x1000}, TS, 0x1018), ({"es": ABSENT_DATA}, NP, ABSENT_DATA),
    ({"fs": EXEC_ONLY3}, TS, EXEC_ONLY3 & ~3), ({"gs": TSS_SEL}, TS, TSS_SEL),
    ({"cs": ABSENT_CODE}, NP, ABSENT_CODE), ({"cs": DATA0}, TS, DATA0), ({"cs": 0}, TS, 0),
    ({"cs": CONFORMING3}, TS, CONFORMING3), ({"cs": SMALL_CODE}, GP, 0),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "vector", "error"), LATE)
def test_faults_in_the_new_task(m, changes, vector, error):
    """Through a task gate, since the new task's own stack may be the problem."""
    describe_task(m, **changes)
    m.describe(FREE, pack(0x7000, 0x67, 0x80 | TSS32_AVAILABLE))
    m.memory.write32s(0x7020, [HANDLER, FIXED, 0, 0, 0, 0, 0xD000, 0, 0, 0])
    m.memory.write32s(0x7048, [0, CODE0, DATA0, 0, 0, 0, 0, 0])
    m.gate(vector, pack_gate(TASK_GATE, FREE, 0))
    far.far_call(m.cpu, TSS_B_SEL, 0, 4)
    assert (m.cpu.eip, m.cpu.tr.selector) == (HANDLER, FREE)
    assert m.stack32(1) == [error]
    assert m.memory.read16(0x7000) == TSS_B_SEL
    assert m.memory.read32(TSS_B + 0x20) == B_EIP


def test_conforming_code_of_a_task(m):
    describe_task(m, cs=CONFORMING | 3, ss=DATA3, ds=0)
    far.far_jump(m.cpu, TSS_B_SEL, 0, 4)
    assert (m.cpu.cpl, m.cpu.seg[CS].selector) == (3, CONFORMING | 3)
    assert not m.cpu.seg[DS].usable


LINKS = [
    (TSS_B_SEL, (TS, TSS_B_SEL)),  # not busy
    (DATA0, (TS, DATA0)), (0, (TS, 0)), (BEYOND, (TS, BEYOND)), (TSS_SEL | 4, (TS, TSS_SEL | 4)),
    (FREE, (NP, FREE)),
]  # fmt: skip


@pytest.mark.parametrize(("link", "fault"), LINKS)
def test_bad_back_links(m, link, fault):
    m.describe(FREE, pack(TSS_B, 0x67, 0x0B))
    m.cpu.eflags |= NT
    m.memory.write16(TSS, link)
    assert m.faults(iret, m.cpu, 4) == fault


# The I/O permission bitmap [vol. 1, 19.5.2]


def io_map(m, *open_ports, base=0x68):
    m.memory.write16(TSS + 0x66, base)
    bits = bytearray(b"\xff" * 0x2001)
    for port in open_ports:
        bits[port >> 3] &= ~(1 << (port & 7)) & 0xFF
    m.memory.data[TSS + base : TSS + base + len(bits)] = bits
    m.cpu.tr = parse(TSS_SEL, pack(TSS, base + 0x2000, 0x8B))


@pytest.mark.parametrize(
    ("port", "width", "allowed"),
    [
        (0x60, 1, True), (0x61, 1, False), (0x60, 2, False), (0x3F8, 4, True), (0x3F7, 1, False),
        (0x3F9, 4, False),
        (0x7F, 2, True), (0xFFFF, 1, True), (0xFFFE, 2, False),
    ],
)  # fmt: skip
def test_io_bitmap(m, port, width, allowed):
    io_map(m, 0x60, 0x3F8, 0x3F9, 0x3FA, 0x3FB, 0x7F, 0x80, 0xFFFF)
    m.ring(3)
    if allowed:
        tasks.check_io(m.cpu, port, width)
    else:
        assert m.faults(tasks.check_io, m.cpu, port, width) == (GP, 0)


@pytest.mark.parametrize(
    ("cpl", "iopl", "allowed"), [(0, 0, True), (1, 0, False), (1, 1, True), (3, 2, False), (3, 3, True)]
)
def test_iopl(m, cpl, iopl, allowed):
    m.ring(cpl)
    m.memory.write16(TSS + 0x66, 0x68)
    m.cpu.tr = parse(TSS_SEL, pack(TSS, 0x67, 0x8B))  # no bitmap at all
    m.cpu.eflags = FIXED | iopl << 12
    if allowed:
        tasks.check_io(m.cpu, 0x80, 1)
    else:
        assert m.faults(tasks.check_io, m.cpu, 0x80, 1) == (GP, 0)


def test_virtual_8086_mode_always_asks_the_bitmap(m):
    io_map(m, 0x60)
    m.virtual8086(iopl=3)
    tasks.check_io(m.cpu, 0x60, 1)
    assert m.faults(tasks.check_io, m.cpu, 0x61, 1) == (GP, 0)


def test_real_mode_allows_all(m):
    m.real()
    tasks.check_io(m.cpu, 0x61, 4)


def test_the_bitmap_ends_with_the_tss(m):
    io_map(m, 0x00, 0x08)
    m.cpu.tr = parse(TSS_SEL, pack(TSS, 0x69, 0x8B))
    m.ring(3)
    tasks.check_io(m.cpu, 0x00, 1)
    assert m.faults(tasks.check_io, m.cpu, 0x08, 1) == (GP, 0)  # its second byte lies outside


def test_a_16_bit_tss_has_no_bitmap(m):
    m.cpu.tr = parse(TSS_16_SEL, m.descriptor(TSS_16_SEL) | BUSY_RAW)
    m.ring(3)
    assert m.faults(tasks.check_io, m.cpu, 0, 1) == (GP, 0)

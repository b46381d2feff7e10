"""Control and debug registers, table registers, CLI, STI, HLT [SDM vol. 3A 2.5, 4.10.4; vol. 3B 17.2]."""

import pytest

from cpu_node import control
from cpu_node.cpu import CR0_ET, CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_DE, DR6_BD
from cpu_node.errors import DB, GP, UD
from cpu_node.flags import FIXED, IF, VM
from tests.cpu_node.kit import Machine

FLUSH_ALL, FLUSH = ("flush_tlb", True), ("flush_tlb", False)
MODE = ("mode_changed",)


@pytest.fixture
def m() -> Machine:
    return Machine()


CR_WRITES = [
    # number, before, value, after or fault, calls
    (0, 0x11, 0x80000011, 0x80000011, [FLUSH_ALL, MODE]),
    (0, 0x80000011, 0x11, 0x11, [FLUSH_ALL, MODE]),
    (0, 0x11, 0x80000010, (GP, 0), None),  # PG without PE
    (0, 0x11, 0x20000011, (GP, 0), None),  # NW without CD
    (0, 0x11, 0x60000011, 0x60000011, [MODE]),
    (0, 0x11, 0x00010001, 0x00010011, [FLUSH_ALL, MODE]),  # WP; ET can't be cleared
    (0, 0x11, 0x1FFAFFD1, 0x00000011, []),  # reserved bits are ignored
    (0, 0x11, 0x00000010, 0x00000010, [FLUSH_ALL, MODE]),
    (0, 0x11, 0x0000001F, 0x0000001F, [MODE]),
    (2, 0, 0x12345678, 0x12345678, []),
    (3, 0x1000, 0x1000, 0x1000, [FLUSH]),  # the same value flushes too
    (3, 0x1000, 0x2018, 0x2018, [FLUSH]),
    (4, 0, 0x10, 0x10, [FLUSH_ALL, MODE]),
    (4, 0x10, 0x90, 0x90, [FLUSH_ALL, MODE]),
    (4, 0x90, 0x690, 0x690, [MODE]),
    (4, 0x90, 0x90, 0x90, []),
    (4, 0, 0x78C, 0x78C, [FLUSH_ALL, MODE]),
    (4, 0, 0x01, (GP, 0), None),  # VME, PVI, PAE, MCE: not claimed
    (4, 0, 0x02, (GP, 0), None),
    (4, 0, 0x20, (GP, 0), None),
    (4, 0, 0x40, (GP, 0), None),
    (4, 0, 0x800, (GP, 0), None),
    (4, 0, 0x40000, (GP, 0), None),
    (1, 0, 0, (UD, None), None),
    (5, 0, 0, (UD, None), None),
    (7, 0, 0, (UD, None), None),
]


@pytest.mark.parametrize(("number", "before", "value", "after", "calls"), CR_WRITES)
def test_write_cr(m, number, before, value, after, calls):
    if number in (0, 2, 3, 4):
        setattr(m.cpu, f"cr{number}", before)
    if isinstance(after, tuple):
        assert m.faults(control.write_cr, m.cpu, number, value) == after
        return
    control.write_cr(m.cpu, number, value)
    assert getattr(m.cpu, f"cr{number}") == after
    assert control.read_cr(m.cpu, number) == after
    assert m.hooks.calls == calls


@pytest.mark.parametrize("number", [1, 5, 6, 7])
def test_no_such_control_register(m, number):
    assert m.faults(control.read_cr, m.cpu, number) == (UD, None)


def test_lmsw(m):
    control.lmsw(m.cpu, 0xFFFE)
    assert m.cpu.cr0 == CR0_PE | CR0_ET | 0xE  # PE stays, nothing above bit 3 changes
    control.lmsw(m.cpu, 0)
    assert m.cpu.cr0 == CR0_PE | CR0_ET
    m.real()
    control.lmsw(m.cpu, 1)
    assert m.cpu.cr0 & CR0_PE
    assert control.smsw(m.cpu) == m.cpu.cr0


def test_clts(m):
    m.cpu.cr0 |= CR0_TS | CR0_WP
    control.clts(m.cpu)
    control.clts(m.cpu)
    assert m.cpu.cr0 == CR0_PE | CR0_ET | CR0_WP
    assert m.hooks.calls == [MODE]


PRIVILEGED = [
    lambda c: control.read_cr(c, 0),
    lambda c: control.write_cr(c, 3, 0),
    lambda c: control.read_dr(c, 0),
    lambda c: control.write_dr(c, 7, 0),
    lambda c: control.lmsw(c, 0),
    control.clts,
    control.hlt,
    control.wbinvd,
    lambda c: control.invlpg(c, 0),
    lambda c: control.lgdt(c, 0, 0, 4),
    lambda c: control.lidt(c, 0, 0, 4),
]


@pytest.mark.parametrize("action", PRIVILEGED)
@pytest.mark.parametrize("mode", [1, 3, "virtual8086"])
def test_privilege(m, action, mode):
    if mode == "virtual8086":
        m.virtual8086()
    else:
        m.ring(mode)
    assert m.faults(action, m.cpu) == (GP, 0)


@pytest.mark.parametrize("action", PRIVILEGED)
def test_real_mode_allows_all(m, action):
    m.real()
    action(m.cpu)


@pytest.mark.parametrize(
    ("number", "value", "stored"),
    [
        (0, 0x12345678, 0x12345678), (3, 0xFFFFFFFF, 0xFFFFFFFF), (6, 0, 0xFFFF0FF0),
        (6, 0xFFFFFFFF, 0xFFFFEFFF),
        (7, 0, 0x400), (7, 0xFFFFDFFF, 0xFFFF07FF), (7, 0x000F0001, 0x000F0401),
    ],
)  # fmt: skip
def test_debug_registers(m, number, value, stored):
    control.write_dr(m.cpu, number, value)
    assert control.read_dr(m.cpu, number) == stored
    alias = number - 2
    if number >= 6:
        assert control.read_dr(m.cpu, alias) == stored
        m.cpu.cr4 |= CR4_DE
        assert m.faults(control.read_dr, m.cpu, alias) == (UD, None)
        assert m.faults(control.write_dr, m.cpu, alias, 0) == (UD, None)


def test_breakpoint_changes_are_told(m):
    control.write_dr(m.cpu, 0, 0x1000)
    control.write_dr(m.cpu, 7, 0x1)
    control.write_dr(m.cpu, 7, 0x1)
    control.write_dr(m.cpu, 6, 0xF)
    assert m.hooks.calls == [MODE, MODE]


def test_general_detect(m):
    m.cpu.dr[7] |= 0x2000
    m.cpu.dr[6] |= DR6_BD  # set by the first of the two
    assert m.faults(control.read_dr, m.cpu, 0) == (DB, None)
    assert m.faults(control.write_dr, m.cpu, 7, 0) == (DB, None)


def test_tables(m):
    control.lgdt(m.cpu, 0xFFFF, 0xDEADBEEF, 4)
    control.lidt(m.cpu, 0x7FF, 0xDEADBEEF, 2)
    m.ring(3)  # the stores aren't privileged
    assert control.sgdt(m.cpu) == (0xFFFF, 0xDEADBEEF)
    assert control.sidt(m.cpu) == (0x7FF, 0xADBEEF)


def test_invlpg(m):
    control.invlpg(m.cpu, 0xC0001234)
    assert m.hooks.calls == [("invlpg", 0xC0001234)]


def test_hlt(m):
    control.hlt(m.cpu)
    assert m.cpu.halted


@pytest.mark.parametrize(
    ("cpl", "iopl", "vm", "allowed"),
    [
        (0, 0, False, True), (1, 0, False, False), (1, 1, False, True), (3, 2, False, False),
        (3, 3, False, True),
        (3, 3, True, True), (3, 2, True, False), (3, 0, True, False),
    ],
)  # fmt: skip
def test_cli_sti(m, cpl, iopl, vm, allowed):
    if vm:
        m.virtual8086(iopl)
    else:
        m.ring(cpl)
        m.cpu.eflags = FIXED | iopl << 12
    if not allowed:
        assert m.faults(control.sti, m.cpu) == (GP, 0)
        assert m.faults(control.cli, m.cpu) == (GP, 0)
        return
    control.sti(m.cpu)
    assert m.cpu.eflags == FIXED | iopl << 12 | IF | (VM if vm else 0)
    assert m.cpu.inhibit_interrupts
    control.cli(m.cpu)
    assert not m.cpu.eflags & IF


def test_sti_shadows_only_when_if_was_clear(m):
    m.cpu.eflags = FIXED | IF
    control.sti(m.cpu)
    assert not m.cpu.inhibit_interrupts


def test_paging_bit_is_seen_by_the_cpu(m):
    control.write_cr(m.cpu, 0, m.cpu.cr0 | CR0_PG)
    assert not m.cpu.real_mode
    assert m.cpu.protected

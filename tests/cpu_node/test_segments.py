"""Segment loads, LAR/LSL/VERR/VERW, LDTR and TR, against the tables of SDM vol. 2 and vol. 3A chapter 5."""

import pytest

from cpu_node import segments
from cpu_node.descriptor import (
    CALL_GATE32,
    CS,
    DS,
    ES,
    FS,
    GS,
    INTERRUPT_GATE32,
    SS,
    gate,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import GP, NP, UD
from cpu_node.errors import SS as SS_FAULT
from tests.cpu_node.kit import (
    ABSENT_CODE,
    ABSENT_DATA,
    ABSENT_STACK3,
    BEYOND,
    CALL_SEL,
    CODE0,
    CODE1,
    CODE3,
    CONFORMING,
    DATA0,
    DATA1,
    DATA3,
    EXEC_ONLY3,
    EXPAND_DOWN,
    FREE,
    GDT,
    LDT_SEL,
    READ_ONLY3,
    TASK_SEL,
    TSS_B_SEL,
    TSS_SEL,
    Machine,
)


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("base", "limit", "rights", "first", "last", "flat"),
    [
        (0, 0xFFFFF, 0xC093, 0, 0xFFFFFFFF, True),
        (0, 0xFFFFE, 0xC093, 0, 0xFFFFEFFF, False),
        (0x12345678, 0xFFFFF, 0xC093, 0, 0xFFFFFFFF, False),
        (0xFFFF0000, 0x1234F, 0x4093, 0, 0x1234F, False),
        (0, 0x3, 0xC097, 0x4000, 0xFFFFFFFF, False),  # expand-down, big
        (0, 0x3, 0x8097, 0x4000, 0xFFFF, False),  # expand-down, small
        (0, 0xFFFFF, 0xC09B, 0, 0xFFFFFFFF, True),
    ],
)
def test_parse_is_the_inverse_of_pack(base, limit, rights, first, last, flat):
    s = parse(0x10, pack(base, limit, rights))
    assert (s.base, s.rights, s.lowest, s.highest, s.flat) == (base, rights, first, last, flat)
    assert s is parse(0x10, pack(base, limit, rights))


def test_gate_parse():
    g = gate(pack_gate(CALL_GATE32, 0x1234, 0xDEADBEEF, dpl=2, parameters=31))
    assert (g.selector, g.offset, g.dpl, g.parameters, g.size) == (0x1234, 0xDEADBEEF, 2, 31, 4)
    assert g.present
    assert not g.valid_in_idt
    assert gate(pack_gate(INTERRUPT_GATE32, 8, 1)).is_interrupt
    assert not gate(pack(0, 0, 0x9E)).valid_in_idt  # a code segment whose type looks like a gate's


DATA_LOADS = [
    # CPL, selector, (vector, error) or None
    (0, 0, None), (0, 3, None), (3, 2, None),
    (0, DATA0, None), (0, DATA3, None), (0, DATA3 & ~3, None), (0, DATA0 | 3, (GP, DATA0)),
    (3, DATA0, (GP, DATA0)), (3, DATA3, None), (3, DATA3 & ~3, None), (1, DATA1, None),
    (1, DATA0, (GP, DATA0)),
    (1, DATA3, None), (3, DATA1, (GP, DATA1 & ~3)),
    (0, CODE0, None), (3, CODE0, (GP, CODE0)), (3, CODE3, None), (3, CONFORMING, None),
    (3, CONFORMING | 3, None),
    (3, EXEC_ONLY3, (GP, EXEC_ONLY3 & ~3)), (3, READ_ONLY3, None), (0, EXPAND_DOWN, None),
    (0, ABSENT_DATA, (NP, ABSENT_DATA)), (3, ABSENT_DATA, (GP, ABSENT_DATA)),
    (0, ABSENT_CODE, (NP, ABSENT_CODE)),
    (0, TSS_SEL, (GP, TSS_SEL)), (0, LDT_SEL, (GP, LDT_SEL)), (0, CALL_SEL, (GP, CALL_SEL & ~3)),
    (0, FREE, (GP, FREE)), (0, BEYOND, (GP, BEYOND)), (0, 0x104 | 0, (GP, 0x104)),
]  # fmt: skip


@pytest.mark.parametrize("index", [ES, DS, FS, GS])
@pytest.mark.parametrize(("cpl", "selector", "fault"), DATA_LOADS)
def test_data_segment_loads(m, index, cpl, selector, fault):
    m.ring(cpl)
    if fault:
        assert m.faults(segments.load_segment, m.cpu, index, selector) == fault
        return
    segments.load_segment(m.cpu, index, selector)
    s = m.cpu.seg[index]
    assert s.selector == selector
    assert s.usable == bool(selector & ~3)
    if s.usable:
        assert s.raw == m.descriptor(selector)
        assert s.accessed
    assert not m.cpu.inhibit_interrupts


STACK_LOADS = [
    (0, DATA0, None), (0, 0, (GP, 0)), (3, 3, (GP, 0)), (0, DATA0 | 3, (GP, DATA0)),
    (0, DATA3, (GP, DATA3 & ~3)),
    (3, DATA3, None), (3, DATA3 & ~3, (GP, DATA3 & ~3)), (1, DATA1, None), (0, CODE0, (GP, CODE0)),
    (3, READ_ONLY3, (GP, READ_ONLY3 & ~3)), (0, EXPAND_DOWN, None), (0, ABSENT_DATA, (SS_FAULT, ABSENT_DATA)),
    (3, ABSENT_STACK3, (SS_FAULT, ABSENT_STACK3 & ~3)), (0, TSS_SEL, (GP, TSS_SEL)),
    (0, BEYOND, (GP, BEYOND)),
]  # fmt: skip


@pytest.mark.parametrize(("cpl", "selector", "fault"), STACK_LOADS)
def test_stack_segment_loads(m, cpl, selector, fault):
    m.ring(cpl)
    if fault:
        assert m.faults(segments.load_segment, m.cpu, SS, selector) == fault
    else:
        segments.load_segment(m.cpu, SS, selector)
        assert m.cpu.seg[SS].selector == selector
        assert m.cpu.inhibit_interrupts


def test_hooks_hear_of_what_changed(m):
    segments.load_segment(m.cpu, ES, DATA0)
    assert m.hooks.calls == []  # the same segment again
    segments.load_segment(m.cpu, ES, DATA3)
    assert m.hooks.calls == [("segments_changed", ES)]  # another selector of the same kind
    segments.load_segment(m.cpu, ES, 0)
    assert m.hooks.calls[1:] == [("segments_changed", ES), ("mode_changed",)]


def test_the_accessed_bit_is_written_once(m):
    m.describe(FREE, pack(0, 0xFFFFF, 0xC092))
    segments.load_segment(m.cpu, DS, FREE)
    assert m.descriptor(FREE) == pack(0, 0xFFFFF, 0xC093)
    m.memory.read_only.add(GDT >> 12)
    segments.load_segment(m.cpu, DS, FREE)  # no write any more
    m.memory.read_only.clear()
    m.describe(FREE, pack(0, 0xFFFFF, 0xC092))
    m.memory.read_only.add(GDT >> 12)
    assert m.faults(segments.load_segment, m.cpu, DS, FREE) == (14, 3)


def test_descriptor_reads_are_supervisor_reads(m):
    m.ring(3)
    m.memory.supervisor.add(GDT >> 12)
    segments.load_segment(m.cpu, DS, DATA3)
    m.memory.absent.add(GDT >> 12)
    assert m.faults(segments.load_segment, m.cpu, DS, DATA3) == (14, 0)


def test_local_descriptors(m):
    m.describe(0x0C, pack(0x5000, 0xFFF, 0x40F2))
    segments.load_segment(m.cpu, GS, 0x0F)
    assert m.cpu.seg[GS].base == 0x5000
    assert m.faults(segments.load_segment, m.cpu, GS, 0x104) == (GP, 0x104)  # LDT limit 0xFF
    segments.lldt(m.cpu, 0)
    assert m.faults(segments.load_segment, m.cpu, GS, 0x0F) == (GP, 0x0C)


@pytest.mark.parametrize("mode", ["real", "virtual8086"])
def test_paragraph_loads(m, mode):
    getattr(m, mode)()
    segments.load_segment(m.cpu, DS, 0xB800)
    s = m.cpu.seg[DS]
    assert (s.selector, s.base, s.highest, s.writable) == (0xB800, 0xB8000, 0xFFFF, True)
    assert s.dpl == (3 if mode == "virtual8086" else 0)
    assert segments.load_segment(m.cpu, SS, 0) is None
    assert m.cpu.seg[SS].usable


def test_real_mode_keeps_the_limit(m):
    m.cpu.cr0 &= ~1
    segments.load_segment(m.cpu, DS, 0x1234)
    s = m.cpu.seg[DS]
    assert (s.base, s.highest, s.big) == (0x12340, 0xFFFFFFFF, True)


ACCESS = [
    # CPL, selector, lar & 0xFF00, lsl, verr, verw
    (0, DATA0, 0x9300, 0xFFFFFFFF, True, True),
    (3, DATA0, None, None, False, False),
    (0, DATA0 | 3, None, None, False, False),
    (3, DATA3, 0xF200, 0xFFFFFFFF, True, True),
    (3, CONFORMING | 3, 0x9E00, 0xFFFFFFFF, True, False),
    (3, EXEC_ONLY3, 0xF800, 0xFFFFFFFF, False, False),
    (3, READ_ONLY3, 0xF000, 0xFFFFFFFF, True, False),
    (0, ABSENT_DATA, 0x1200, 0xFFFFFFFF, True, True),
    (0, TSS_SEL, 0x8B00, 0x2067, False, False),
    (0, TSS_B_SEL, 0xE900, 0x67, False, False),
    (0, LDT_SEL, 0x8200, 0xFF, False, False),
    (0, CALL_SEL, 0xEC00, None, False, False),
    (0, TASK_SEL, 0xE500, None, False, False),
    (0, FREE, None, None, False, False),
    (0, BEYOND, None, None, False, False),
    (0, 0, None, None, False, False),
]


@pytest.mark.parametrize(("cpl", "selector", "rights", "limit", "readable", "writable"), ACCESS)
def test_lar_lsl_verr_verw(m, cpl, selector, rights, limit, readable, writable):
    m.cpu.cpl = cpl
    got = segments.lar(m.cpu, selector)
    assert (None if got is None else got & 0xFF00) == rights
    assert segments.lsl(m.cpu, selector) == limit
    assert segments.verr(m.cpu, selector) == readable
    assert segments.verw(m.cpu, selector) == writable


def test_lar_shows_the_flag_bits(m):
    assert segments.lar(m.cpu, DATA0) == 0x00CF9300
    assert segments.lar(m.cpu, FREE) is None
    m.describe(FREE, pack_gate(INTERRUPT_GATE32, CODE0, 0))
    assert segments.lar(m.cpu, FREE) is None
    assert segments.lsl(m.cpu, FREE) is None


@pytest.mark.parametrize("mode", ["real", "virtual8086"])
@pytest.mark.parametrize(
    "action",
    [segments.lar, segments.lsl, segments.verr, segments.verw, segments.lldt, segments.ltr],
)
def test_undefined_outside_protected_mode(m, mode, action):
    getattr(m, mode)()
    assert m.faults(action, m.cpu, DATA0) == (UD, None)


@pytest.mark.parametrize("mode", ["real", "virtual8086"])
@pytest.mark.parametrize("action", [segments.sldt, segments.store_tr])
def test_stores_undefined_outside_protected_mode(m, mode, action):
    getattr(m, mode)()
    assert m.faults(action, m.cpu) == (UD, None)


LDT_LOADS = [
    (LDT_SEL, None), (0, None), (LDT_SEL | 4, (GP, LDT_SEL | 4)), (DATA0, (GP, DATA0)),
    (TSS_B_SEL, (GP, TSS_B_SEL)),
    (BEYOND, (GP, BEYOND)),
]  # fmt: skip


@pytest.mark.parametrize(("selector", "fault"), LDT_LOADS)
def test_lldt(m, selector, fault):
    if fault:
        assert m.faults(segments.lldt, m.cpu, selector) == fault
    else:
        segments.lldt(m.cpu, selector)
        assert segments.sldt(m.cpu) == selector
        assert m.cpu.ldtr.usable == bool(selector)


def test_absent_ldt_and_tss(m):
    m.describe(FREE, pack(0x7000, 0xFF, 0x02))
    assert m.faults(segments.lldt, m.cpu, FREE) == (NP, FREE)
    m.describe(FREE, pack(0x7000, 0xFF, 0x09))
    assert m.faults(segments.ltr, m.cpu, FREE) == (NP, FREE)


TR_LOADS = [
    (TSS_B_SEL, None), (0, (GP, 0)), (TSS_SEL, (GP, TSS_SEL)), (TSS_B_SEL | 4, (GP, TSS_B_SEL | 4)),
    (LDT_SEL, (GP, LDT_SEL)), (CODE0, (GP, CODE0)), (BEYOND, (GP, BEYOND)),
]  # fmt: skip


@pytest.mark.parametrize(("selector", "fault"), TR_LOADS)
def test_ltr(m, selector, fault):
    if fault:
        assert m.faults(segments.ltr, m.cpu, selector) == fault
    else:
        segments.ltr(m.cpu, selector)
        assert segments.store_tr(m.cpu) == selector
        assert m.descriptor(selector) >> 40 & 0xFF == 0xEB  # busy
        assert m.cpu.tr.type == 11


@pytest.mark.parametrize("action", [segments.lldt, segments.ltr])
def test_table_loads_are_privileged(m, action):
    m.ring(3)
    assert m.faults(action, m.cpu, LDT_SEL) == (GP, 0)


def test_cs_is_never_touched(m):
    before = m.cpu.seg[CS]
    segments.load_segment(m.cpu, DS, CODE1)
    assert m.cpu.seg[CS] is before

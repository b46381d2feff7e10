"""Task-state segments: inner stacks, the I/O permission bitmap, task switches.

Source: Intel SDM vol. 3A chapter 7; [7.3] numbers the steps of a switch. Vol. 1 section 19.5.2: the bitmap.
A switch reads and checks everything it can before its commit point; a fault after that point belongs to the
new task and is raised as TaskSwitchFault.
Left out: checking the limit of the outgoing TSS (it was checked when it was entered; LTR checks none).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from cpu_node import stack
from cpu_node.cpu import CR0_PE, CR0_PG, CR0_TS, DR6_BT, Cpu
from cpu_node.descriptor import (
    CS,
    DS,
    ES,
    FS,
    GS,
    LDT,
    SELECTOR_RPL,
    SELECTOR_TI,
    SS,
    TSS16_AVAILABLE,
    TSS16_BUSY,
    TSS32_AVAILABLE,
    TSS32_BUSY,
    Segment,
    null,
    parse,
    virtual8086,
)
from cpu_node.errors import GP, NP, TS, GuestFault, TaskSwitchFault, general_protection
from cpu_node.flags import DEFINED, FIXED, IOPL, IOPL_SHIFT, NT, VM
from cpu_node.segments import (
    RAW_ACCESS_BYTE,
    data_segment,
    descriptor_va,
    mark_accessed,
    read_descriptor,
    set_busy,
    stack_segment,
)

TSS_BUSY = (TSS16_BUSY, TSS32_BUSY)
TSS_AVAILABLE = (TSS16_AVAILABLE, TSS32_AVAILABLE)
WIDE = 0x8  # in a TSS descriptor's type: the 32-bit format

# Offsets in a 32-bit TSS [figure 7-2] and a 16-bit one [figure 7-10].
CR3_32, EIP_32, SELECTORS_32, TRAP_32, IO_MAP_BASE = 0x1C, 0x20, 0x48, 0x64, 0x66
IP_16, SELECTORS_16 = 0x0E, 0x22
MINIMUM_LIMIT_32, MINIMUM_LIMIT_16 = 0x67, 0x2B
DR7_LOCAL = 0x0155  # L0..L3 and LE, cleared by a switch [17.2.4]


class Reason(Enum):
    """What causes a switch; decides on busy bits, NT and the back link [table 7-2]."""

    JUMP = "jump"
    NEST = "call, interrupt or exception"
    RETURN = "iret"


def inner_stack(cpu: Cpu, dpl: int, ext: int) -> tuple[int, int]:
    """(SS selector, ESP) for a more privileged level, from the current TSS [7.2.1]."""
    tr = cpu.tr
    base = tr.base
    if tr.type & WIDE:
        offset = 8 * dpl + 4
        if offset + 7 > tr.highest:
            raise GuestFault(TS, tr.selector & 0xFFFC | ext)
        both = cpu.memory.read64(base + offset & 0xFFFFFFFF)
        return both >> 32 & 0xFFFF, both & 0xFFFFFFFF
    offset = 4 * dpl + 2
    if offset + 3 > tr.highest:
        raise GuestFault(TS, tr.selector & 0xFFFC | ext)
    both = cpu.memory.read32(base + offset & 0xFFFFFFFF)
    return both >> 16, both & 0xFFFF


def check_io(cpu: Cpu, port: int, width: int) -> None:
    """#GP(0) unless IN, OUT, INS, OUTS may touch `width` bytes at `port`."""
    flags = cpu.eflags
    if not cpu.cr0 & CR0_PE or (cpu.cpl <= (flags & IOPL) >> IOPL_SHIFT and not flags & VM):
        return
    tr = cpu.tr
    if not tr.type & WIDE or tr.highest <= IO_MAP_BASE:
        raise general_protection()
    first = cpu.memory.read16(tr.base + IO_MAP_BASE & 0xFFFFFFFF) + (port >> 3)
    if first + 1 > tr.highest:  # two bytes are always read
        raise general_protection()
    bits = cpu.memory.read16(tr.base + first & 0xFFFFFFFF) >> (port & 7)
    if bits & (1 << width) - 1:
        raise general_protection()


def tss_descriptor(
    cpu: Cpu, selector: int, types: tuple[int, int], vector: int, ext: int = 0
) -> tuple[int, int]:
    """(linear address, descriptor) of a present TSS in the GDT of one of `types`."""
    if selector & SELECTOR_TI or selector & 0xFFFC == 0:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    va, raw = read_descriptor(cpu, selector, vector, ext)
    segment = parse(selector, raw)
    if not segment.system or segment.type not in types:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    if not segment.present:
        raise GuestFault(NP, selector & 0xFFFC | ext)
    return va, raw


def enter_gate(cpu: Cpu, selector: int, flags: int, error: int | None, ext: int) -> None:
    """An interrupt or exception through a task gate [6.12.2]; the error code goes on the new task's stack."""
    va, raw = tss_descriptor(cpu, selector, TSS_AVAILABLE, GP, ext)
    switch(cpu, selector, va, raw, Reason.NEST, flags, ext)
    if error is not None:
        try:
            stack.push(cpu, (error,), 4 if cpu.tr.type & WIDE else 2)
        except GuestFault as fault:
            raise TaskSwitchFault(fault.vector, fault.error, fault.cr2) from fault


def switch(cpu: Cpu, selector: int, va: int, raw: int, reason: Reason, flags: int, ext: int = 0) -> None:
    """Leave the current task for the checked TSS whose descriptor `raw` is at `va` [7.3].

    `flags` is the image of EFLAGS to save, cpu.eip the EIP to save.
    """
    new, old, memory = parse(selector, raw), cpu.tr, cpu.memory
    wide = bool(new.type & WIDE)
    if new.limit < (MINIMUM_LIMIT_32 if wide else MINIMUM_LIMIT_16):
        raise GuestFault(TS, selector & 0xFFFC | ext)
    state = _read_state_32(cpu, new) if wide else _read_state_16(cpu, new)
    old_va = descriptor_va(cpu, old.selector)
    _probe(cpu, old, old_va, new, va, reason)

    _save_state(cpu, old, flags & ~NT if reason is Reason.RETURN else flags)
    if reason is not Reason.NEST and old_va is not None:
        set_busy(cpu, old_va, memory.read64(old_va), busy=False)
    eflags = state.eflags
    if reason is Reason.NEST:
        memory.write16(new.base, old.selector)
        eflags |= NT
    if reason is not Reason.RETURN:
        raw = set_busy(cpu, va, raw, busy=True)
    cpu.tr = parse(selector, raw)
    cpu.hooks.mode_changed()
    try:
        _commit(cpu, state, eflags, ext)
    except GuestFault as fault:
        raise TaskSwitchFault(fault.vector, fault.error, fault.cr2) from fault
    finally:
        cpu.hooks.mode_changed()
    if state.trap:
        cpu.pending_debug |= DR6_BT


class _State(msgspec.Struct):
    """What a TSS holds of a task. Selectors in the order of Cpu.seg."""

    cr3: int | None
    eip: int
    eflags: int
    regs: Sequence[int]
    selectors: list[int]
    ldt: int
    trap: bool


def _read_state_32(cpu: Cpu, tss: Segment) -> _State:
    words = cpu.memory.read32s(tss.base + CR3_32 & 0xFFFFFFFF, 19)
    selectors = [word & 0xFFFF for word in words[11:17]]
    eflags = words[2] & DEFINED | FIXED
    trap = bool(words[18] & 1)
    return _State(words[0], words[1], eflags, words[3:11], selectors, words[17] & 0xFFFF, trap)


def _read_state_16(cpu: Cpu, tss: Segment) -> _State:
    words = [cpu.memory.read16(tss.base + IP_16 + 2 * i & 0xFFFFFFFF) for i in range(15)]
    eflags = words[1] & DEFINED | FIXED
    regs = [0xFFFF0000 | word for word in words[2:10]]  # the upper halves are undefined [7.6]
    return _State(None, words[0], eflags, regs, [*words[10:14], 0, 0], words[14], trap=False)


def _probe(cpu: Cpu, old: Segment, old_va: int | None, new: Segment, new_va: int, reason: Reason) -> None:
    """Everything the switch writes before its commit point must be writable."""
    probe = cpu.memory.probe_write
    if old.type & WIDE:
        probe(old.base + EIP_32 & 0xFFFFFFFF, 0x40)
    else:
        probe(old.base + IP_16 & 0xFFFFFFFF, 0x1C)
    if reason is Reason.NEST:
        probe(new.base, 2)
    elif old_va is not None:
        probe(old_va + RAW_ACCESS_BYTE & 0xFFFFFFFF, 1)
    if reason is not Reason.RETURN:
        probe(new_va + RAW_ACCESS_BYTE & 0xFFFFFFFF, 1)


def _save_state(cpu: Cpu, tss: Segment, flags: int) -> None:
    memory, base = cpu.memory, tss.base
    if tss.type & WIDE:
        memory.write32s(base + EIP_32 & 0xFFFFFFFF, [cpu.eip, flags, *cpu.regs])
        for i, segment in enumerate(cpu.seg):
            memory.write16(base + SELECTORS_32 + 4 * i & 0xFFFFFFFF, segment.selector)
    else:
        for i, value in enumerate([cpu.eip, flags, *cpu.regs, *(s.selector for s in cpu.seg[:4])]):
            memory.write16(base + IP_16 + 2 * i & 0xFFFFFFFF, value & 0xFFFF)


def _commit(cpu: Cpu, state: _State, eflags: int, ext: int) -> None:
    """From the commit point on: a fault here happens in the new task."""
    cpu.cr0 |= CR0_TS
    if state.cr3 is not None and cpu.cr0 & CR0_PG and state.cr3 != cpu.cr3:
        cpu.cr3 = state.cr3
        cpu.hooks.flush_tlb(False)  # only a change of CR3 flushes in a task switch [4.10.4.1]
    cpu.regs[:] = state.regs
    cpu.eip = state.eip
    cpu.eflags = eflags
    cpu.dr[7] &= ~DR7_LOCAL
    selectors = state.selectors
    if eflags & VM:
        cpu.cpl = 3
        segments = [virtual8086(selector) for selector in selectors]
    else:
        cpu.cpl = selectors[CS] & SELECTOR_RPL
        segments = [null(selector, cpu.cpl) for selector in selectors]  # selectors first, then the caches
    for index, segment in enumerate(segments):
        cpu.set_segment(index, segment)
    cpu.ldtr = null(state.ldt)
    _load_ldt(cpu, state.ldt, ext)
    if not eflags & VM:
        cpu.set_segment(CS, _code_segment(cpu, selectors[CS], ext))
        selector = selectors[SS]
        rpl = selector & SELECTOR_RPL
        cpu.set_segment(SS, stack_segment(cpu, selector, cpu.cpl, rpl, TS, ext, selector & 0xFFFC))
        for index in (DS, ES, FS, GS):
            cpu.set_segment(index, _data_segment(cpu, selectors[index], ext))
    if state.eip > cpu.seg[CS].highest:
        raise GuestFault(GP, ext)


def _load_ldt(cpu: Cpu, selector: int, ext: int) -> None:
    if selector & 0xFFFC == 0:
        return
    if selector & SELECTOR_TI:
        raise GuestFault(TS, selector & 0xFFFC | ext)
    _, raw = read_descriptor(cpu, selector, TS, ext)
    segment = parse(selector, raw)
    if not segment.system or segment.type != LDT or not segment.present:
        raise GuestFault(TS, selector & 0xFFFC | ext)
    cpu.ldtr = segment


def _code_segment(cpu: Cpu, selector: int, ext: int) -> Segment:
    if selector & 0xFFFC == 0:
        raise GuestFault(TS, ext)
    va, raw = read_descriptor(cpu, selector, TS, ext)
    code, rpl = parse(selector, raw), selector & SELECTOR_RPL
    if not code.code or (code.dpl > rpl if code.conforming else code.dpl != rpl):
        raise GuestFault(TS, selector & 0xFFFC | ext)
    if not code.present:
        raise GuestFault(NP, selector & 0xFFFC | ext)
    return mark_accessed(cpu, va, code)


def _data_segment(cpu: Cpu, selector: int, ext: int) -> Segment:
    try:
        return data_segment(cpu, selector, cpu.cpl)
    except GuestFault as fault:
        if fault.error is None or fault.cr2 is not None:
            raise
        vector = TS if fault.vector == GP else fault.vector
        raise GuestFault(vector, fault.error | ext) from fault

"""Loading segment registers, and asking about descriptors.

Source: Intel SDM vol. 3A chapters 3 and 5; vol. 2 pages of MOV, LAR, LSL, VERR, LLDT, LTR, SLDT, STR.
Descriptor tables are read with supervisor privilege whatever the CPL. Null selectors are 0 to 3.
"""

from __future__ import annotations

from cpu_node import descriptor
from cpu_node.cpu import CR0_PE, Cpu
from cpu_node.descriptor import (
    ACCESSED_RAW,
    BUSY_RAW,
    CALL_GATE16,
    CALL_GATE32,
    LDT,
    SELECTOR_INDEX,
    SELECTOR_RPL,
    SELECTOR_TI,
    SS,
    TASK_GATE,
    TSS16_AVAILABLE,
    TSS16_BUSY,
    TSS32_AVAILABLE,
    TSS32_BUSY,
    Segment,
    parse,
)
from cpu_node.errors import GP, NP, UD, GuestFault, general_protection
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import VM

RAW_ACCESS_BYTE = 5  # offset of type, S, DPL, P in a descriptor


def is_null(selector: int) -> bool:
    return selector & 0xFFFC == 0


def descriptor_va(cpu: Cpu, selector: int) -> int | None:
    """Linear address of a selector's descriptor; None when it lies outside its table."""
    index = selector & SELECTOR_INDEX
    if selector & SELECTOR_TI:
        ldtr = cpu.ldtr
        if index + 7 > ldtr.highest:
            return None
        return ldtr.base + index & 0xFFFFFFFF
    if index + 7 > cpu.gdt_limit:
        return None
    return cpu.gdt_base + index & 0xFFFFFFFF


def read_descriptor(cpu: Cpu, selector: int, vector: int = GP, ext: int = 0) -> tuple[int, int]:
    """(linear address, 64-bit descriptor); `vector` with the selector as error code outside the table."""
    va = descriptor_va(cpu, selector)
    if va is None:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    return va, cpu.memory.read64(va)


def mark_accessed(cpu: Cpu, va: int, segment: Segment) -> Segment:
    """Set the accessed bit in memory if it is clear; returns the segment as it is then."""
    if segment.accessed:
        return segment
    raw = segment.raw | ACCESSED_RAW
    cpu.memory.write8(va + RAW_ACCESS_BYTE & 0xFFFFFFFF, raw >> 40 & 0xFF)
    return parse(segment.selector, raw)


def set_busy(cpu: Cpu, va: int, raw: int, busy: bool) -> int:
    """Set or clear the busy bit of the TSS descriptor `raw` at `va`; returns the new descriptor."""
    raw = raw | BUSY_RAW if busy else raw & ~BUSY_RAW
    cpu.memory.write8(va + RAW_ACCESS_BYTE & 0xFFFFFFFF, raw >> 40 & 0xFF)
    return raw


def load_segment(cpu: Cpu, index: int, selector: int) -> None:
    """MOV, POP and LxS to ES, SS, DS, FS or GS. A load of SS opens the interrupt shadow [6.8.3]."""
    if not cpu.cr0 & CR0_PE:
        old = cpu.seg[index]
        cpu.set_segment(index, descriptor.real_mode(selector, old.limit, old.big))
    elif cpu.eflags & VM:
        cpu.set_segment(index, descriptor.virtual8086(selector))
    elif index == SS:
        cpu.set_segment(SS, stack_segment(cpu, selector, cpu.cpl, selector & SELECTOR_RPL))
    else:
        cpu.set_segment(index, data_segment(cpu, selector, cpu.cpl))
        cpu.hooks.segment_loaded(index, selector)
    if index == SS:
        cpu.inhibit_interrupts = True


def data_segment(cpu: Cpu, selector: int, cpl: int) -> Segment:
    """The checked Segment for DS, ES, FS or GS [5.6]."""
    if selector & 0xFFFC == 0:
        return descriptor.null(selector)
    va = descriptor_va(cpu, selector)
    if va is None:
        raise GuestFault(GP, selector & 0xFFFC)
    segment = parse(selector, cpu.memory.read64(va))
    if cpl <= segment.data_cpl:
        return segment if segment.accessed else mark_accessed(cpu, va, segment)
    allowed = segment.conforming or max(cpl, selector & SELECTOR_RPL) <= segment.dpl
    if segment.readable and allowed and not segment.present:
        raise GuestFault(NP, selector & 0xFFFC)
    raise GuestFault(GP, selector & 0xFFFC)


def stack_segment(
    cpu: Cpu, selector: int, cpl: int, rpl: int, vector: int = GP, ext: int = 0, null_error: int = 0
) -> Segment:
    """The checked Segment for SS at `cpl` [5.7]; RPL and DPL must equal it. `vector` replaces #GP."""
    if selector & 0xFFFC == 0:
        raise GuestFault(vector, null_error | ext)
    va, raw = read_descriptor(cpu, selector, vector, ext)
    segment = parse(selector, raw)
    if rpl != cpl or segment.dpl != cpl or not segment.writable:
        raise GuestFault(vector, selector & 0xFFFC | ext)
    if not segment.present:
        raise GuestFault(SS_FAULT, selector & 0xFFFC | ext)
    return segment if segment.accessed else mark_accessed(cpu, va, segment)


def _looked_up(cpu: Cpu, selector: int) -> Segment | None:
    """For LAR, LSL, VERR, VERW: the descriptor, or None where they just clear ZF."""
    if not cpu.protected:
        raise GuestFault(UD)
    va = None if is_null(selector) else descriptor_va(cpu, selector)
    return None if va is None else parse(selector, cpu.memory.read64(va))


def _visible(cpu: Cpu, segment: Segment) -> bool:
    return segment.conforming or max(cpu.cpl, segment.selector & SELECTOR_RPL) <= segment.dpl


LSL_TYPES = frozenset((TSS16_AVAILABLE, LDT, TSS16_BUSY, TSS32_AVAILABLE, TSS32_BUSY))
LAR_TYPES = LSL_TYPES | {CALL_GATE16, TASK_GATE, CALL_GATE32}


def lar(cpu: Cpu, selector: int) -> int | None:
    """The access rights (mask with the operand size), or None: ZF = 0, destination unchanged."""
    segment = _looked_up(cpu, selector)
    if segment is None or not _visible(cpu, segment) or (segment.system and segment.type not in LAR_TYPES):
        return None
    return segment.raw >> 32 & 0x00FFFF00


def lsl(cpu: Cpu, selector: int) -> int | None:
    """The limit in bytes, or None: ZF = 0, destination unchanged."""
    segment = _looked_up(cpu, selector)
    if segment is None or not _visible(cpu, segment) or (segment.system and segment.type not in LSL_TYPES):
        return None
    return segment.limit


def verr(cpu: Cpu, selector: int) -> bool:
    """ZF: the segment can be read at the current privilege."""
    segment = _looked_up(cpu, selector)
    return segment is not None and segment.readable and _visible(cpu, segment)


def verw(cpu: Cpu, selector: int) -> bool:
    """ZF: the segment can be written at the current privilege."""
    segment = _looked_up(cpu, selector)
    return segment is not None and segment.writable and _visible(cpu, segment)


def _require_protected_ring0(cpu: Cpu) -> None:
    if not cpu.protected:
        raise GuestFault(UD)
    if cpu.cpl:
        raise general_protection()


def lldt(cpu: Cpu, selector: int) -> None:
    """LLDT: a null selector makes LDTR unusable."""
    _require_protected_ring0(cpu)
    if is_null(selector):
        cpu.ldtr = descriptor.null(selector)
        return
    if selector & SELECTOR_TI:
        raise general_protection(selector & 0xFFFC)
    _, raw = read_descriptor(cpu, selector)
    segment = parse(selector, raw)
    if not segment.system or segment.type != LDT:
        raise general_protection(selector & 0xFFFC)
    if not segment.present:
        raise GuestFault(NP, selector & 0xFFFC)
    cpu.ldtr = segment


def ltr(cpu: Cpu, selector: int) -> None:
    """LTR: the TSS becomes busy; no task switch."""
    _require_protected_ring0(cpu)
    if is_null(selector):
        raise general_protection()
    if selector & SELECTOR_TI:
        raise general_protection(selector & 0xFFFC)
    va, raw = read_descriptor(cpu, selector)
    segment = parse(selector, raw)
    if not segment.system or segment.type not in (TSS16_AVAILABLE, TSS32_AVAILABLE):
        raise general_protection(selector & 0xFFFC)
    if not segment.present:
        raise GuestFault(NP, selector & 0xFFFC)
    cpu.tr = parse(selector, set_busy(cpu, va, raw, busy=True))
    cpu.hooks.mode_changed()


def sldt(cpu: Cpu) -> int:
    if not cpu.protected:
        raise GuestFault(UD)
    return cpu.ldtr.selector


def store_tr(cpu: Cpu) -> int:
    """STR."""
    if not cpu.protected:
        raise GuestFault(UD)
    return cpu.tr.selector

"""The common cases of interrupt delivery and IRET, with all checks folded into caches.

Source: as for gates.py and iret.py, which do the same in full. A function here either does everything or,
with anything unusual (a fault included), changes nothing and returns False: then the full form decides.
Covered: 32-bit interrupt and trap gates to non-conforming code in the GDT at the same or a more privileged
level through a 32-bit TSS; IRETD to the same or a less privileged level through the GDT. Stacks with SS.B.
"""

from __future__ import annotations

from functools import lru_cache

from cpu_node.cpu import ESP, Cpu
from cpu_node.descriptor import (
    CS,
    DS,
    ES,
    FS,
    GS,
    INTERRUPT_GATE32,
    SELECTOR_RPL,
    SELECTOR_TI,
    SS,
    TRAP_GATE32,
    Segment,
    gate,
    null,
    parse,
)
from cpu_node.errors import GuestFault
from cpu_node.flags import AC, DF, FIXED, ID, IF, IOPL, IOPL_SHIFT, NT, RF, STATUS, TF, VIF, VIP, VM

CLEARED_BY_TRAP = ~(TF | NT | RF | VM)
CLEARED_BY_INTERRUPT = CLEARED_BY_TRAP & ~IF
TSS32_BUSY = 11
PAGE_MASK, OUTER_FRAME = 0xFFF, 20  # an IRET frame with ESP and SS, in bytes


@lru_cache(maxsize=1024)
def _handler(raw_gate: int, raw_code: int, cpl: int, software: bool) -> tuple[Segment, int, int] | None:
    """(code segment, EIP, EFLAGS mask), None unless nothing is wrong or unusual."""
    entry = gate(raw_gate)
    if entry.type not in (INTERRUPT_GATE32, TRAP_GATE32) or not entry.present:
        return None
    if software and entry.dpl < cpl:
        return None
    code = parse(entry.selector & 0xFFFC, raw_code)
    regular = code.code and not code.conforming and code.present and code.accessed
    if not regular or code.dpl > cpl or entry.offset > code.highest or not entry.selector & 0xFFFC:
        return None
    code = parse(entry.selector & 0xFFFC | code.dpl, raw_code)
    return code, entry.offset, CLEARED_BY_INTERRUPT if entry.type == INTERRUPT_GATE32 else CLEARED_BY_TRAP


@lru_cache(maxsize=1024)
def _stack(selector: int, raw: int, dpl: int) -> Segment | None:
    """The stack segment, None unless nothing is wrong or unusual."""
    segment = parse(selector, raw)
    fits = segment.writable and segment.present and segment.accessed and segment.big
    if not fits or segment.dpl != dpl or selector & SELECTOR_RPL != dpl or not selector & 0xFFFC:
        return None
    return segment


@lru_cache(maxsize=1024)
def _return_code(selector: int, raw: int, cpl: int) -> Segment | None:
    """The code segment IRET goes back to, None unless nothing is wrong or unusual."""
    code, rpl = parse(selector, raw), selector & SELECTOR_RPL
    regular = code.code and not code.conforming and code.present and code.accessed
    if not regular or code.dpl != rpl or rpl < cpl or not selector & 0xFFFC:
        return None
    return code


@lru_cache(maxsize=8)
def _changeable(cpl: int, iopl: int) -> int:
    """The EFLAGS bits that IRETD pops."""
    bits = STATUS | TF | DF | NT | RF | AC | ID
    if cpl <= iopl:
        bits |= IF
    return bits | IOPL | VIF | VIP if cpl == 0 else bits


def enter(cpu: Cpu, vector: int, flags: int, error: int | None, software: bool) -> bool:
    """Deliver `vector` in protected mode (not virtual-8086); `flags` is the image to push."""
    memory, offset, cpl = cpu.memory, vector << 3, cpu.cpl
    if offset + 7 > cpu.idt_limit:
        return False
    try:
        raw_gate = memory.read64(cpu.idt_base + offset & 0xFFFFFFFF)
        selector = raw_gate >> 16 & 0xFFFC
        if selector & SELECTOR_TI or selector + 7 > cpu.gdt_limit:
            return False
        handler = _handler(raw_gate, memory.read64(cpu.gdt_base + selector & 0xFFFFFFFF), cpl, software)
        if handler is None:
            return False
        code, eip, mask = handler
        seg, regs, dpl = cpu.seg, cpu.regs, code.dpl
        old_stack = seg[SS]
        if dpl == cpl:
            stack, esp = old_stack, regs[ESP]
            if not stack.big:
                return False
            frame = [cpu.eip, seg[CS].selector, flags]
        else:
            tr = cpu.tr
            if tr.type != TSS32_BUSY or 8 * dpl + 11 > tr.highest:
                return False
            both = memory.read64(tr.base + 8 * dpl + 4 & 0xFFFFFFFF)
            esp, selector = both & 0xFFFFFFFF, both >> 32 & 0xFFFF
            at = selector & 0xFFF8
            if selector & SELECTOR_TI or at + 7 > cpu.gdt_limit:
                return False
            new_stack = _stack(selector, memory.read64(cpu.gdt_base + at & 0xFFFFFFFF), dpl)
            if new_stack is None:
                return False
            stack = new_stack
            frame = [cpu.eip, seg[CS].selector, flags, regs[ESP], old_stack.selector]
        if error is not None:
            frame.insert(0, error)
        start = esp - 4 * len(frame)
        if start < stack.lowest or esp - 1 > stack.highest:
            return False
        memory.write32s(stack.base + start & 0xFFFFFFFF, frame, dpl == 3)
    except GuestFault:
        return False
    regs[ESP] = start
    cpu.eip = eip
    cpu.registers.set_eflags(flags & mask)
    if dpl != cpl or seg[CS] is not code:
        cpu.set_code_and_stack(code, stack, dpl)
    return True


def leave(cpu: Cpu, flags: int) -> bool:
    """IRETD in protected mode, NT and VM clear."""
    seg, regs, memory, cpl = cpu.seg, cpu.regs, cpu.memory, cpu.cpl
    old_stack, esp = seg[SS], regs[ESP]
    if not old_stack.flat or not old_stack.big or esp & PAGE_MASK > PAGE_MASK + 1 - OUTER_FRAME:
        return False
    try:
        # All five words are in one page: where three can be read, five can.
        eip, selector, image, new_esp, stack_selector = memory.read32s(esp, 5, cpl == 3)
        selector &= 0xFFFF
        at = selector & 0xFFF8
        if image & VM or selector & SELECTOR_TI or at + 7 > cpu.gdt_limit:
            return False
        code = _return_code(selector, memory.read64(cpu.gdt_base + at & 0xFFFFFFFF), cpl)
        if code is None or eip > code.highest:
            return False
        dpl = code.dpl
        new_stack: Segment | None = old_stack
        if dpl == cpl:
            new_esp = esp + 12
        else:
            stack_selector &= 0xFFFF
            at = stack_selector & 0xFFF8
            if stack_selector & SELECTOR_TI or at + 7 > cpu.gdt_limit:
                return False
            new_stack = _stack(stack_selector, memory.read64(cpu.gdt_base + at & 0xFFFFFFFF), dpl)
        if new_stack is None:
            return False
    except GuestFault:
        return False
    regs[ESP] = new_esp
    cpu.eip = eip
    changeable = _changeable(cpl, (flags & IOPL) >> IOPL_SHIFT)
    cpu.registers.set_eflags(flags & ~changeable | image & changeable | FIXED)
    if dpl != cpl:
        for index in (ES, DS, FS, GS):
            segment = seg[index]
            if segment.usable and segment.dpl < dpl and not segment.conforming:
                cpu.set_segment(index, null(0))
        cpu.set_code_and_stack(code, new_stack, dpl)
    elif seg[CS] is not code:
        cpu.set_segment(CS, code)
    return True

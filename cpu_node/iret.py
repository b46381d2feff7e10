"""IRET in all its forms.

Source: Intel SDM vol. 2 page IRET/IRETD; vol. 3A section 7.4 (nested tasks), vol. 3B section 20.2.
Left out: VME (VIF instead of IF in virtual-8086 mode with IOPL < 3).
"""

from __future__ import annotations

from cpu_node import descriptor, quick, tasks
from cpu_node.cpu import CR0_PE, ESP, Cpu
from cpu_node.descriptor import CS, DS, ES, FS, GS, SELECTOR_RPL, SS
from cpu_node.errors import TS, general_protection
from cpu_node.far import return_outward, return_segment, switch_task
from cpu_node.flags import AC, DEFINED, DF, FIXED, ID, IF, IOPL, IOPL_SHIFT, NT, RF, STATUS, TF, VIF, VIP, VM
from cpu_node.segments import mark_accessed
from cpu_node.stack import merged_sp, peek, read_frame, release


def iret(cpu: Cpu, size: int) -> None:
    """IRET (size 2) and IRETD (size 4). NMIs are accepted again after it [6.7.1]."""
    flags = cpu.registers.get_eflags()
    if not cpu.cr0 & CR0_PE or flags & VM:
        _by_paragraph(cpu, flags, size)
    elif flags & NT:
        selector = cpu.memory.read16(cpu.tr.base)
        va, raw = tasks.tss_descriptor(cpu, selector, tasks.TSS_BUSY, TS)
        switch_task(cpu, selector, va, raw, tasks.Reason.RETURN)
    elif size != 4 or not quick.leave(cpu, flags):
        _protected(cpu, flags, size)
    if cpu.nmi_blocked:
        cpu.nmi_blocked = False
        cpu.hooks.mode_changed()


def _protected(cpu: Cpu, flags: int, size: int) -> None:
    stack, esp, cpl = cpu.seg[SS], cpu.regs[ESP], cpu.cpl
    memory = cpu.memory
    eip, selector, image = read_frame(memory, stack, esp, 3, size, cpl == 3)
    if size == 4 and image & VM and cpl == 0:
        _to_virtual8086(cpu)
        return
    code, va = return_segment(cpu, selector & 0xFFFF)
    if selector & SELECTOR_RPL == cpl:
        if eip > code.highest:
            raise general_protection()
        if not code.accessed:
            code = mark_accessed(cpu, va, code)
        cpu.regs[ESP] = merged_sp(esp, (esp + 3 * size) & stack.span, stack)
        cpu.eip = eip
        cpu.registers.set_eflags(_merged(flags, image, cpl, size))
        cpu.set_segment(CS, code)
        return
    new_esp, stack_selector = read_frame(memory, stack, esp + 3 * size, 2, size, cpl == 3)
    return_outward(cpu, code, va, eip, stack_selector & 0xFFFF, new_esp, 0)
    cpu.eip = eip
    cpu.registers.set_eflags(_merged(flags, image, cpl, size))


def _merged(old: int, image: int, cpl: int, size: int) -> int:
    """EFLAGS after popping `image` at `cpl` without entering virtual-8086 mode."""
    changeable = STATUS | TF | DF | NT
    if size == 4:
        changeable |= RF | AC | ID
    if cpl <= (old & IOPL) >> IOPL_SHIFT:
        changeable |= IF
    if cpl == 0:
        changeable |= IOPL
        if size == 4:
            changeable |= VIF | VIP
    return old & ~changeable | image & changeable | FIXED


def _to_virtual8086(cpu: Cpu) -> None:
    eip, cs, image, new_esp, ss, es, ds, fs, gs = peek(cpu, 9, 4)
    if eip > 0xFFFF:
        raise general_protection()
    cpu.regs[ESP] = new_esp
    cpu.eip = eip
    cpu.registers.set_eflags(image & DEFINED | FIXED)
    for index, selector in ((ES, es), (DS, ds), (FS, fs), (GS, gs)):
        cpu.set_segment(index, descriptor.virtual8086(selector & 0xFFFF))
    code, stack = descriptor.virtual8086(cs & 0xFFFF), descriptor.virtual8086(ss & 0xFFFF)
    cpu.set_code_and_stack(code, stack, 3)


def _by_paragraph(cpu: Cpu, flags: int, size: int) -> None:
    """In real and virtual-8086 mode; the mode stays."""
    virtual = bool(flags & VM)
    if virtual and flags & IOPL != IOPL:
        raise general_protection()
    eip, selector, image = peek(cpu, 3, size)
    old = cpu.seg[CS]
    if eip > old.highest:
        raise general_protection()
    if virtual:
        code = descriptor.virtual8086(selector & 0xFFFF)
    else:
        code = descriptor.real_mode(selector & 0xFFFF, old.limit, old.big)
        image = image & ~(VIF | VIP) | flags & (VIF | VIP)
    release(cpu, 3 * size)
    cpu.eip = eip
    cpu.registers.set_eflags(_merged(flags, image, cpu.cpl, size))
    cpu.set_segment(CS, code)

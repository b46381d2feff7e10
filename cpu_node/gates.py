"""Delivering interrupts and exceptions, and the instructions that raise them.

Source: Intel SDM vol. 3A chapter 6; vol. 2 page "INT n/INTO/INT3/INT1"; vol. 3B sections 20.1.4, 20.3.
Left out: the interrupt-redirection bitmap (VME).
"""

from __future__ import annotations

from cpu_node import errors, quick, tasks
from cpu_node.cpu import CR0_PE, ESP, Cpu
from cpu_node.descriptor import (
    CS,
    DS,
    ES,
    FS,
    GS,
    SELECTOR_RPL,
    SS,
    TASK_GATE,
    Gate,
    Segment,
    gate,
    null,
    parse,
    real_mode,
)
from cpu_node.errors import GuestFault, TripleFault, general_protection
from cpu_node.flags import AC, IF, IOPL, OF, RF, TF, VM
from cpu_node.quick import CLEARED_BY_INTERRUPT, CLEARED_BY_TRAP
from cpu_node.segments import mark_accessed, read_descriptor, stack_segment
from cpu_node.stack import merged_sp, room, write_frame

IDT_BIT = 2  # error codes: the index is into the IDT [6.13]
DR7_GD = 0x2000

# Table 6-4 of [6.15 interrupt 8].
CONTRIBUTORY = frozenset((errors.DE, errors.TS, errors.NP, errors.SS, errors.GP))
SETS_RF = frozenset(errors.VECTOR_NAMES) - {errors.DB, errors.NMI, errors.BP, errors.OF}  # faults [17.3.1.1]


def deliver_fault(cpu: Cpu, fault: GuestFault) -> None:
    """Deliver an exception raised by the instruction at cpu.eip."""
    deliver(cpu, fault.vector, fault.error, cr2=fault.cr2)


def deliver(
    cpu: Cpu,
    vector: int,
    error: int | None = None,
    software: bool = False,
    external: bool = False,
    cr2: int | None = None,
) -> None:
    """Enter the handler of `vector`; cpu.eip is what the handler returns to.

    `software`: INT n, INT3, INTO; a fault of their delivery is raised, for the caller to put EIP back.
    `external`: INTR and NMI. Faults while delivering anything but software interrupts become the second
    fault, a double fault or a TripleFault as table 6-5 says. `cr2` goes to CR2 first.
    """
    if cr2 is not None:
        cpu.cr2 = cr2
    try:
        _enter(cpu, vector, error, software, external)
        return
    except GuestFault as fault:
        if software and not isinstance(fault, errors.TaskSwitchFault):
            raise
        second = fault
    while True:
        first = None if software or external else vector
        if second.cr2 is not None:
            cpu.cr2 = second.cr2
        vector, error = combined(first, second)
        software = external = False
        try:
            _enter(cpu, vector, error, software, external)
            return
        except GuestFault as fault:
            second = fault


def combined(first: int | None, second: GuestFault) -> tuple[int, int | None]:
    """What to deliver after `second` came up while delivering the exception `first` (None: an interrupt)."""
    is_contributory = second.vector in CONTRIBUTORY
    if first == errors.DF and (is_contributory or second.vector == errors.PF):
        raise TripleFault(second)
    if first in CONTRIBUTORY and is_contributory:
        return errors.DF, 0
    if first == errors.PF and (is_contributory or second.vector == errors.PF):
        return errors.DF, 0
    return second.vector, second.error


def _enter(cpu: Cpu, vector: int, error: int | None, software: bool, external: bool) -> None:
    """One attempt at delivery; raises before changing anything, but for a committed task switch."""
    flags = cpu.registers.get_eflags()
    rf = RF if vector in SETS_RF and not software and not external else 0
    if not cpu.cr0 & CR0_PE:
        _enter_real_mode(cpu, vector, flags)
    elif flags & VM or not quick.enter(cpu, vector, flags | rf, error, software):
        ext = 0 if software else 1
        offset = vector << 3
        if offset + 7 > cpu.idt_limit:
            raise GuestFault(errors.GP, offset | IDT_BIT | ext)
        entry = gate(cpu.memory.read64(cpu.idt_base + offset & 0xFFFFFFFF))
        if not entry.valid_in_idt or (software and entry.dpl < cpu.cpl):
            raise GuestFault(errors.GP, offset | IDT_BIT | ext)
        if not entry.present:
            raise GuestFault(errors.NP, offset | IDT_BIT | ext)
        if entry.type == TASK_GATE:
            tasks.enter_gate(cpu, entry.selector, flags | rf, error, ext)
        else:
            _enter_handler(cpu, entry, flags | rf, error, ext)
    cpu.halted = False
    cpu.inhibit_interrupts = False
    if vector == errors.NMI and external:
        cpu.nmi_blocked = True
        cpu.hooks.mode_changed()  # IRET has more to do
    elif vector == errors.DB and not software:
        cpu.dr[7] &= ~DR7_GD  # [17.2.4]


def _enter_handler(cpu: Cpu, entry: Gate, flags: int, error: int | None, ext: int) -> None:
    """Through an interrupt or trap gate [6.12.1]."""
    selector, cpl, seg, regs = entry.selector, cpu.cpl, cpu.seg, cpu.regs
    if selector & 0xFFFC == 0:
        raise GuestFault(errors.GP, ext)
    va, raw = read_descriptor(cpu, selector, errors.GP, ext)
    code = parse(selector & 0xFFFC | cpl, raw)
    if not code.code or code.dpl > cpl:
        raise GuestFault(errors.GP, selector & 0xFFFC | ext)
    if not code.present:
        raise GuestFault(errors.NP, selector & 0xFFFC | ext)
    dpl, old_esp = code.dpl, regs[ESP]
    frame = [cpu.eip, seg[CS].selector, flags]
    if error is not None:
        frame.insert(0, error)
    if dpl < cpl and not code.conforming:
        if flags & VM and dpl:
            raise GuestFault(errors.GP, selector & 0xFFFC | ext)
        stack_selector, esp = tasks.inner_stack(cpu, dpl, ext)
        stack = stack_segment(cpu, stack_selector, dpl, stack_selector & SELECTOR_RPL, errors.TS, ext)
        frame += (old_esp, seg[SS].selector)
        if flags & VM:
            frame += (seg[ES].selector, seg[DS].selector, seg[FS].selector, seg[GS].selector)
        room_error, new_cpl, user = stack_selector & 0xFFFC | ext, dpl, False
        code = parse(selector & 0xFFFC | dpl, raw)
    elif flags & VM:
        raise GuestFault(errors.GP, selector & 0xFFFC | ext)
    else:
        stack, esp, room_error, new_cpl, user = seg[SS], old_esp, ext, cpl, cpl == 3
    if not room(stack, esp, len(frame) * entry.size):
        _check_wrapping(stack, esp, len(frame), entry.size, room_error)
    if entry.offset > code.highest:
        raise GuestFault(errors.GP, ext)
    if not code.accessed:
        code = mark_accessed(cpu, va, code)
    sp = write_frame(cpu.memory, stack, esp, frame, entry.size, user, room_error)
    regs[ESP] = sp if stack.big else merged_sp(esp, sp, stack)
    cpu.eip = entry.offset
    cpu.registers.set_eflags(flags & (CLEARED_BY_INTERRUPT if entry.is_interrupt else CLEARED_BY_TRAP))
    if flags & VM:
        for index in (ES, DS, FS, GS):
            cpu.set_segment(index, null(0))
    cpu.set_code_and_stack(code, stack, new_cpl)


def _check_wrapping(stack: Segment, esp: int, count: int, size: int, error: int) -> None:
    """A frame that wraps round the stack segment: each push by itself must be inside."""
    for i in range(count):
        offset = (esp - size * (i + 1)) & stack.span
        if offset < stack.lowest or offset + size - 1 > stack.highest:
            raise GuestFault(errors.SS, error)


def _enter_real_mode(cpu: Cpu, vector: int, flags: int) -> None:
    """Through the interrupt vector table [20.1.4]; no error code is ever pushed."""
    if 4 * vector + 3 > cpu.idt_limit:
        raise GuestFault(errors.GP)
    target = cpu.memory.read32(cpu.idt_base + 4 * vector & 0xFFFFFFFF)
    stack, esp, code = cpu.seg[SS], cpu.regs[ESP], cpu.seg[CS]
    sp = write_frame(cpu.memory, stack, esp, (cpu.eip, code.selector, flags), 2, False, 0)
    cpu.regs[ESP] = merged_sp(esp, sp, stack)
    cpu.eip = target & 0xFFFF
    cpu.registers.set_eflags(flags & ~(IF | TF | AC | RF))
    cpu.set_segment(CS, real_mode(target >> 16, code.limit, code.big))


def int_n(cpu: Cpu, vector: int) -> None:
    """INT n (CDh). In virtual-8086 mode it is IOPL-sensitive."""
    flags = cpu.eflags
    if flags & VM and flags & IOPL != IOPL:
        raise general_protection()
    deliver(cpu, vector, software=True)


def int3(cpu: Cpu) -> None:
    """INT3 (CCh)."""
    deliver(cpu, errors.BP, software=True)


def into(cpu: Cpu) -> bool:
    """INTO; False when OF is clear and nothing happened."""
    if not cpu.eflags & OF:
        return False
    deliver(cpu, errors.OF, software=True)
    return True


def int1(cpu: Cpu) -> None:
    """INT1 (F1h): a #DB trap without a DPL check, DR6 unchanged."""
    deliver(cpu, errors.DB)


def bound(index: int, lower: int, upper: int, size: int) -> None:
    """BOUND on signed values of `size` bytes: #BR outside [lower, upper]."""
    sign = 1 << 8 * size - 1
    if not lower ^ sign <= index ^ sign <= upper ^ sign:
        raise GuestFault(errors.BR)

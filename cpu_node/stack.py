"""Stack accesses of system instructions, and the stack instructions whose slow forms are simulated.

Source: Intel SDM vol. 3A sections 5.3 (limits), 3.4.5.1 (SS.B); vol. 2 pages of ENTER, LEAVE, PUSHF, POPF.
Sizes are in bytes, 2 or 4. SS.B chooses SP or ESP; the unused upper half of ESP is never changed.
Left out: alignment checks (#AC) of these accesses.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpu_node.cpu import EBP, ESP, Cpu, LinearMemory
from cpu_node.descriptor import SS, Segment
from cpu_node.errors import SS as SS_FAULT
from cpu_node.errors import GuestFault, general_protection
from cpu_node.flags import IOPL, RF, VM, popf_merged


def room(segment: Segment, sp: int, length: int) -> bool:
    """Whether `length` bytes can be pushed below `sp` in one piece, without wrapping."""
    start = (sp - length) & segment.span
    last = start + length - 1
    return segment.lowest <= start and last <= segment.highest and last <= segment.span


def check_push(memory: LinearMemory, segment: Segment, sp: int, size: int, user: bool, error: int) -> None:
    """Raise what pushing one value below `sp` would raise."""
    offset = (sp - size) & segment.span
    if offset < segment.lowest or offset + size - 1 > segment.highest:
        raise GuestFault(SS_FAULT, error)
    memory.probe_write(segment.base + offset & 0xFFFFFFFF, size, user)


def write_frame(
    memory: LinearMemory, segment: Segment, sp: int, values: Sequence[int], size: int, user: bool, error: int
) -> int:
    """Write `values` (ascending addresses: the last pushed first) below `sp`; returns the new masked SP.

    Raises #SS(error) or the page fault before anything is written.
    """
    length = len(values) * size
    start = (sp - length) & segment.span
    if size == 4 and room(segment, sp, length):
        try:
            memory.write32s(segment.base + start & 0xFFFFFFFF, values, user)
        except GuestFault:  # pushes go downwards: CR2 is of the first that faults
            for i in range(len(values)):
                check_push(memory, segment, sp - size * i, size, user, error)
            raise
        return start
    for i in range(len(values)):
        check_push(memory, segment, sp - size * i, size, user, error)
    write = memory.write32 if size == 4 else memory.write16
    mask = 0xFFFFFFFF if size == 4 else 0xFFFF
    for i, value in enumerate(values):
        offset = (start + size * i) & segment.span
        write(segment.base + offset & 0xFFFFFFFF, value & mask, user)
    return start


def read_frame(
    memory: LinearMemory, segment: Segment, sp: int, count: int, size: int, user: bool, error: int = 0
) -> Sequence[int]:
    """`count` values from `sp` upwards, zero-extended; #SS(error) outside the segment. For 0 none is read."""
    if not count:
        return ()
    start = sp & segment.span
    last = start + count * size - 1
    if size == 4 and segment.lowest <= start and last <= segment.highest and last <= segment.span:
        return memory.read32s(segment.base + start & 0xFFFFFFFF, count, user)
    read = memory.read32 if size == 4 else memory.read16
    values = []
    for i in range(count):
        offset = (start + size * i) & segment.span
        if offset < segment.lowest or offset + size - 1 > segment.highest:
            raise GuestFault(SS_FAULT, error)
        values.append(read(segment.base + offset & 0xFFFFFFFF, user))
    return values


def merged_sp(esp: int, sp: int, segment: Segment) -> int:
    """ESP with its SP or ESP part, as SS.B says, replaced."""
    return sp if segment.big else esp & 0xFFFF0000 | sp & 0xFFFF


def push(cpu: Cpu, values: Sequence[int], size: int) -> None:
    """Push on the current stack with the privilege of the current CPL; `values` as in write_frame."""
    segment, esp = cpu.seg[SS], cpu.regs[ESP]
    sp = write_frame(cpu.memory, segment, esp, values, size, cpu.cpl == 3, 0)
    cpu.regs[ESP] = merged_sp(esp, sp, segment)


def push_singly(cpu: Cpu, values: Sequence[int], size: int) -> None:
    """`push` of PUSHA and far CALL: a page fault in the middle leaves what has been pushed, and ESP."""
    try:
        push(cpu, values, size)
    except GuestFault as fault:
        if fault.vector != SS_FAULT:
            sp = cpu.regs[ESP]
            for value in reversed(values):  # until it faults again
                sp = write_frame(cpu.memory, cpu.seg[SS], sp, (value,), size, cpu.cpl == 3, 0)
        raise


def peek(cpu: Cpu, count: int, size: int, skip: int = 0) -> Sequence[int]:
    """Values on the current stack, `skip` bytes above its top; nothing is popped."""
    return read_frame(cpu.memory, cpu.seg[SS], cpu.regs[ESP] + skip, count, size, cpu.cpl == 3)


def release(cpu: Cpu, length: int) -> None:
    """Add `length` to SP or ESP."""
    segment, esp = cpu.seg[SS], cpu.regs[ESP]
    cpu.regs[ESP] = merged_sp(esp, (esp + length) & segment.span, segment)


def pushf(cpu: Cpu, size: int) -> None:
    """PUSHF, PUSHFD: VM and RF read as zero."""
    flags = cpu.eflags
    if flags & VM and flags & IOPL != IOPL:
        raise general_protection()
    push(cpu, (flags & ~(VM | RF),), size)


def popf(cpu: Cpu, size: int) -> None:
    """POPF, POPFD."""
    old = cpu.eflags
    if old & VM and old & IOPL != IOPL:
        raise general_protection()
    (value,) = peek(cpu, 1, size)
    release(cpu, size)
    cpu.eflags = popf_merged(old, value, cpu.cpl, size)


def enter(cpu: Cpu, frame: int, level: int, size: int) -> None:
    """ENTER frame, level: for stacks and operand sizes that aren't both 32 bits, and nested levels."""
    segment, regs, user = cpu.seg[SS], cpu.regs, cpu.cpl == 3
    memory, span, level = cpu.memory, segment.span, level & 31
    ebp, esp = regs[EBP], regs[ESP]
    frame_pointer = (esp - size) & span
    outer = [ebp - size * i for i in range(1, level)]  # where the enclosing frames' pointers are
    new_sp = (esp - size * (1 + level) - frame) & span

    def push_all() -> None:  # a display that overlaps the new frame is read as the pushes leave it
        sp = write_frame(memory, segment, esp, (ebp,), size, user, 0)
        for source in outer:
            value = read_frame(memory, segment, source, 1, size, user)
            sp = write_frame(memory, segment, sp, value, size, user, 0)
        if level:
            write_frame(memory, segment, sp, (frame_pointer,), size, user, 0)

    try:
        check_push(memory, segment, esp, size, user, 0)
        for i, sp in enumerate(outer, 1):
            read_frame(memory, segment, sp, 1, size, user)
            check_push(memory, segment, esp - size * i, size, user, 0)
        check_push(memory, segment, esp - size * level, size, user, 0)
        if not segment.lowest <= new_sp <= segment.highest:
            raise GuestFault(SS_FAULT, 0)
    except GuestFault as fault:
        if fault.vector != SS_FAULT:
            push_all()  # until it faults again: what was pushed stays
        raise
    push_all()
    # The last page to fault; what was pushed stays.
    memory.probe_write(segment.base + new_sp & 0xFFFFFFFF, 1, user)
    regs[ESP] = merged_sp(esp, new_sp, segment)
    regs[EBP] = frame_pointer if size == 4 else ebp & 0xFFFF0000 | frame_pointer & 0xFFFF


def leave(cpu: Cpu, size: int) -> None:
    """LEAVE: SP or ESP from BP or EBP, then pop BP or EBP."""
    segment, regs = cpu.seg[SS], cpu.regs
    ebp = regs[EBP]
    (value,) = read_frame(cpu.memory, segment, ebp, 1, size, cpu.cpl == 3)
    regs[ESP] = merged_sp(regs[ESP], (ebp + size) & segment.span, segment)
    regs[EBP] = value if size == 4 else ebp & 0xFFFF0000 | value

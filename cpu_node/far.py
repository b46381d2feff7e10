"""Control transfers between segments and privilege levels: far JMP, CALL, RET, SYSENTER, SYSEXIT.

Source: Intel SDM vol. 2 pages of JMP, CALL, RET, SYSENTER, SYSEXIT; vol. 3A sections 5.8 and 7.3.
`size` is the operand size in bytes, 2 or 4. IRET is in iret.py.
"""

from __future__ import annotations

from cpu_node import descriptor, gates, tasks
from cpu_node.cpu import CR0_PE, ECX, EDX, ESP, Cpu
from cpu_node.descriptor import (
    CALL_GATE16,
    CALL_GATE32,
    CS,
    DS,
    ES,
    FS,
    GS,
    SELECTOR_RPL,
    SELECTOR_TI,
    SS,
    TASK_GATE,
    Gate,
    Segment,
    gate,
    null,
    parse,
)
from cpu_node.errors import GP, NP, TS, GuestFault, TaskSwitchFault, general_protection
from cpu_node.errors import SS as SS_FAULT
from cpu_node.flags import IF, RF, VM
from cpu_node.segments import is_null, mark_accessed, read_descriptor, stack_segment
from cpu_node.stack import check_push, merged_sp, peek, push, read_frame, release, write_frame

CODE32_RING0, DATA32_RING0, CODE32_RING3, DATA32_RING3 = 0xC09B, 0xC093, 0xC0FB, 0xC0F3


def far_jump(cpu: Cpu, selector: int, offset: int, size: int) -> None:
    """JMP ptr16:16/32 and its memory form."""
    _transfer(cpu, selector, offset, size, is_call=False)


def far_call(cpu: Cpu, selector: int, offset: int, size: int) -> None:
    """CALL ptr16:16/32 and its memory form."""
    _transfer(cpu, selector, offset, size, is_call=True)


def _transfer(cpu: Cpu, selector: int, offset: int, size: int, is_call: bool) -> None:
    if not cpu.protected:
        _transfer_by_paragraph(cpu, selector, offset, size, is_call)
        return
    if is_null(selector):
        raise general_protection()
    va, raw = read_descriptor(cpu, selector)
    target = parse(selector, raw)
    if not target.system:
        _direct(cpu, target, va, offset, size, is_call)
        return
    if max(cpu.cpl, selector & SELECTOR_RPL) > target.dpl:
        raise general_protection(selector & 0xFFFC)
    if target.type in (CALL_GATE16, CALL_GATE32, TASK_GATE):
        if not target.present:
            raise GuestFault(NP, selector & 0xFFFC)
        if target.type == TASK_GATE:
            _to_task(cpu, gate(raw).selector, is_call)
        else:
            _through_gate(cpu, gate(raw), is_call)
    elif target.type in tasks.TSS_AVAILABLE and not selector & SELECTOR_TI:
        _to_task(cpu, selector, is_call)
    else:
        raise general_protection(selector & 0xFFFC)


def _transfer_by_paragraph(cpu: Cpu, selector: int, offset: int, size: int, is_call: bool) -> None:
    """Real and virtual-8086 mode."""
    old = cpu.seg[CS]
    if cpu.cr0 & CR0_PE:
        code = descriptor.virtual8086(selector)
    else:
        code = descriptor.real_mode(selector, old.limit, old.big)
    if is_call:
        check_push(cpu.memory, cpu.seg[SS], cpu.regs[ESP], size, cpu.cpl == 3, 0)
    if offset > code.highest:
        raise general_protection()
    if is_call:
        push(cpu, (cpu.eip, old.selector), size)
    cpu.set_segment(CS, code)
    cpu.eip = offset


def _direct(cpu: Cpu, code: Segment, va: int, offset: int, size: int, is_call: bool) -> None:
    """To a code segment at the same privilege [5.8.1]."""
    cpl, selector = cpu.cpl, code.selector
    if code.conforming:
        allowed = code.dpl <= cpl
    else:
        allowed = code.dpl == cpl and selector & SELECTOR_RPL <= cpl
    if not code.code or not allowed:
        raise general_protection(selector & 0xFFFC)
    if not code.present:
        raise GuestFault(NP, selector & 0xFFFC)
    _same_privilege(cpu, code, va, offset, size, is_call)


def _same_privilege(cpu: Cpu, code: Segment, va: int, offset: int, size: int, is_call: bool) -> None:
    stack, esp, user = cpu.seg[SS], cpu.regs[ESP], cpu.cpl == 3
    if is_call:
        check_push(cpu.memory, stack, esp, size, user, 0)
        try:
            check_push(cpu.memory, stack, esp - size, size, user, 0)
        except GuestFault as fault:
            if fault.vector != SS_FAULT:
                write_frame(cpu.memory, stack, esp, (cpu.seg[CS].selector,), size, user, 0)  # this stays
            raise
    if offset > code.highest:
        raise general_protection()
    code = mark_accessed(cpu, va, parse(code.selector & 0xFFFC | cpu.cpl, code.raw))
    if is_call:
        sp = write_frame(cpu.memory, stack, esp, (cpu.eip, cpu.seg[CS].selector), size, user, 0)
        cpu.regs[ESP] = merged_sp(esp, sp, stack)
    cpu.set_segment(CS, code)
    cpu.eip = offset


def _through_gate(cpu: Cpu, call_gate: Gate, is_call: bool) -> None:
    """Through a call gate [5.8.4]; only a CALL may gain privilege."""
    selector = call_gate.selector
    if is_null(selector):
        raise general_protection()
    va, raw = read_descriptor(cpu, selector)
    code = parse(selector, raw)
    if not code.code or code.dpl > cpu.cpl:
        raise general_protection(selector & 0xFFFC)
    inner = not code.conforming and code.dpl < cpu.cpl
    if inner and not is_call:
        raise general_protection(selector & 0xFFFC)
    if not code.present:
        raise GuestFault(NP, selector & 0xFFFC)
    if inner:
        _call_inner(cpu, call_gate, code, va)
    else:
        _same_privilege(cpu, code, va, call_gate.offset, call_gate.size, is_call)


def _call_inner(cpu: Cpu, call_gate: Gate, code: Segment, va: int) -> None:
    """Switch to the inner stack of the TSS and copy the parameters [5.8.5]."""
    dpl, size, memory, seg = code.dpl, call_gate.size, cpu.memory, cpu.seg
    old_stack, old_esp = seg[SS], cpu.regs[ESP]
    stack_selector, esp = tasks.inner_stack(cpu, dpl, 0)
    stack = stack_segment(cpu, stack_selector, dpl, stack_selector & SELECTOR_RPL, TS)
    for i in range(4 + call_gate.parameters):
        check_push(memory, stack, esp - size * i, size, False, stack_selector & 0xFFFC)
    if call_gate.offset > code.highest:
        raise general_protection()
    parameters = read_frame(memory, old_stack, old_esp, call_gate.parameters, size, cpu.cpl == 3)
    code = mark_accessed(cpu, va, parse(code.selector & 0xFFFC | dpl, code.raw))
    frame = (cpu.eip, seg[CS].selector, *parameters, old_esp, old_stack.selector)
    sp = write_frame(memory, stack, esp, frame, size, False, stack_selector & 0xFFFC)
    cpu.regs[ESP] = merged_sp(esp, sp, stack)
    cpu.eip = call_gate.offset
    cpu.set_code_and_stack(code, stack, dpl)


def _to_task(cpu: Cpu, selector: int, is_call: bool) -> None:
    va, raw = tasks.tss_descriptor(cpu, selector, tasks.TSS_AVAILABLE, GP)
    reason = tasks.Reason.NEST if is_call else tasks.Reason.JUMP
    switch_task(cpu, selector, va, raw, reason)


def switch_task(cpu: Cpu, selector: int, va: int, raw: int, reason: tasks.Reason) -> None:
    """A task switch by an instruction: what faults after its commit point is delivered in the new task."""
    try:
        tasks.switch(cpu, selector, va, raw, reason, cpu.eflags)
    except TaskSwitchFault as fault:
        gates.deliver_fault(cpu, fault)


def far_return(cpu: Cpu, size: int, parameters: int = 0) -> None:
    """RETF and RETF n: `parameters` bytes are released on the caller's and, going outward, both stacks."""
    if not cpu.protected:
        eip, selector = peek(cpu, 2, size)
        old = cpu.seg[CS]
        if eip > old.highest:
            raise general_protection()
        real = descriptor.real_mode(selector & 0xFFFF, old.limit, old.big)
        code = descriptor.virtual8086(selector & 0xFFFF) if cpu.cr0 & CR0_PE else real
        release(cpu, 2 * size + parameters)
        cpu.set_segment(CS, code)
        cpu.eip = eip
        return
    eip, selector = peek(cpu, 2, size)
    code, va = return_segment(cpu, selector & 0xFFFF)
    if selector & SELECTOR_RPL == cpu.cpl:
        if eip > code.highest:
            raise general_protection()
        code = mark_accessed(cpu, va, code)
        release(cpu, 2 * size + parameters)
        cpu.set_segment(CS, code)
    else:
        new_esp, stack_selector = peek(cpu, 2, size, skip=2 * size + parameters)
        return_outward(cpu, code, va, eip, stack_selector & 0xFFFF, new_esp, parameters)
    cpu.eip = eip


def return_segment(cpu: Cpu, selector: int) -> tuple[Segment, int]:
    """The code segment a RETF or IRET goes back to, and its descriptor's address."""
    if selector & 0xFFFC == 0:
        raise general_protection()
    va, raw = read_descriptor(cpu, selector)
    code, rpl = parse(selector, raw), selector & SELECTOR_RPL
    wrong = code.dpl > rpl if code.conforming else code.dpl != rpl
    if not code.code or rpl < cpu.cpl or wrong:
        raise general_protection(selector & 0xFFFC)
    if not code.present:
        raise GuestFault(NP, selector & 0xFFFC)
    return code, va


def return_outward(
    cpu: Cpu, code: Segment, va: int, eip: int, stack_selector: int, new_esp: int, parameters: int
) -> None:
    """The part of RETF and IRET that lowers privilege: new SS:ESP, data segments dropped [5.8.6]."""
    new_cpl = code.selector & SELECTOR_RPL
    stack = stack_segment(cpu, stack_selector, new_cpl, stack_selector & SELECTOR_RPL)
    if eip > code.highest:
        raise general_protection()
    if not code.accessed:
        code = mark_accessed(cpu, va, code)
    # With a 16-bit SS only SP is loaded: ESP keeps its upper half, as on hardware.
    cpu.regs[ESP] = merged_sp(cpu.regs[ESP], (new_esp + parameters) & stack.span, stack)
    seg = cpu.seg
    for index in (ES, DS, FS, GS):
        segment = seg[index]
        if segment.usable and segment.dpl < new_cpl and not segment.conforming:
            cpu.set_segment(index, null(0))
    cpu.set_code_and_stack(code, stack, new_cpl)


def sysenter(cpu: Cpu) -> None:
    """SYSENTER [5.8.7]; the caller's EIP and ESP are its own business."""
    selector = cpu.sysenter_cs & 0xFFFC
    if not cpu.cr0 & CR0_PE or not selector:
        raise general_protection()
    cpu.eflags &= ~(VM | IF | RF)
    cpu.regs[ESP] = cpu.sysenter_esp
    cpu.eip = cpu.sysenter_eip
    code = descriptor.flat(selector, CODE32_RING0)
    cpu.set_code_and_stack(code, descriptor.flat(selector + 8 & 0xFFFF, DATA32_RING0), 0)


def sysexit(cpu: Cpu) -> None:
    """SYSEXIT: to CPL 3 at EDX with the stack at ECX."""
    selector = cpu.sysenter_cs & 0xFFFC
    if not cpu.cr0 & CR0_PE or not selector or cpu.cpl:
        raise general_protection()
    cpu.regs[ESP] = cpu.regs[ECX]
    cpu.eip = cpu.regs[EDX]
    code = descriptor.flat((selector + 16 | 3) & 0xFFFF, CODE32_RING3)
    cpu.set_code_and_stack(code, descriptor.flat((selector + 24 | 3) & 0xFFFF, DATA32_RING3), 3)

"""Assists of the software TLB: a miss is a page walk here, and a page fault goes to its handler from here.

Source: Intel SDM vol. 3A 4.3, 4.6-4.8 (32-bit paging, rights, accessed and dirty bits), 4.7 (error codes),
6.12.1, 6.15. Registers and rules are those of assist_stubs.py, but for who comes here: the probe of a data
access (emit_soft.py), with r8d = linear address, r9d = size - 1, r10 = the probe, r12 = rcx. Goes back to the
probe, which finds an entry now; or enters the handler of #PF, where Python has seen that probe's
instruction before (TLB_SITES); or leaves by EXIT_TLB, everything as it was.
Left out, for Python: 4 MiB pages, what is no RAM, pages whose writes must be noticed, accesses of two pages
that aren't neighbours in host memory, those that wrap at 4 GiB (#GP and #SS come before #PF), everything
about #PF that isn't as it was the last time.
"""

from __future__ import annotations

from cpu_node import layout as at
from cpu_node.assist_text import (
    CODE_SELECTOR,
    LANDED_FAULT,
    RESTORE_FLAGS,
    SAVE_FLAGS,
    STACK_SELECTOR,
    enter_window,
    inner_stack,
    land,
)
from cpu_node.errors import PF
from cpu_node.flags import NT, RF, TF, VM
from cpu_node.paging import ERR_PRESENT, ERR_USER, ERR_WRITE, FRAME, PS, RW, US, A, D, P

WRITES = at.TLB_WRITE - at.TLB_READ
_GUARDED, _PAGES, _SITES = at.GUARDED - at.RECORD, at.TLB_PAGES - at.RECORD, at.TLB_SITES - at.RECORD


def miss(write: bool) -> str:
    """No entry for a read (write) of r8d."""
    error = ERR_USER | (ERR_WRITE if write else 0)
    table = WRITES if write else 0
    wanted = A | D if write else A
    if write:
        rights = f"""
            test r11b, {RW}
            jz denied"""
        guard = "jne fail"
        also = f"mov [r14+rcx*8+{WRITES}], r10"
    else:
        rights, guard = "", ""
        also = f"""
            test r9b, {D}
            jz entered
            test r11b, {RW}
            jz entered
            mov r11d, r9d
            shr r11d, 12
            cmp byte ptr [r15+r11+{_GUARDED}], 0
            jne entered
            mov [r14+rcx*8+{WRITES}], r10
        entered:"""
    return f"""
        mov dword ptr [r15+{at.TLB_VA}], r8d
        mov dword ptr [r15+{at.TLB_LAST}], r9d
        mov dword ptr [r15+{at.TLB_IS_WRITE}], {int(write)}
        mov [r15+{at.FAULT_RIP}], r10
        {SAVE_FLAGS}
        lea ecx, [r8+r9]
        cmp ecx, r8d
        jb fail
        movabs r13, {at.RAM:#x}
    page:
        mov ecx, dword ptr [r15+{at.CR3}]
        and ecx, {FRAME:#x}
        mov r11d, r8d
        shr r11d, 22
        lea rcx, [rcx+r11*4]
        cmp rcx, [r15+{at.RAM_SIZE}]
        jae fail
        mov r11d, dword ptr [r13+rcx]
        test r11b, {P}
        jz absent
        test r11b, {PS}
        jnz fail
        mov r14d, r11d
        and r14d, {FRAME:#x}
        mov r9d, r8d
        shr r9d, 10
        and r9d, 0xffc
        add r14, r9
        cmp r14, [r15+{at.RAM_SIZE}]
        jae fail
        mov r9d, dword ptr [r13+r14]
        test r9b, {P}
        jz absent
        and r11d, r9d
        test r11b, {US}
        jz denied
        {rights}
        mov r10d, r9d
        and r10d, {FRAME:#x}
        cmp r10, [r15+{at.RAM_SIZE}]
        jae fail
        shr r10d, 12
        cmp byte ptr [r15+r10+{_GUARDED}], 0
        {guard}
        test byte ptr [r13+rcx], {A}
        jnz used
        or dword ptr [r13+rcx], {A}
    used:
        mov ecx, r9d
        and ecx, {wanted}
        cmp ecx, {wanted}
        je marked
        or r9d, {wanted}
        mov dword ptr [r13+r14], r9d
    marked:
        shl r10, 12
        add r10, r13
        mov ecx, r8d
        and ecx, {FRAME:#x}
        sub r10, rcx
        inc r10
        shr ecx, 12
        movabs r14, {at.TLB_READ:#x}
        cmp qword ptr [r14+rcx*8], 0
        jne listed
        mov r8d, dword ptr [r15+{at.TLB_COUNT}]
        cmp r8d, {at.TLB_PAGES_MAX}
        jae fail
        mov dword ptr [r15+r8*4+{_PAGES}], ecx
        inc dword ptr [r15+{at.TLB_COUNT}]
    listed:
        mov [r14+rcx*8], r10
        {also}
        inc qword ptr [r15+{at.TLB_FILLS}]
        mov r8d, dword ptr [r15+{at.TLB_VA}]
        mov r9d, dword ptr [r15+{at.TLB_LAST}]
        mov r11d, r8d
        add r9d, r8d
        shr r9d, 12
        shr r11d, 12
        cmp r9d, r11d
        je done
        mov r10, [r14+r9*8+{table}]
        test r10, r10
        jz second
        cmp r10, [r14+r11*8+{table}]
        jne fail
    done:
        mov r10, [r15+{at.FAULT_RIP}]
        mov r13, [r15+{at.WINDOW}]
        mov r14, [r15+{at.TABLE}]
        {RESTORE_FLAGS}
        jmp {{tail_return}}
    second:
        mov r8d, r9d
        shl r8d, 12
        jmp page
    fail:
        mov r8d, dword ptr [r15+{at.TLB_VA}]
        mov rcx, r12
        mov r13, [r15+{at.WINDOW}]
        mov r14, [r15+{at.TABLE}]
        {RESTORE_FLAGS}
        jmp {at.CODE + at.exit_stub(at.EXIT_TLB):#x}
    absent:
        mov r9d, {error}
        jmp fault
    denied:
        mov r9d, {error | ERR_PRESENT}
    fault:
        {_page_fault()}"""


def _page_fault() -> str:
    """#PF about r8d with error code r9d. From where r8d is EIP on, a host fault leaves by EXIT_ASSIST."""
    gate = at.FAULT_GATE
    return f"""
        cmp dword ptr [r15+{gate + at.GATE_VECTOR}], {PF}
        jne fail
        test dword ptr [r15+{at.SYSTEM_FLAGS}], {NT | VM | TF | RF}
        jnz fail
        mov r10, [r15+{at.FAULT_RIP}]
        mov r11d, r10d
        and r11d, {at.TLB_SITES_COUNT - 1}
        shl r11d, 4
        cmp [r15+r11+{_SITES}], r10
        jne fail
        mov dword ptr [r15+{at.TLB_CR2}], r8d
        mov r8d, dword ptr [r15+r11+{_SITES + 8}]
        {inner_stack(gate)}
        {RESTORE_FLAGS}
        mov r11, rsp
        mov rsp, [r15+{at.HOST_RSP}]
        pushfq
        pop r14
        mov rsp, r11
        mov ecx, dword ptr [r15+{at.INTERRUPT_FLAG}]
        lea r14d, [r14+rcx-0x200]
        mov ecx, dword ptr [r15+{at.SYSTEM_FLAGS}]
        lea r14d, [r14+rcx+{RF}]
        lea r10d, [r10-24]
        lea rcx, [r13+r10]
        movzx r11d, word ptr [r15+{STACK_SELECTOR}]
        mov dword ptr [rcx+20], r11d
        mov dword ptr [rcx+16], esp
        mov dword ptr [rcx+12], r14d
        movzx r11d, word ptr [r15+{CODE_SELECTOR}]
        mov dword ptr [rcx+8], r11d
        mov dword ptr [rcx+4], r8d
        mov dword ptr [rcx], r9d
        mov ecx, dword ptr [r15+{at.TLB_CR2}]
        mov dword ptr [r15+{at.CR2}], ecx
        {land(gate, LANDED_FAULT)}
        mov rcx, [r15+{at.PAGE_FAULTS}]
        lea rcx, [rcx+1]
        mov [r15+{at.PAGE_FAULTS}], rcx
        mov esp, r10d
        mov r8d, dword ptr [r15+{gate + at.GATE_EIP}]
        {enter_window(at.KERNEL_WINDOW, at.KERNEL_TABLE)}
        jmp {{tail_jump}}"""


def flush() -> str:
    """A function without arguments: empties the TLB."""
    return f"""
        movabs rdx, {at.RECORD:#x}
        movabs rsi, {at.TLB_READ:#x}
        mov ecx, dword ptr [rdx+{at.TLB_COUNT}]
        test ecx, ecx
        jz empty
        mov dword ptr [rdx+{at.TLB_COUNT}], 0
    next:
        mov eax, dword ptr [rdx+rcx*4+{_PAGES - 4}]
        mov qword ptr [rsi+rax*8], 0
        mov qword ptr [rsi+rax*8+{WRITES}], 0
        dec ecx
        jnz next
    empty:
        xor eax, eax
        ret"""


def drop() -> str:
    """Forget the page whose number is r9; r13 changes."""
    return f"""
        movabs r13, {at.TLB_READ:#x}
        cmp qword ptr [r13+r9*8], 0
        je dropped
        mov qword ptr [r13+r9*8], 0
        mov qword ptr [r13+r9*8+{WRITES}], 0
    dropped:"""

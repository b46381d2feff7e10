"""Text that several assists have in common (assist_stubs.py, tlb_stubs.py), and what it leaves for Python.

Registers and rules: assist_stubs.py. Left out: anything that is an instruction's own.
"""

from __future__ import annotations

from cpu_node import layout as at
from cpu_node.descriptor import CS, SS

LANDED_SYSENTER, LANDED_SYSEXIT, LANDED_IRET, LANDED_GATE, LANDED_FAULT = range(1, 6)  # in CHANGED + CS
CODE_SELECTOR = at.SELECTORS + 2 * CS
STACK_SELECTOR = at.SELECTORS + 2 * SS
LANDED = at.CHANGED + CS


def to_simulator() -> str:
    return f"""
        mov rcx, r12
        mov r13, [r15+{at.WINDOW}]
        jmp {at.CODE + at.exit_stub(at.EXIT_SIMULATE):#x}"""


SAVE_FLAGS = f"""
    mov r11, rax
    lahf
    seto al
    mov dword ptr [r15+{at.SAVED_FLAGS}], eax
    mov rax, r11"""
RESTORE_FLAGS = f"""
    mov r11, rax
    mov eax, dword ptr [r15+{at.SAVED_FLAGS}]
    add al, 0x7f
    sahf
    mov rax, r11"""


def enter_window(window: int, table: int) -> str:
    return f"""
        mov r13, [r15+{window}]
        mov [r15+{at.WINDOW}], r13
        wrgsbase r13
        mov r14, [r15+{table}]
        mov [r15+{at.TABLE}], r14"""


COUNT_ENTRY = f"""
        mov rcx, [r15+{at.ENTERED_USER}]
        lea rcx, [rcx+1]
        mov [r15+{at.ENTERED_USER}], rcx"""


def inner_stack(gate: int) -> str:
    """Leave to `fail` unless what is known of a gate (INT_GATE or FAULT_GATE) still holds; ESP0 in r10d.

    Changes rcx; r13 becomes the kernel window.
    """
    return f"""
        mov r13, [r15+{at.KERNEL_WINDOW}]
        {_same_in_kernel(gate + at.GATE_VA, gate + at.GATE_RAW)}
        {_same_in_kernel(gate + at.GATE_CS_VA, gate + at.GATE_CS_RAW)}
        {_same_in_kernel(gate + at.GATE_SS_VA, gate + at.GATE_SS_RAW)}
        mov ecx, dword ptr [r15+{gate + at.GATE_STACK_VA}]
        mov r10d, dword ptr [r13+rcx]
        movzx ecx, word ptr [r13+rcx+4]
        cmp cx, word ptr [r15+{gate + at.GATE_SELECTORS + 2}]
        jne fail"""


def land(gate: int, landed: int) -> str:
    """IF, CS and SS as the gate has them, once the frame is written; changes rcx."""
    return f"""
        mov ecx, dword ptr [r15+{gate + at.GATE_CLEARS_IF}]
        jrcxz trap
        mov dword ptr [r15+{at.INTERRUPT_FLAG}], 0
    trap:
        mov ecx, dword ptr [r15+{gate + at.GATE_SELECTORS}]
        mov dword ptr [r15+{CODE_SELECTOR}], ecx
        mov byte ptr [r15+{LANDED}], {landed}"""


def _same_in_kernel(va: int, raw: int) -> str:
    """r13 is the kernel window."""
    return f"""
        mov ecx, dword ptr [r15+{va}]
        mov rcx, [r13+rcx]
        cmp rcx, [r15+{raw}]
        jne fail"""



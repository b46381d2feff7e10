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


def same_in_kernel(va: int, raw: int) -> str:
    """The same for code at CPL 3; r13 is the kernel window."""
    return f"""
        mov ecx, dword ptr [r15+{va}]
        mov rcx, [r13+rcx]
        cmp rcx, [r15+{raw}]
        jne fail"""



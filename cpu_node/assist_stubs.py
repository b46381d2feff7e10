"""Assists: system instructions that come often, done in hand-written code without leaving to Python.

Source: Intel SDM vol. 2 pages of MOV, POP, INT n, IRET, SYSENTER, SYSEXIT, INVLPG; vol. 3A 5.8.7, 6.12.1.
A template jumps here with r8d = the instruction's address, r9d = its operand and, where the guest goes on
behind it, r10 = the host address of that. An assist does all of the instruction or nothing: with anything
unusual it leaves to the simulator. What it may take for granted Python wrote to the record (assists.py);
what the guest can change without telling, descriptors in memory, is compared. Rules:
- r12 = rcx from the first instruction on; other guest registers change only in the commit, behind the last
  memory access that can fault, so a fault can always be left by `_fix`;
- a signal that finds RIP here sets KICK only; the tails look at it last, and are started again if a signal
  finds RIP in them;
- assists above `flags_from` keep the status flags in SAVED_FLAGS while they compare, those below use
  instructions that don't touch them.
Left out: everything that isn't flat 32-bit protected mode, task switches, virtual-8086 mode.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from cpu_node import layout as at
from cpu_node import tlb_strings, tlb_stubs
from cpu_node.assist_text import (
    CODE_SELECTOR,
    COUNT_ENTRY,
    LANDED,
    LANDED_GATE,
    LANDED_IRET,
    LANDED_SYSENTER,
    LANDED_SYSEXIT,
    RESTORE_FLAGS,
    SAVE_FLAGS,
    STACK_SELECTOR,
    enter_window,
    inner_stack,
    land,
    to_simulator,
)
from cpu_node.descriptor import DS, ES, FS, GS
from cpu_node.flags import NT, RF, TF, VM

INT_LENGTH = 2  # CD ib
OUTER_SLOTS = {ES: 0, DS: 1, FS: 2, GS: 3}
_ENTRY = at.LOADABLE - at.RECORD


class AssistImage(NamedTuple):
    """Text of each piece in order, and the names where ranges begin."""

    pieces: tuple[tuple[str, str], ...]
    tails: tuple[str, str]  # the first two; started again when a signal comes there
    tails_end: str
    flags_from: str


def _tail_return() -> str:
    """Go on behind the instruction, at r10."""
    return f"""
        mov ecx, dword ptr [r15+{at.KICK}]
        jrcxz go
        mov rcx, r12
        mov [r15+{at.FAULT_RIP}], r10
        jmp {at.CODE + at.exit_stub(at.EXIT_SIGNAL):#x}
    go:
        mov rcx, r12
        jmp r10"""


def _tail_jump() -> str:
    """Go on at guest address r8d."""
    return f"""
        mov ecx, dword ptr [r15+{at.KICK}]
        jrcxz go
        mov rcx, r12
        jmp {at.CODE + at.exit_stub(at.EXIT_INDIRECT):#x}
    go:
        mov rcx, r12
        jmp qword ptr [r14+r8*8]"""


def _fix(restore_flags: bool) -> str:
    """A memory access of an assist faulted."""
    return f"""
        mov rcx, r12
        mov r13, [r15+{at.WINDOW}]
        {RESTORE_FLAGS if restore_flags else ""}
        jmp {at.CODE + at.exit_stub(at.EXIT_ASSIST):#x}"""


def _load(index: int) -> str:
    """MOV and POP to ES, DS, FS or GS at CPL 0; r9d is the selector."""
    raw = at.SEGMENT_RAW + 8 * index
    outer = at.OUTER + OUTER_SLOTS[index]
    if index in (FS, GS):
        base, pointer = (at.FS_BASE, at.FS_POINTER) if index == FS else (at.GS_BASE, at.GS_POINTER)
        known = at.SELECTOR_PLAIN
        null = f"""
            lea ecx, [rcx-1]
            jrcxz compare
            mov r13d, 0
            mov [r15+{raw}], r13
            mov [r15+{pointer}], r13
            mov dword ptr [r15+{base}], r13d
            mov byte ptr [r15+{outer}], r13b
            jmp commit"""
        place = f"""
            mov r13d, dword ptr [r15+r11*4+{_ENTRY + at.SELECTOR_BASE}]
            mov dword ptr [r15+{base}], r13d
            lea r13, [r15+{base}]
            mov [r15+{pointer}], r13"""
    else:
        known, null, place = at.SELECTOR_FLAT, "", ""
    return f"""
        mov r12, rcx
        lea r11, [r9*8]
        mov ecx, dword ptr [r15+r11*4+{_ENTRY + known}]
        jrcxz fail
        {null}
    compare:
        mov ecx, dword ptr [r15+r11*4+{_ENTRY + at.SELECTOR_VA}]
        mov rcx, gs:[ecx]
        mov r13, [r15+r11*4+{_ENTRY + at.SELECTOR_RAW}]
        not r13
        lea rcx, [rcx+r13+1]
        jrcxz same
    fail:
        {to_simulator()}
    same:
        not r13
        mov [r15+{raw}], r13
        {place}
        mov r13b, byte ptr [r15+r11*4+{_ENTRY + at.SELECTOR_OUTER}]
        mov byte ptr [r15+{outer}], r13b
    commit:
        mov word ptr [r15+{at.SELECTORS + 2 * index}], r9w
        mov byte ptr [r15+{at.CHANGED + index}], 1
        mov r13, [r15+{at.WINDOW}]
        jmp {{tail_return}}"""


def _sysenter() -> str:
    return f"""
        mov r12, rcx
        mov rcx, [r15+{at.SYSENTER_READY}]
        jrcxz fail
        mov dword ptr [r15+{at.INTERRUPT_FLAG}], 0
        mov ecx, dword ptr [r15+{at.SYSENTER_SELECTORS}]
        mov dword ptr [r15+{CODE_SELECTOR}], ecx
        mov byte ptr [r15+{LANDED}], {LANDED_SYSENTER}
        mov esp, dword ptr [r15+{at.SYSENTER_ESP}]
        mov r8d, dword ptr [r15+{at.SYSENTER_EIP}]
        {enter_window(at.KERNEL_WINDOW, at.KERNEL_TABLE)}
        jmp {{tail_jump}}
    fail:
        {to_simulator()}"""


def _sysexit() -> str:
    return f"""
        mov r12, rcx
        mov rcx, [r15+{at.SYSENTER_READY}]
        jrcxz fail
        mov rcx, [r15+{at.USER_TABLE}]
        jrcxz fail
        mov ecx, dword ptr [r15+{at.SYSEXIT_SELECTORS}]
        mov dword ptr [r15+{CODE_SELECTOR}], ecx
        mov byte ptr [r15+{LANDED}], {LANDED_SYSEXIT}
        mov esp, r12d
        mov r8d, edx
        {enter_window(at.USER_WINDOW, at.USER_TABLE)}
        {COUNT_ENTRY}
        jmp {{tail_jump}}
    fail:
        {to_simulator()}"""


def _same_descriptor(va: int, raw: int) -> str:
    return f"""
        mov ecx, dword ptr [r15+{va}]
        mov rcx, gs:[ecx]
        cmp rcx, [r15+{raw}]
        jne fail"""


def _iret() -> str:
    """IRETD at CPL 0, to CPL 0 or 3, where no system flag but IF changes. RF counts for nothing here."""
    return f"""
        mov r12, rcx
        {SAVE_FLAGS}
        cmp dword ptr [r15+{at.RETURN_READY}], 0
        je fail
        test dword ptr [r15+{at.SYSTEM_FLAGS}], {NT | VM | TF}
        jnz fail
        mov r13d, dword ptr gs:[esp]
        mov r9d, dword ptr gs:[esp+4]
        mov r11d, dword ptr gs:[esp+8]
        mov ecx, r11d
        and ecx, {at.OTHER_FLAGS & ~RF}
        cmp ecx, dword ptr [r15+{at.SYSTEM_FLAGS}]
        jne fail
        test r11d, 0x200
        jz quiet
        cmp dword ptr [r15+{at.PENDING}], 0
        jne fail
    quiet:
        movzx r9d, r9w
        cmp r9w, word ptr [r15+{CODE_SELECTOR}]
        jne outward
        cmp r9d, dword ptr [r15+{at.KERNEL_CS}]
        jne fail
        {_same_descriptor(at.KERNEL_CS_VA, at.KERNEL_CS_RAW)}
        lea r10d, [rsp+12]
        jmp commit
    fail:
        {RESTORE_FLAGS}
        {to_simulator()}
    outward:
        cmp r9d, dword ptr [r15+{at.USER_CS}]
        jne fail
        {_same_descriptor(at.USER_CS_VA, at.USER_CS_RAW)}
        mov ecx, dword ptr gs:[esp+16]
        movzx ecx, cx
        cmp ecx, dword ptr [r15+{at.USER_SS}]
        jne fail
        {_same_descriptor(at.USER_SS_VA, at.USER_SS_RAW)}
        cmp dword ptr [r15+{at.OUTER}], 0
        jne fail
        cmp qword ptr [r15+{at.USER_TABLE}], 0
        je fail
        mov r10d, dword ptr gs:[esp+12]
        mov word ptr [r15+{CODE_SELECTOR}], r9w
        mov ecx, dword ptr [r15+{at.USER_SS}]
        mov word ptr [r15+{STACK_SELECTOR}], cx
        mov byte ptr [r15+{LANDED}], {LANDED_IRET}
        mov r8d, r13d
        {enter_window(at.USER_WINDOW, at.USER_TABLE)}
        {COUNT_ENTRY}
        mov r13d, r8d
    commit:
        mov r8d, r13d
        mov ecx, r11d
        and ecx, 0x200
        mov dword ptr [r15+{at.INTERRUPT_FLAG}], ecx
        and r11d, {at.STATUS_FLAGS}
        or r11d, 0x202
        mov rsp, [r15+{at.HOST_RSP}]
        push r11
        popfq
        mov esp, r10d
        mov r13, [r15+{at.WINDOW}]
        jmp {{tail_jump}}"""


def _int() -> str:
    """INT n at CPL 3 through a gate to CPL 0; r9d is the vector."""
    return f"""
        mov r12, rcx
        {SAVE_FLAGS}
        cmp r9d, dword ptr [r15+{at.INT_GATE + at.GATE_VECTOR}]
        jne fail
        test dword ptr [r15+{at.SYSTEM_FLAGS}], {NT | VM | TF | RF}
        jnz fail
        {inner_stack(at.INT_GATE)}
        {RESTORE_FLAGS}
        mov r9, rsp
        mov rsp, [r15+{at.HOST_RSP}]
        pushfq
        pop r11
        mov rsp, r9
        mov ecx, dword ptr [r15+{at.INTERRUPT_FLAG}]
        lea r11d, [r11+rcx-0x200]
        mov ecx, dword ptr [r15+{at.SYSTEM_FLAGS}]
        lea r11d, [r11+rcx]
        lea r9d, [r10-20]
        lea rcx, [r13+r9]
        movzx r10d, word ptr [r15+{STACK_SELECTOR}]
        mov dword ptr [rcx+16], r10d
        mov dword ptr [rcx+12], esp
        mov dword ptr [rcx+8], r11d
        movzx r10d, word ptr [r15+{CODE_SELECTOR}]
        mov dword ptr [rcx+4], r10d
        lea r10d, [r8+{INT_LENGTH}]
        mov dword ptr [rcx], r10d
        {land(at.INT_GATE, LANDED_GATE)}
        mov esp, r9d
        mov r8d, dword ptr [r15+{at.INT_GATE + at.GATE_EIP}]
        {enter_window(at.KERNEL_WINDOW, at.KERNEL_TABLE)}
        jmp {{tail_jump}}
    fail:
        {RESTORE_FLAGS}
        {to_simulator()}"""


def _invlpg() -> str:
    """INVLPG of a page from which nothing was derived; r9d is the linear address."""
    return f"""
        mov r12, rcx
        {SAVE_FLAGS}
        shr r9d, 12
        mov r13, [r15+{at.TOUCHED_BY_SPACE}]
        cmp byte ptr [r13+r9], 0
        jne fail
        mov r13, [r15+{at.TOUCHED_BY_KERNEL}]
        cmp byte ptr [r13+r9], 0
        jne fail
        {tlb_stubs.drop()}
        mov r13, [r15+{at.WINDOW}]
        {RESTORE_FLAGS}
        jmp {{tail_return}}
    fail:
        {RESTORE_FLAGS}
        {to_simulator()}"""


@functools.cache
def assist_image() -> AssistImage:
    """All pieces; texts may name those before them, as {tail_return}."""
    return AssistImage(
        (
            ("tail_return", _tail_return()), ("tail_jump", _tail_jump()),
            ("fix", _fix(False)), ("fix_flags", _fix(True)),
            ("es", _load(ES)), ("ds", _load(DS)), ("fs", _load(FS)), ("gs", _load(GS)),
            ("sysenter", _sysenter()), ("sysexit", _sysexit()),
            ("iret", _iret()), ("invlpg", _invlpg()), ("int", _int()),
            ("tlb_read", tlb_stubs.miss(False)), ("tlb_write", tlb_stubs.miss(True)),
            *tlb_strings.pieces(),
        ),
        ("tail_return", "tail_jump"),
        "fix",
        "iret",
    )  # fmt: skip


ASSIST_NAMES = tuple(name for name, _ in assist_image().pieces)


def assist_slot(name: str) -> int:
    """Offset in the record of the address of an assist."""
    return at.ASSISTS + 8 * ASSIST_NAMES.index(name)

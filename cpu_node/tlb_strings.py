"""Assists for string instructions of code that uses the software TLB: MOVS, CMPS, STOS, LODS, SCAS.

Source: Intel SDM vol. 2, the instructions' pages and REP. Registers and rules: assist_stubs.py. One assist
for each operation and size; r9d is the repeat prefix or 0, r10 the host address behind the instruction, whose
host code is LENGTH bytes long. Elements are done by the host's own instruction, a page at a time; a miss goes
to tlb_stubs.py with the registers as the elements done so far leave them, and comes back to the instruction.
Left out: sources in FS or GS and 16-bit addresses (the simulator), several elements at a time with DF set.
"""

from __future__ import annotations

from typing import NamedTuple

from cpu_node import layout as at
from cpu_node.assist_text import RESTORE_FLAGS, SAVE_FLAGS
from cpu_node.tlb_stubs import WRITES

LENGTH = 20  # mov r9d, prefix; lea r10, [rip+7]; jmp [r15+slot]
SUFFIXES = {1: "b", 2: "w", 4: "d"}


class Operation(NamedTuple):
    """`opcode`: for bytes. `source` at ESI, `target` at EDI, which it `writes`."""

    opcode: int
    source: bool
    target: bool
    writes: bool


OPERATIONS = {
    "movs": Operation(0xA4, True, True, True),
    "cmps": Operation(0xA6, True, True, False),
    "stos": Operation(0xAA, False, True, True),
    "lods": Operation(0xAC, True, False, False),
    "scas": Operation(0xAE, False, True, False),
}
_DF, _BACKWARDS = 0x400, 0x10000
_ZF_IN_AH = 0x40
_REPNE, _REPE = 0xF2, 0xF3


def operation_of(opcode: int) -> str | None:
    """Its name; None for INS and OUTS, which have none here."""
    return next((name for name, row in OPERATIONS.items() if row.opcode == opcode & ~1), None)


def pieces() -> list[tuple[str, str]]:
    """(name, text) of each assist."""
    return [(name(operation, size), text(operation, size)) for operation in OPERATIONS for size in SUFFIXES]


def name(operation: str, size: int) -> str:
    """Of an assist, as assist_slot takes it; `size` in bytes."""
    return f"tlb_{operation}{SUFFIXES[size]}"


def _look_up(pointer: str, table: int, entry: str, size: int, miss: str) -> str:
    """The entry for an operand; ECX is cut to the elements that its page holds."""
    return f"""
        mov r11d, {pointer}
        shr r11d, 12
        mov {entry}, [r14+r11*8+{table}]
        test {entry}, {entry}
        jz {miss}
        mov r11d, {pointer}
        and r11d, 0xfff
        sub r11d, 0x1000
        neg r11d
        shr r11d, {size.bit_length() - 1}
        cmp ecx, r11d
        cmova ecx, r11d"""


def _crossing(pointer: str, table: int, entry: str, size: int, miss: str) -> str:
    """Does an element that reaches into another page lie in one piece of host memory?"""
    return f"""
        lea r11d, [{"rsi" if pointer == "esi" else "rdi"}+{size - 1}]
        shr r11d, 12
        cmp [r14+r11*8+{table}], {entry}
        jne {miss}"""


def _miss(label: str, pointer: str, size: int, stub: str) -> str:
    return f"""
    {label}:
        mov r8d, {pointer}
        mov r9d, {size - 1}
        lea r10, [r10-{LENGTH}]
        mov rcx, r12
        {RESTORE_FLAGS}
        jmp {{{stub}}}"""


def _no_target(operands: list[tuple[str, int, str, int, str]], size: int, stub: str) -> str:
    """The target's miss; a source that reaches into a page that can't be read faults before it."""
    source_first = size > 1 and len(operands) > 1
    return f"""
    no_target:
        {_crossing(*operands[0]) if source_first else ""}
        {_miss("target_only", "edi", size, stub)}"""


def text(operation: str, size: int) -> str:
    """Of one assist."""
    opcode, source, target, writes = OPERATIONS[operation]
    compares = operation in ("cmps", "scas")
    table = WRITES if writes else 0
    op = f".byte {'0x66, ' if size == 2 else ''}{opcode + (size > 1):#x}"
    operands = [("esi", 0, "r8", size, "no_source")] if source else []
    operands += [("edi", table, "r13", size, "no_target")] if target else []
    there = ("lea rsi, [rsi+r8-1]\n" if source else "") + ("lea rdi, [rdi+r13-1]\n" if target else "")
    back = ("sub rsi, r8\ninc rsi\nmov esi, esi\n" if source else "") + (
        "sub rdi, r13\ninc rdi\nmov edi, edi\n" if target else "")
    if compares:
        repeated = f"""
            cmp r9b, {_REPNE:#x}
            je unequal
            .byte {_REPE:#x}
            {op}
            jmp compared
        unequal:
            .byte {_REPNE:#x}
            {op}
        compared:
            lea r12d, [r12+rcx]
            {SAVE_FLAGS}
            {back}
            mov r11d, dword ptr [r15+{at.SAVED_FLAGS}]
            and r11d, {_ZF_IN_AH << 8}
            shr r11d, 14
            mov ecx, r9d
            and ecx, 1
            cmp ecx, r11d
            jne done
            jmp next"""
        once = f"""
            {op}
            {SAVE_FLAGS}
            {back}
            jmp done"""
    else:
        repeated = f"""
            .byte {_REPE:#x}
            {op}
            {back}
            jmp next"""
        once = f"""
            {op}
            {back}
            jmp done"""
    crossing = "" if size == 1 else "crossing:" + "".join(_crossing(*o) for o in operands) + """
        mov ecx, 1
        jmp run"""
    return f"""
        mov r12, rcx
        {SAVE_FLAGS}
        mov r11, rsp
        mov rsp, [r15+{at.HOST_RSP}]
        pushfq
        pop r8
        mov rsp, r11
        and r8d, {_DF}
        shl r8d, 6
        or r9d, r8d
        movabs r14, {at.TLB_READ:#x}
    next:
        cmp dword ptr [r15+{at.KICK}], 0
        jne kicked
        mov ecx, 1
        test r9b, r9b
        jz counted
        test r12d, r12d
        jz done
        test r9d, {_BACKWARDS}
        jnz counted
        mov ecx, r12d
    counted:
        {"".join(_look_up(*o) for o in operands)}
        {"" if size == 1 else "test ecx, ecx" + chr(10) + "jz crossing"}
    run:
        {there}
        test r9b, r9b
        jz once
        sub r12d, ecx
        {repeated}
    once:
        {once}
    {crossing}
    kicked:
        lea r10, [r10-{LENGTH}]
    done:
        {RESTORE_FLAGS}
        mov r13, [r15+{at.WINDOW}]
        mov r14, [r15+{at.TABLE}]
        jmp {{tail_return}}
    {_miss("no_source", "esi", size, "tlb_read") if source else ""}
    {_no_target(operands, size, "tlb_write" if writes else "tlb_read") if target else ""}"""

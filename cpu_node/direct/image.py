"""The program that a child starts as: one page of 64-bit code above 4 GiB, in an ELF file made at run time.

It ties its life to the node's, then waits to be taken over. What the node does with it afterwards goes
through two entries: GADGET, one system call from registers, and LIST_LOOP, system calls from a list
(entries of 64 bytes: number, six arguments, unused) that the node writes and the child can only read.
Sources: System V ABI, chapters 4 and 5 (ELF header, program header); Linux man-pages for the calls.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

from keystone import KS_ARCH_X86, KS_MODE_64, Ks

PAGE = 4096
TRAMPOLINE = 0x10_0000_0000  # far above what a 32-bit address with any offset reaches
LIST = TRAMPOLINE + 0x10000
LIST_SIZE = 0x4000
LIST_ENTRY = 64
LIST_CAPACITY = LIST_SIZE // LIST_ENTRY
USER_END = 0x7FFF_FFFF_F000

GADGET = TRAMPOLINE + 0x200
LIST_LOOP = TRAMPOLINE + 0x240  # r12: the list, r13: entries; ends in INT3, or UD2 where a call failed
START = TRAMPOLINE + 0x100

SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP, SYS_PRCTL, SYS_CLOSE_RANGE = 9, 10, 11, 157, 436
_SYS_PAUSE, _SYS_GETPPID, _SYS_EXIT_GROUP = 34, 110, 231
PR_SET_PDEATHSIG, PR_SET_NAME, SIGKILL = 1, 15, 9
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PT_GNU_STACK, _R, _W, _X = 1, 0x6474E551, 4, 2, 1


@functools.cache
def _assembler() -> Ks:
    return Ks(KS_ARCH_X86, KS_MODE_64)


def assemble(text: str, ha: int) -> bytes:
    """64-bit machine code of `text` at `ha`."""
    code, _ = _assembler().asm(text, ha)
    return bytes(code)


def _start(parent: int) -> str:
    return f"""
        mov eax, {SYS_PRCTL}
        mov edi, {PR_SET_PDEATHSIG}
        mov esi, {SIGKILL}
        syscall
        mov eax, {_SYS_GETPPID}
        syscall
        cmp eax, {parent}
        jne orphan
    again:
        mov eax, {_SYS_PAUSE}
        syscall
        jmp again
    orphan:
        mov eax, {_SYS_EXIT_GROUP}
        syscall
    """


_LIST_LOOP_TEXT = """
    next:
        test r13, r13
        jz done
        mov rax, [r12]
        mov rdi, [r12+8]
        mov rsi, [r12+16]
        mov rdx, [r12+24]
        mov r10, [r12+32]
        mov r8, [r12+40]
        mov r9, [r12+48]
        syscall
        cmp rax, -4095
        jae failed
        add r12, 64
        dec r13
        jmp next
    done:
        int3
    failed:
        ud2
"""


def ptrace_program(parent: int) -> bytes:
    """The file to execute; `parent` is the pid whose child it must be."""
    return elf(((START, _start(parent)), (GADGET, "syscall\nint3"), (LIST_LOOP, _LIST_LOOP_TEXT)))


def elf(pieces: Iterable[tuple[int, str]]) -> bytes:
    """A file of one page of code, entered at START. `pieces`: (address, text), in ascending order."""
    page = bytearray(b"\xcc" * PAGE)
    end = START
    for va, text in pieces:
        code = assemble(text, va)
        if va < end or va + len(code) > TRAMPOLINE + PAGE:
            raise AssertionError(f"code at {va:#x} overlaps what is before it, or leaves the page")
        end = va + len(code)
        page[va - TRAMPOLINE : end - TRAMPOLINE] = code
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = _ELF_HEADER.pack(ident, 2, 62, 1, START, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = _PROGRAM_HEADER.pack(_PT_LOAD, _R | _X, 0, TRAMPOLINE, TRAMPOLINE, PAGE, PAGE, PAGE)
    stack = _PROGRAM_HEADER.pack(_PT_GNU_STACK, _R | _W, 0, 0, 0, 0, 0, 16)
    start = header + load + stack
    page[: len(start)] = start
    return bytes(page)

"""What of the test process itself lies below 4 GiB, hidden while a case runs.

An interpreter that isn't position-independent (Debian's) is loaded at 400000h, with its heap somewhere behind
it: a case that strays there must fault as in an empty address space, and must not write there. So those
mappings lose all rights around each run: by the generated code, since no Python can run in between.
"""

from __future__ import annotations

import ctypes
import struct

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
SYS_MPROTECT = 10
FOUR_GIB = 1 << 32
ENTRY = "<3Q"  # address, length, rights
ADDR_NO_RANDOMIZE = 0x0040000  # personality(2): the heap directly behind the program, not in a case's pages


def fixed_addresses() -> None:
    """For the next program this process executes: no address is random."""
    libc = ctypes.CDLL(None)
    libc.personality(libc.personality(0xFFFFFFFF) | ADDR_NO_RANDOMIZE)


def protect_text(table: int, hide: bool) -> str:
    """Code that takes the rights of all ranges of the table away, or gives them back; uses no stack."""
    name = "hide" if hide else "show"
    rights = "xor edx, edx" if hide else "mov rdx, qword ptr [r14 + 24]"
    return f"""
        movabs r12, {table}
        mov r13d, dword ptr [r12]
    {name}_next:
        dec r13d
        js {name}_done
        lea r14, [r13 + r13*2]
        lea r14, [r12 + r14*8]
        mov rdi, qword ptr [r14 + 8]
        mov rsi, qword ptr [r14 + 16]
        {rights}
        mov eax, {SYS_MPROTECT}
        syscall
        jmp {name}_next
    {name}_done:
    """


class LowMemory:
    """The table's content: a count (8 bytes), then the ranges."""

    def __init__(self) -> None:
        self._fixed: list[tuple[int, int, int]] = []
        self._heap = 0
        with open("/proc/self/maps") as maps:
            for line in maps:
                words = line.split()
                start, end = (int(word, 16) for word in words[0].split("-"))
                if start >= FOUR_GIB:
                    continue
                if words[-1] == "[heap]":
                    self._heap = start
                    continue
                rights = zip(words[1], (PROT_READ, PROT_WRITE, PROT_EXEC), strict=False)
                self._fixed.append((start, end - start, sum(bit for letter, bit in rights if letter != "-")))
        self._break = ctypes.CDLL(None).sbrk
        self._break.restype = ctypes.c_size_t
        self._break.argtypes = [ctypes.c_long]

    def table(self) -> bytes:
        """As it is now: the heap grows."""
        ranges = list(self._fixed)
        if self._heap:
            ranges.append((self._heap, self._break(0) - self._heap, PROT_READ | PROT_WRITE))
        return struct.pack("<Q", len(ranges)) + b"".join(struct.pack(ENTRY, *each) for each in ranges)

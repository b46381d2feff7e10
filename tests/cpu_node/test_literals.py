"""Decimal numbers reach keystone as hexadecimal ones, and mean the same whatever was in memory before."""

from __future__ import annotations

import ctypes

import pytest
from keystone import KS_ARCH_X86, KS_MODE_32, Ks

from cpu_node.literals import hexadecimal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shr eax, 16", "shr eax, 0x10"),
        ("mov eax, [ebx+4*ecx-12]", "mov eax, [ebx+0x4*ecx-0xc]"),
        ("mov r8d, [r15+100]", "mov r8d, [r15+0x64]"),
        ("mov ax, 0x10; movaps xmm1, xmm12", "mov ax, 0x10; movaps xmm1, xmm12"),
        ('.ascii "tick 10\\" 16"', '.ascii "tick 10\\" 16"'),
        ("add al, '0'\nadd al, 10 # it's 16", "add al, '0'\nadd al, 0xa # it's 0x10"),
        ("jmp label_16\n.L12: jmp 1b", "jmp label_16\n.L12: jmp 1b"),
        ("x = 1193182/100", "x = 0x1234de/0x64"),
        ("mov eax, 017\nmov eax, 08\nmov eax, 0", "mov eax, 0xf\nmov eax, 08\nmov eax, 0"),
        ("mov eax, 10h\nmov eax, 101b", "mov eax, 10h\nmov eax, 101b"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert hexadecimal(text) == expected


def leave_in_memory(word: int) -> None:
    """Where the next objects are made: this word, again and again."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    for _ in range(3):
        pieces = []
        for size in range(16, 3000, 16):
            for _ in range(4):
                pieces.append(libc.malloc(size))
                ctypes.memmove(pieces[-1], word.to_bytes(4, "little") * (size // 4), size)
        for piece in pieces:
            libc.free(piece)


@pytest.mark.parametrize("word", [0, 10, 16])
def test_what_memory_held_changes_nothing(word: int) -> None:
    text = "shr eax, 16\nlea eax, [ebx+ecx*4+100]\n.byte 10, 0x10\n"
    for _ in range(20):
        leave_in_memory(word)
        code, _count = Ks(KS_ARCH_X86, KS_MODE_32).asm(hexadecimal(text), 0, True)
        assert code.hex() == "c1e8108d448b640a10"

"""Pieces of assembly that several subjects use."""

from __future__ import annotations

from tests.system import places as p
from tests.system.builder import Builder

SCRATCH = p.DATA + 0x700
POINTERS = p.CODE_COMMON + 0x1C00


def long(value: int) -> str:
    return f".long {value & 0xFFFFFFFF:#x}"


def far32(opcode: str, offset: int, selector: int) -> str:
    return f".byte {opcode}\n{long(offset)}\n.short {selector:#x}"


def far_pointer(b: Builder, offset: int, selector: int) -> int:
    """A far pointer in memory, to be read through CS: DS may be anything."""
    at = POINTERS + 8 * b.r.randrange(0x20)
    while b.get32(at) or b.get32(at + 4):
        at += 8
    b.put32(at, offset, selector)
    return at


def unlabelled(lines: list[str]) -> list[str]:
    """Only one of each text that has a label."""
    out: list[str] = []
    for line in lines:
        if ":" not in line or line not in out:
            out.append(line)
    return out

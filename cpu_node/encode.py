"""What templates are made of: leaf kinds, fixed pieces of host code, and encodings of guest operands.

Left out: anything that decides; see emit.py and emit_system.py.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec

from cpu_node import layout as at
from cpu_node.assembled import assemble
from cpu_node.decode import Insn

PLACEHOLDER = 0x12345678  # in text for with_va: the guest address of the instruction
(PLAIN, JCC, JMP, CALL, END, ICALL, FUNCTION, LOOP, SIMULATE, STOP) = range(10)
LONGEST_PATH = 8  # LOCK, 66, three opcode bytes, ModRM, SIB; more are heaped prefixes, not worth a node
PLAIN_POST: Final = 20  # PLAIN with host code after the copied bytes

# (kind, guest length, first byte copied or 0, host code before, host code after or function, host length)
Leaf = tuple[int, int, int, bytes, Any, int]
Function = Callable[[bytes, int, int], bytes]  # (page bytes, offset, va) -> host code

WINDOW = b"\x65\x67"  # GS, 32-bit address
STORE_R8 = WINDOW + b"\x44\x89\x44\x24\xfc"  # mov gs:[esp-4], r8d
STORE_IMM = WINDOW + b"\xc7\x44\x24\xfc"  # mov dword gs:[esp-4], imm32
PUSHED = b"\x8d\x64\x24\xfc"  # lea esp, [rsp-4]
POPPED = b"\x8d\x64\x24\x04"
LOAD_TOP = WINDOW + b"\x44\x8b\x04\x24"  # mov r8d, gs:[esp]
EBP_FROM_R8 = b"\x44\x89\xc5"  # mov ebp, r8d
JUMP_R8 = b"\x43\xff\x24\xc6"  # jmp [r14+r8*8]
MOV_R8 = b"\x41\xb8"  # mov r8d, imm32
EXIT_SIMULATE = bytes((0x41, 0xFF, 0x67, at.SIMULATE_SLOT))  # jmp [r15+slot]
EXIT_STALE = bytes((0x41, 0xFF, 0x67, at.STALE_SLOT))
EXIT_CHAIN = bytes((0x41, 0xFF, 0x67, at.CHAIN_SLOT))


def with_va(text: str) -> Function:
    """Host code for `text`, in which the placeholder becomes the guest address. Assembled when first used."""

    @functools.cache
    def parts() -> list[bytes]:
        return assemble(text, 0).split(struct.pack("<I", PLACEHOLDER))

    def code(page: bytes, offset: int, va: int) -> bytes:
        before, after = parts()
        return before + struct.pack("<I", va) + after

    return code


class Split(msgspec.Struct, frozen=True):
    """A Function: host code, the displacement, host code, the immediate. Offsets are from the instruction."""

    before: bytes
    disp_at: int
    disp_size: int
    middle: bytes
    imm_at: int
    imm_size: int

    def __call__(self, page: bytes, offset: int, va: int) -> bytes:
        disp, imm = offset + self.disp_at, offset + self.imm_at
        head = self.before + page[disp : disp + self.disp_size] + self.middle
        return head + page[imm : imm + self.imm_size]


def legacy(insn: Insn) -> bytes:
    """Prefixes the host instruction keeps: LOCK, the mandatory or repeat one, operand size."""
    row = insn.row
    keep_rep = insn.rep and (row.prefix == insn.rep or row.action == "string"
                             or (row.map == 0 and row.opcode == 0x90))
    return (b"\xf0" if insn.lock else b"") + (bytes((insn.rep,)) if keep_rep else b"") + (
        b"\x66" if insn.opsize16 else b"")


def opcode_bytes(insn: Insn) -> bytes:
    """Opcode in the host's encoding, without prefixes: 82, an alias of 80, doesn't exist in 64-bit mode."""
    row = insn.row
    opcode = 0x80 if row.map == 0 and row.opcode == 0x82 else row.opcode
    return (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes((opcode,))


def modrm_bytes(insn: Insn, reg: int) -> bytes:
    """ModRM and SIB for 64-bit mode, up to the displacement. mod 0 rm 5 would be RIP-relative there."""
    if insn.sib >= 0:
        return bytes((insn.modrm & 0xC7 | reg << 3, insn.sib))
    if insn.mod == 0 and insn.rm == 5:
        return bytes((reg << 3 | 4, 0x25))
    return bytes((insn.modrm & 0xC7 | reg << 3,))

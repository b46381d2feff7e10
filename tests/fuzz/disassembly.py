"""Host code as capstone's instructions, for the checks of what it may touch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import capstone


@functools.cache
def _disassembler() -> capstone.Cs:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    return engine


def instructions(code: bytes, ha: int) -> Iterator[capstone.CsInsn]:
    """Until the end, or the first bytes that are no instruction.  Register forms that capstone lacks are
    skipped: aliases of x87 instructions, and fences with another ModRM.rm than 0."""
    at_byte = 0
    while at_byte < len(code):
        for insn in _disassembler().disasm(code[at_byte:], ha + at_byte):
            yield insn
            at_byte = insn.address + insn.size - ha
        at_byte += code[at_byte : at_byte + 1] == b"\x66"
        rest = code[at_byte : at_byte + 3]
        if len(rest) > 1 and 0xD8 <= rest[0] <= 0xDF and rest[1] >= 0xC0:
            at_byte += 2
        elif len(rest) > 2 and rest[:2] == b"\x0f\xae" and rest[2] >= 0xE8:
            at_byte += 3
        else:
            return

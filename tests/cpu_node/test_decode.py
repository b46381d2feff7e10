"""The plain decoder against capstone: lengths over all forms of every row and over random bytes.

Where only one of the two knows an encoding it is in a list here, with the reason.
"""

from __future__ import annotations

from random import Random

import capstone
import pytest

from cpu_node.decode import MAX_LENGTH, TooLong, Truncated, Undefined, decode
from cpu_node.table import Row, all_rows

RANDOM_STRINGS = 40_000
BLOCK = MAX_LENGTH + 1  # bytes given for each instruction
MOD_REGISTER = 0xC0

# Rows that processors execute and capstone refuses, in all forms or in some.
CAPSTONE_REFUSES: dict[str, str] = {
    **dict.fromkeys(("8C", "8E"), "segment registers 6 and 7: the #UD is the simulator's"),
    **dict.fromkeys(("0F0D", "0F18", "0F1A", "0F1B", "0F1C", "0F1D", "0F1E"), "hint NOPs with any ModRM"),
    **dict.fromkeys(("NP.0FAE/5r", "NP.0FAE/6r", "NP.0FAE/7r"), "fences with any ModRM.rm"),
    **dict.fromkeys(("D9/3r", "DC/2r", "DC/3r", "DD/1r", "DE/2r", "DF/1r", "DF/2r", "DF/3r"), "x87 aliases"),
}


def _engine(code16: bool) -> capstone.Cs:
    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16 if code16 else capstone.CS_MODE_32)


def _disagreement(engine: capstone.Cs, code: bytes, code16: bool) -> str | None:
    """What is wrong with our length of the instruction, as one line; raises what decode raises."""
    insn = decode(code, code16=code16)
    expected = next((size for _, size, _, _ in engine.disasm_lite(code, 0, 1)), 0)
    if insn.length == expected:
        return None
    if expected == 0:
        if insn.row.key in CAPSTONE_REFUSES:
            return None
        if code16 and (insn.row.prefix or insn.row.map > 1):
            return None  # capstone has most of SSE for 32-bit code only
    return f"{insn.row.key} {insn.row.mnemonic}: {code.hex(' ')}: {insn.length}, capstone {expected}"


def _forms(row: Row, rng: Random) -> list[bytes]:
    """Every ModRM that the row allows with a random SIB, with and without prefixes that change sizes."""
    mandatory = bytes((row.prefix,)) if row.prefix else b""
    opcode = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes((row.opcode,))
    sizes = (b"", b"", b"\x67") if row.prefix == 0 else (b"", b"", b"\x66", b"\x67", b"\x66\x67")
    out = []
    for modrm in range(256) if row.has_modrm else (0,):
        if row.ext is not None and row.ext != modrm >> 3 & 7:
            continue
        if row.mod and (row.mod == "r") != (modrm >= MOD_REGISTER):
            continue
        if row.rm is not None and row.rm != modrm & 7:
            continue
        tail = (bytes((modrm,)) if row.has_modrm else b"") + rng.randbytes(BLOCK)
        out.append((rng.choice(sizes) + mandatory + opcode + tail)[:BLOCK])
    return out


@pytest.mark.parametrize("code16", [False, True])
def test_lengths_of_all_forms_equal_capstones(code16: bool) -> None:
    engine, rng = _engine(code16), Random(1)
    wrong = [_disagreement(engine, code, code16) for row in all_rows() for code in _forms(row, rng)]
    assert [w for w in wrong if w] == []


@pytest.mark.parametrize("code16", [False, True])
def test_lengths_of_random_bytes_equal_capstones(code16: bool) -> None:
    engine, rng = _engine(code16), Random(2)
    wrong = []
    for _ in range(RANDOM_STRINGS):
        try:
            wrong.append(_disagreement(engine, rng.randbytes(BLOCK), code16))
        except (Undefined, TooLong):
            continue
    assert [w for w in wrong if w] == []


def test_every_form_decodes_to_its_row() -> None:
    rng = Random(3)
    wrong = [row.key for row in all_rows() for code in _forms(row, rng) if decode(code).row is not row]
    assert wrong == []


def test_fifteen_bytes_are_an_instruction_and_sixteen_are_not() -> None:
    assert decode(b"\x66" * 14 + b"\x90").length == MAX_LENGTH
    with pytest.raises(TooLong):
        decode(b"\x66" * 15 + b"\x90")
    with pytest.raises(TooLong):
        decode(b"\x2e" * 10 + b"\xc7\x05" + bytes(8))


def test_a_cut_instruction_is_truncated_at_every_length() -> None:
    code = bytes.fromhex("f0 81 84 8b 78563412 efbeadde")  # lock add dword ptr [ebx+ecx*4+disp32], imm32
    assert decode(code).length == len(code)
    for length in range(len(code)):
        with pytest.raises(Truncated):
            decode(code[:length])


@pytest.mark.parametrize(
    "text",
    ["f0 90", "f0 01 c0", "f0 39 00", "0f ff", "c4 c0", "c5 c0", "62 c0", "8d c0", "0f c7 c8", "0f 0a"],
)
def test_undefined(text: str) -> None:
    with pytest.raises(Undefined):
        decode(bytes.fromhex(text) + bytes(BLOCK))

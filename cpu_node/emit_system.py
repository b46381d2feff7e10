"""Templates of system instructions that assists do (assist_stubs.py); what is not here the simulator does.

Left out: anything at CPL 3 but SYSENTER and INT n; loads of SS; operands through FS and GS; 16-bit operands
of POP and IRET; LDS and its kin.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from cpu_node import layout as at
from cpu_node.assist_stubs import INT_LENGTH, assist_slot
from cpu_node.decode import FS, GS, Insn
from cpu_node.descriptor import DS, ES
from cpu_node.encode import END, FUNCTION, MOV_R8, POPPED, WINDOW, Leaf, modrm_bytes

_LOADED = {ES: "es", DS: "ds", FS: "fs", GS: "gs"}
_POPPED = {"ES": "es", "DS": "ds", "FS": "fs", "GS": "gs"}
_CONTROL = {0: at.CR0, 2: at.CR2, 3: at.CR3, 4: at.CR4}
_LEA_R10 = b"\x4c\x8d\x15"  # lea r10, [rip+disp32]
_JUMP = b"\x41\xff\xa7"  # jmp [r15+disp32]


def _jump(name: str) -> bytes:
    return _JUMP + struct.pack("<i", assist_slot(name))


def _call(insn: Insn, before: bytes, name: str, after: bytes = b"") -> Leaf:
    """`before` and the instruction's displacement, the assist, `after`."""
    jump = _jump(name)
    behind = _LEA_R10 + struct.pack("<i", len(jump)) + jump + after
    d0, d1 = insn.disp_at, insn.disp_at + insn.disp_size

    def code(page: bytes, offset: int, va: int) -> bytes:
        return before + page[offset + d0 : offset + d1] + MOV_R8 + struct.pack("<I", va) + behind

    return (FUNCTION, insn.length, 0, b"", code, 0)


def _end(insn: Insn, name: str) -> Leaf:
    """The assist goes elsewhere."""
    jump = _jump(name)
    return (END, insn.length, 0, b"", lambda page, offset, va: MOV_R8 + struct.pack("<I", va) + jump, 0)


def _move_to_segment(insn: Insn) -> Leaf | None:
    name = _LOADED.get(insn.reg)
    if name is None or insn.addr16 or (insn.is_memory and insn.segment in (FS, GS)):
        return None
    if insn.is_memory:
        return _call(insn, WINDOW + b"\x44\x0f\xb7" + modrm_bytes(insn, 1), name)  # movzx r9d, word gs:[...]
    return _call(insn, bytes((0x44, 0x0F, 0xB7, 0xC8 | insn.rm)), name)  # movzx r9d, reg


def _pop_segment(insn: Insn) -> Leaf | None:
    name = _POPPED.get(insn.row.operands[0])
    if name is None or insn.opsize16:
        return None
    return _call(insn, WINDOW + b"\x44\x0f\xb7\x0c\x24", name, POPPED)  # movzx r9d, word gs:[esp]


def _invlpg(insn: Insn) -> Leaf | None:
    if insn.addr16 or insn.segment in (FS, GS):
        return None
    return _call(insn, b"\x44\x8d" + modrm_bytes(insn, 1), "invlpg")  # lea r9d, [...]


def _read_control(insn: Insn) -> Leaf | None:
    place = _CONTROL.get(insn.reg)
    if place is None:
        return None
    load = bytes((0x41, 0x8B, 0x87 | insn.rm << 3)) + struct.pack("<i", place)  # mov reg, [r15+disp32]
    return (FUNCTION, insn.length, 0, b"", lambda page, offset, va: load, 0)


def _int(insn: Insn) -> Leaf:
    jump, last = _jump("int"), insn.length - 1  # a template serves every vector

    def code(page: bytes, offset: int, va: int) -> bytes:
        vector = b"\x41\xb9" + struct.pack("<I", page[offset + last])  # mov r9d, vector
        return MOV_R8 + struct.pack("<I", va) + vector + jump

    return (END, insn.length, 0, b"", code, 0)


def _iret(insn: Insn) -> Leaf | None:
    return None if insn.opsize16 else _end(insn, "iret")


_KERNEL: dict[tuple[int, int], Callable[[Insn], Leaf | None]] = {
    (0, 0x8E): _move_to_segment, (0, 0x07): _pop_segment, (0, 0x1F): _pop_segment,
    (1, 0xA1): _pop_segment, (1, 0xA9): _pop_segment, (1, 0x20): _read_control, (0, 0xCF): _iret,
    (1, 0x35): lambda insn: _end(insn, "sysexit"),
}  # fmt: skip


def system_leaf(insn: Insn, user: bool) -> Leaf | None:
    """The template of a row that the table leaves to the simulator; None: the simulator it is."""
    row = insn.row
    if insn.lock:
        return None
    if row.mnemonic == "sysenter":
        return _end(insn, "sysenter")
    if user:
        return _int(insn) if row.mnemonic == "int" and insn.length == INT_LENGTH else None
    if row.mnemonic == "invlpg":
        return _invlpg(insn)
    shape = _KERNEL.get((row.map, row.opcode))
    return shape(insn) if shape else None

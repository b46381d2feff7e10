"""Plain decoder of one 32-bit or 16-bit instruction, from the table's rows.

Source: Intel SDM vol. 2, chapter 2 (instruction format). This is the slow, readable decoder: the
translator calls it once per template (emit.py), the simulator once per instruction it executes.
Left out: nothing of 32-bit mode; what the table has no row for raises Undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_node.table import Row, rows_of

MAX_LENGTH = 15
ES, CS, SS, DS, FS, GS = range(6)
_SEGMENT_PREFIX = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
# (base, index) by ModRM.rm of 16-bit addresses [table 2-1]
_BASE16 = ((3, 6), (3, 7), (5, 6), (5, 7), (None, 6), (None, 7), (5, None), (3, None))


class Undefined(Exception):
    """No such instruction: #UD."""


class TooLong(Exception):
    """More than 15 bytes: #GP(0)."""


class Truncated(Exception):
    """The bytes given end inside the instruction."""


@dataclass(slots=True)
class Insn:
    """One decoded instruction. Offsets are in bytes from its start."""

    row: Row
    length: int
    opsize16: bool
    addr16: bool
    rep: int  # 0, 0xF2, 0xF3
    lock: bool
    segment: int | None  # override prefix
    modrm: int = -1
    base: int | None = None
    index: int | None = None
    scale: int = 0  # shift count
    sib: int = -1
    disp: int = 0  # signed
    disp_at: int = 0
    disp_size: int = 0
    imm: int = 0  # unsigned, as encoded; Ibs sign-extended to the operand size
    imm_at: int = 0
    imm_size: int = 0
    imm2: int = 0  # second immediate (ENTER) or selector (far pointer)
    path: int = 0  # bytes up to and including the last of prefixes, opcode, ModRM, SIB

    @property
    def mod(self) -> int:
        return self.modrm >> 6

    @property
    def reg(self) -> int:
        return self.modrm >> 3 & 7

    @property
    def rm(self) -> int:
        return self.modrm & 7

    @property
    def is_memory(self) -> bool:
        """ModRM names a memory operand (or LEA's address)."""
        return 0 <= self.modrm < 0xC0

    @property
    def default_segment(self) -> int:
        """Segment of the ModRM operand."""
        if self.segment is not None:
            return self.segment
        return SS if self.base in (4, 5) else DS

    @property
    def opsize(self) -> int:
        return 2 if self.opsize16 else 4


def _match(mapno: int, opcode: int, selector: int, modrm: int) -> Row | None:
    """The row for an opcode; modrm -1 where there is no more byte."""
    found = None
    for row in rows_of(mapno, opcode):
        if row.prefix is not None and row.prefix != selector:
            continue
        if row.ext is not None and row.ext != modrm >> 3 & 7:
            continue
        if row.mod and (row.mod == "r") != (modrm >= 0xC0):
            continue
        if row.rm is not None and row.rm != modrm & 7:
            continue
        if found is None or (found.prefix is None and row.prefix is not None):
            found = row
    return found


def decode(code: bytes, at: int = 0, code16: bool = False) -> Insn:
    """Decode the instruction at code[at:].

    Raises Undefined, TooLong, or Truncated when `code` ends too early.
    """
    try:
        return _decode(code, at, code16)
    except IndexError:
        if len(code) - at >= MAX_LENGTH:
            raise TooLong from None
        raise Truncated from None


def _decode(code: bytes, at: int, code16: bool) -> Insn:
    i = at
    opsize16 = addr16 = code16
    rep = 0
    lock = has66 = False
    segment = None
    while True:
        byte = code[i]
        if byte == 0x66:
            opsize16, has66 = not code16, True
        elif byte in (0xF2, 0xF3):
            rep = byte
        elif byte in _SEGMENT_PREFIX:
            segment = _SEGMENT_PREFIX[byte]
        elif byte == 0xF0:
            lock = True
        elif byte == 0x67:
            addr16 = not code16
        else:
            break
        i += 1
        if i - at >= MAX_LENGTH:
            raise TooLong
    mapno, opcode = 0, byte
    i += 1
    if opcode == 0x0F:
        mapno, opcode = 1, code[i]
        i += 1
        if opcode in (0x38, 0x3A):
            mapno, opcode = (2 if opcode == 0x38 else 3), code[i]
            i += 1
    rows = rows_of(mapno, opcode)
    if not rows:
        raise Undefined
    modrm = code[i] if rows[0].has_modrm or opcode in (0x62, 0xC4, 0xC5) else -1
    if mapno == 1 and 0x20 <= opcode <= 0x23:
        modrm |= 0xC0  # MOV CR/DR: mod is ignored [MOV - Move to/from Control Registers]
    row = _match(mapno, opcode, rep or (0x66 if has66 else 0), modrm)
    if row is None:
        raise Undefined
    insn = Insn(row, 0, opsize16, addr16, rep, lock, segment)
    if row.has_modrm:
        insn.modrm = modrm
        i = _operand(code, i + 1, insn)
    insn.path = i - at
    if insn.disp_size:
        insn.disp_at = i - at
        insn.disp = int.from_bytes(_take(code, i, insn.disp_size), "little", signed=True)
        i += insn.disp_size
    i = _immediates(code, i, at, insn)
    insn.length = i - at
    if insn.length > MAX_LENGTH:
        raise TooLong
    if lock and not (row.lockable and insn.is_memory):
        raise Undefined
    return insn


def _operand(code: bytes, i: int, insn: Insn) -> int:
    """Reads SIB, sets base, index and the displacement's size."""
    mod, rm = insn.mod, insn.rm
    if mod == 3:
        return i
    if insn.addr16:
        insn.base, insn.index = _BASE16[rm]
        insn.disp_size = (0, 1, 2)[mod]
        if mod == 0 and rm == 6:
            insn.base, insn.disp_size = None, 2
        return i
    insn.disp_size = (0, 1, 4)[mod]
    if rm == 4:
        sib = insn.sib = code[i]
        i += 1
        insn.scale, index, rm = sib >> 6, sib >> 3 & 7, sib & 7
        insn.index = None if index == 4 else index
    insn.base = rm
    if rm == 5 and mod == 0:
        insn.base, insn.disp_size = None, 4
    return i


def _immediates(code: bytes, i: int, at: int, insn: Insn) -> int:
    for operand in insn.row.operands:
        kind = operand[0]
        if kind not in "IJOA" or operand in ("AL", "AX"):
            continue
        if kind == "A":  # far pointer: offset, selector
            size = insn.opsize
            insn.imm_at, insn.imm_size = i - at, size
            insn.imm = int.from_bytes(_take(code, i, size), "little")
            insn.imm2 = int.from_bytes(_take(code, i + size, 2), "little")
            return i + size + 2
        if kind == "O":
            size = 2 if insn.addr16 else 4
            insn.disp_at, insn.disp_size = i - at, size
            insn.disp = int.from_bytes(_take(code, i, size), "little")
            i += size
            continue
        size = 1 if operand[1] == "b" else 2 if operand[1] == "w" else insn.opsize
        value = int.from_bytes(_take(code, i, size), "little", signed=kind == "J" or operand == "Ibs")
        if insn.imm_size:
            insn.imm2 = value
        else:
            insn.imm_at, insn.imm_size, insn.imm = i - at, size, value
        i += size
    return i


def _take(code: bytes, i: int, size: int) -> bytes:
    piece = code[i : i + size]
    if len(piece) < size:
        raise IndexError
    return piece

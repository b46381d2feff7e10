"""The pieces of one random instance of a table row, before they are put together.

Source: Intel SDM volume 2, chapter 2 (instruction format); the operand notation is the table's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from cpu_node.table import Row
from tests.insn.draft import BYTE_REGISTERS, MASK, Draft
from tests.insn.segments import CS, DS, ES, FS, GS, SS, inside
from tests.insn.state import EAX, ECX, EDX
from tests.insn.values import chance, double, extended, fpu_state, integer, mxcsr, single, vector, x87_control

PREFIX_66, PREFIX_67, LOCK, REPNE, REP = 0x66, 0x67, 0xF0, 0xF2, 0xF3
SEGMENT_PREFIXES = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)  # ES, CS, SS, DS, FS, GS
HARMLESS_SEGMENTS = (ES, SS, DS)  # flat and writable in most cases
SIZED = frozenset("vzap") | {"bs", "env", "sav"}  # operand suffixes that 66h changes
SIZED_ACTIONS = frozenset(
    (
        "push",
        "pop",
        "popm",
        "pushm",
        "pushimm",
        "pusha",
        "popa",
        "pushf",
        "popf",
        "pushseg",
        "leave",
        "ret",
        "string",
    )
)
WIDE_MNEMONICS = frozenset(("cwde", "cdq", "enter"))
# With F3h these are other instructions on a host newer than the guest: TZCNT, LZCNT, WBNOINVD and so on.
HOST_READS_REP = frozenset((0xBC, 0xBD, 0x09, 0x1E, 0x1A, 0x1B, 0xC7, 0xAE))
# With 16-bit addresses they would fault, and processors differ in whether the MMX state is entered then.
MASKED_MOVES = frozenset(("maskmovq", "maskmovdqu"))
REP_CHANGES_CONDITION = frozenset(("loope", "loopne"))  # on AMD
BRANCHES_SIZED_BY_66 = frozenset(("jcc", "jmp", "call", "icall", "ijmp", "loop", "ret"))
FULL_ALIGNMENT = frozenset(
    ("movaps", "movapd", "movdqa", "movntps", "movntpd", "movntdq", "movntdqa", "fxsave", "fxrstor")
)


class Instance:
    """The pieces of one instruction while it is put together."""

    def __init__(self, row: Row, draft: Draft) -> None:
        self.row, self.draft, self.rng = row, draft, draft.rng
        self.undefined = row.undefined
        self.rep = 0
        self.size16 = row.prefix != PREFIX_66 and chance(self.rng, self._percent_66())
        self.addr16 = chance(self.rng, 75 if draft.addr16 else 2.5) and row.mnemonic not in MASKED_MOVES
        self.memory = row.mod == "m" or (row.mod != "r" and row.rm is None and self._may_be_memory())
        self.reg_field = self.rng.randrange(8) if row.ext is None else row.ext
        self.rm_field = self.rng.randrange(8) if row.rm is None else row.rm
        self.immediates = b""
        self.va: int | None = None
        self.form16: tuple[int, int, bytes] | None = None  # mod, rm, displacement
        self.override = self._choose_override()
        self.esp_offset = 0
        self.touched: list[int] = []  # registers that may change
        self.late: list[tuple[int, bytes]] = []  # contents to put in place after the operand's
        self.after: list[Callable[[], None]] = []  # what else changes, run after the code is in the draft

    def _may_be_memory(self) -> bool:
        if not self.row.rm_operand or self.row.rm_operand[0] in "RUN":
            return False
        return self.row.key == "0F0D" or chance(self.rng, 60)  # 0F0D with a register is #UD on some hosts

    def _choose_override(self) -> int | None:
        """A segment prefix: FS and GS more often where they can be used."""
        kind = self.rng.random() * 100
        if self.draft.selectors[FS] and kind < 40:
            return self.rng.choice((FS, GS))
        if kind < 47:
            return self.rng.choice(HARMLESS_SEGMENTS)
        return CS if kind < 48 else GS if kind < 48.2 else None

    def _percent_66(self) -> float:
        row = self.row
        if row.action in BRANCHES_SIZED_BY_66:
            return 1
        if row.prefix == 0:
            return 0
        sized = any(o[1:] in SIZED and o[0] not in "A" for o in row.operands) or "eAX" in row.operands
        return 22 if sized or row.action in SIZED_ACTIONS or row.mnemonic in WIDE_MNEMONICS else 2

    @property
    def width(self) -> int:
        return self.row.memory_width(self.size16) if self.row.rm_operand else 0

    @property
    def operand_size(self) -> int:
        return 2 if self.size16 else 4

    def is_byte(self) -> bool:
        return any(o in ("Eb", "Gb", "AL", "Zb", "Mb") for o in self.row.operands)

    # The operands

    def choose_address(self) -> None:
        """Settles where the memory operand is, before the registers of its form are."""
        if self.memory and self.addr16 and self.form16 is None:
            mod, rm, disp, self.va = self.draft.form16(max(self.width, 1), self.override)
            self.form16 = mod, rm, disp
        elif self.memory and not self.addr16 and self.va is None:
            aligned = (
                16
                if self.width >= 16 and (self.row.group == "sse" or self.row.mnemonic in FULL_ALIGNMENT)
                else 1
            )
            segment = DS if self.override is None else self.override
            offset = inside(self.draft.selectors[segment], self.rng, max(self.width, 1))
            if offset is None:
                self.va = self.draft.target(self.width, aligned)
            else:
                self.va = self.draft.base(segment) + offset & MASK & -aligned

    def modrm(self) -> bytes:
        if not self.row.has_modrm:
            return b""
        if not self.memory:
            return bytes((0xC0 | self.reg_field << 3 | self.rm_field,))
        if not self.addr16:
            assert self.va is not None
            return self.draft.modrm_memory(self.reg_field, self.va, self.esp_offset, self.override)
        mod, rm, disp = self.form16 or (0, 6, self.rng.randbytes(2))
        return bytes((mod << 6 | self.reg_field << 3 | rm,)) + disp

    def take_registers(self) -> None:
        """Gives the general registers among the operands values; they may change unless only read."""
        for operand in self.row.operands:
            kind, suffix = operand[0], operand[1:]
            if kind in "GERZ" and suffix:
                if kind == "G":
                    number = self.reg_field
                elif kind == "Z":
                    number = self.row.opcode & 7
                elif self.memory:
                    continue
                else:
                    number = self.rm_field
                self._take(number % BYTE_REGISTERS if suffix == "b" else number)
            elif operand in ("AL", "eAX", "AX"):
                self._take(EAX)
            elif operand == "CL":
                self.draft.choose(ECX)
            elif operand == "DX":
                self.draft.choose(EDX)
        if "eAX" in self.row.operands and self.row.action == "copy" and self.row.mnemonic == "xchg":
            self._take(self.row.opcode & 7)

    def _take(self, reg: int) -> None:
        self.draft.choose(reg)
        self.touched.append(reg)

    def take_immediates(self) -> None:
        out = b""
        for operand in self.row.operands:
            if operand[0] != "I":
                continue
            if operand in ("Ib", "Ibs"):
                out += bytes((integer(self.rng, 8),))
            elif operand == "Iw":
                out += integer(self.rng, 16).to_bytes(2, "little")
            else:
                out += integer(self.rng, 8 * self.operand_size).to_bytes(self.operand_size, "little")
        self.immediates = out or self.immediates

    def fill_memory(self) -> None:
        """Operand contents that fit the operation; variations of the case get others."""
        va = self.va
        if va is None or self.row.access not in "rm" or self.row.access == "-":
            return
        if not chance(self.rng, 20):
            self.draft.poke(va, self._contents())

        def again(rng: Random) -> list[tuple[int, bytes]]:
            self.rng = rng
            return [(va, self._contents())]

        self.draft.contents.append(again)

    def _contents(self) -> bytes:
        row, rng, width = self.row, self.rng, self.width
        special = SPECIAL_CONTENTS.get(row.mnemonic)
        if special is not None:
            return special(self)
        if row.mnemonic == "fbld":
            digits = bytes(rng.randrange(10) | rng.randrange(10) << 4 for _ in range(9))
            return digits + rng.choice((b"\0", b"\x80"))
        if row.group == "x87" and row.operands and row.mnemonic[1] != "i":
            make: dict[int, Callable[[], bytes]] = {4: lambda: single(rng), 8: lambda: double(rng)}
            return make.get(width, lambda: extended(rng))() if width in (4, 8, 10) else b""
        if row.group == "sse":
            if width < 8 or rng.getrandbits(1):
                return vector(rng)[:width]
            return (double(rng) + vector(rng)[:8])[:width]
        return integer(rng, 8 * width).to_bytes(width, "little") if 0 < width <= 8 else b""

    # The encoding

    def prefixes(self) -> bytes:
        row, rng = self.row, self.rng
        out = []
        if row.prefix:
            out.append(row.prefix)
        if self.size16:
            out.append(PREFIX_66)
        if self.addr16:
            out.append(PREFIX_67)
        if self.rep:
            out.append(self.rep)
        elif self._may_have_redundant_rep() and chance(rng, 1.5):
            out.append(rng.choice((REP, REPNE)))
        if self.memory and row.lockable and chance(rng, 25):
            out.append(LOCK)
        if self.override is not None:
            out.append(SEGMENT_PREFIXES[self.override])
        rng.shuffle(out)
        return bytes(out)

    def _may_have_redundant_rep(self) -> bool:
        row = self.row
        if row.prefix is not None or row.action == "string" or row.mnemonic in REP_CHANGES_CONDITION:
            return False
        return not (row.map == 1 and row.opcode in HOST_READS_REP)

    def opcode(self) -> bytes:
        return (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[self.row.map] + bytes((self.row.opcode,))


def _fx_contents(instance: Instance) -> bytes:
    data = bytearray(fpu_state(instance.rng, mmx=False))
    if chance(instance.rng, 6):  # reserved MXCSR bits: #GP
        data[24:28] = instance.rng.randbytes(4)
    return bytes(data)


def _environment(instance: Instance) -> bytes:
    rng = instance.rng
    image = fpu_state(rng, mmx=False)
    control, status = struct.unpack_from("<HH", image)
    tags = rng.getrandbits(16)
    if instance.size16:
        return struct.pack("<7H", control, status, tags, 0, 0, 0, 0)
    return struct.pack("<7I", control | 0xFFFF0000, status | 0xFFFF0000, tags | 0xFFFF0000, 0, 0, 0, 0)


def _x87_save(instance: Instance) -> bytes:
    return _environment(instance) + b"".join(extended(instance.rng) for _ in range(8))


def _bounds(instance: Instance) -> bytes:
    size = instance.operand_size
    value = instance.draft.settle(instance.reg_field) or 0
    bits = 8 * size
    low, high = value - instance.rng.randint(-1, 5), value + instance.rng.randint(-1, 5)
    return b"".join((v & ((1 << bits) - 1)).to_bytes(size, "little") for v in (low, high))


SPECIAL_CONTENTS: dict[str, Callable[[Instance], bytes]] = {
    "fxrstor": _fx_contents,
    "fldenv": _environment,
    "frstor": _x87_save,
    "fldcw": lambda i: x87_control(i.rng).to_bytes(2, "little"),
    "ldmxcsr": lambda i: (mxcsr(i.rng) if chance(i.rng, 92) else i.rng.getrandbits(32)).to_bytes(4, "little"),
    "bound": _bounds,
}

"""Templates: how one guest instruction becomes host instructions, kept in a trie of its leading bytes.

For flat 32-bit segments (see mode.py). A template's path is prefixes, opcode, ModRM and SIB; displacement
and immediate are copied from the guest. Rules every shape keeps:
- it is restartable: until its last host instruction only r8-r11 and restorable registers changed, or what
  is left is a jump (rollback.py relies on it);
- it leaves the status flags as the guest instruction does, so glue is lea, mov, movzx, jrcxz;
- it does not depend on where it lies: exits go through slots of the record.
Left out: 16-bit addresses, 16-bit pushes and jumps, FS/GS on string sources: the simulator does these.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.assembled import assemble
from cpu_node.decode import CS, FS, GS, Insn, TooLong, Undefined, decode
from cpu_node.emit_system import system_leaf
from cpu_node.encode import (
    CALL,
    EBP_FROM_R8,
    END,
    FUNCTION,
    ICALL,
    JCC,
    JMP,
    JUMP_R8,
    LOAD_TOP,
    LONGEST_PATH,
    LOOP,
    MOV_R8,
    PLACEHOLDER,
    PLAIN,
    PLAIN_POST,
    POPPED,
    PUSHED,
    SIMULATE,
    STOP,
    STORE_IMM,
    STORE_R8,
    WINDOW,
    Function,
    Leaf,
    Split,
    legacy,
    modrm_bytes,
    opcode_bytes,
    with_va,
)
from cpu_node.rdtsc import RDTSC, with_offset

LEA_RSI, LEA_RDI = b"\x4a\x8d\x34\x2e", b"\x4a\x8d\x3c\x2f"  # lea rsi, [rsi+r13]
CUT_ESI, CUT_EDI = b"\x89\xf6", b"\x89\xff"
SEGMENT_NUMBER = {"ES": 0, "CS": 1, "SS": 2, "DS": 3, "FS": 4, "GS": 5}
_USER_OTHER = 0x24_4100  # what POPF at CPL 3 may change of the system flags: TF NT AC ID


def popf(user: bool, load: str = "mov r9d, gs:[esp]") -> Function:
    """Host code of POPF; `load` gets the flags into r9d."""
    keep_if = "" if user else f"mov dword ptr [r15+{at.INTERRUPT_FLAG}], r8d"
    check_if = "" if user else f"""test r8d, r8d
        jz fine
        cmp dword ptr [r15+{at.PENDING}], 0
        jne simulate
    fine:"""
    code = with_va(f"""
        {load}
        mov r8d, r9d
        and r8d, 0x200
        mov r11d, r9d
        and r11d, {_USER_OTHER if user else at.OTHER_FLAGS}
        cmp r11d, dword ptr [r15+{at.SYSTEM_FLAGS}]
        jne simulate
        {check_if}
        and r9d, {at.STATUS_FLAGS}
        mov r10, rsp
        mov rsp, [r15+{at.HOST_RSP}]
        push r9
        popfq
        mov rsp, r10
        {keep_if}
        jmp done
    simulate:
        mov r8d, {PLACEHOLDER:#x}
        jmp qword ptr [r15+{at.SIMULATE_SLOT}]
    done:
        nop
    """)
    return lambda page, offset, va: code(page, offset, va)[:-1] + POPPED


@functools.cache
def pushf() -> bytes:
    return assemble(
        f"""
        mov r10, rsp
        mov rsp, [r15+{at.HOST_RSP}]
        pushfq
        pop r9
        mov rsp, r10
        mov r8d, [r15+{at.INTERRUPT_FLAG}]
        lea r8d, [r8+r9-0x200]
        mov r9d, [r15+{at.SYSTEM_FLAGS}]
        lea r8d, [r8+r9]
        """,
        0,
    )


_CLI = b"\x41\xc7\x47" + bytes((at.INTERRUPT_FLAG,)) + bytes(4)
_STI = with_va(f"""
    mov r9d, ecx
    mov ecx, [r15+{at.PENDING}]
    jrcxz fine
    mov ecx, r9d
    mov r8d, {PLACEHOLDER:#x}
    jmp qword ptr [r15+{at.SIMULATE_SLOT}]
fine:
    mov ecx, r9d
    mov dword ptr [r15+{at.INTERRUPT_FLAG}], 0x200
""")
_POPF_KERNEL, _POPF_USER = popf(False), popf(True)
_PUSHA = b"".join(WINDOW + bytes((0x89, 0x44 | r << 3, 0x24, 0x100 - 4 * (r + 1))) for r in range(8))
_POPA = b"".join(  # what is there for ESP is read, too: into r8d
    WINDOW + (b"\x44\x8b\x44\x24\x0c" if r == 4 else bytes((0x8B, 0x44 | r << 3, 0x24, 4 * (7 - r))))
    for r in range(7, -1, -1)
)


def sti_has_ecx_in_r9(delta: int) -> bool:
    """Is the guest's ECX in r9d, `delta` bytes into the host code of STI?"""
    return 3 <= delta <= len(_STI(b"", 0, 0)) - 11


class Templates:
    """The trie for one code mode (flat, 32-bit)."""

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.user = bool(mode & modes.USER)
        self.root: list[Any] = [None] * 256

    def lookup(self, page: bytes, offset: int) -> Leaf:
        """The template of the instruction at page[offset:]; enters it into the trie.

        Raises decode.Truncated when the bytes end inside the instruction.
        """
        try:
            insn = decode(page, offset)
        except (Undefined, TooLong):
            return (STOP, 1, 0, b"", None, 0)
        leaf = self.leaf(insn)
        if insn.path > LONGEST_PATH:
            return leaf
        node = self.root
        for i in range(offset, offset + insn.path - 1):
            below = node[page[i]]
            if below is None:
                below = node[page[i]] = [None] * 256
            elif below.__class__ is not list:
                return leaf
            node = below
        node[page[offset + insn.path - 1]] = leaf
        return leaf

    def leaf(self, insn: Insn) -> Leaf:
        """The template of a decoded instruction."""
        row = insn.row
        if row.group in ("x87", "mmx", "sse") and self.mode & modes.NO_FPU:
            return self._stop(insn)
        if row.group == "sse" and self.mode & modes.NO_SSE:
            return self._stop(insn)
        memory = insn.is_memory and row.rm_operand != ""
        if (memory or row.action in ("string", "xlat", "maskmov", "loop", "moffs")) and insn.addr16:
            return self._simulate(insn)
        if insn.segment == CS and (row.action == "maskmov" or (
                row.access in ("w", "m") and (memory or row.action == "moffs"))):
            return self._simulate(insn)  # #GP: no write through CS
        if row.action in ("sim", "stop"):
            system = system_leaf(insn, self.user)
            if system is not None:
                return system
        shape = getattr(self, "_" + row.action)
        leaf: Leaf = shape(insn)
        return leaf

    # ---- building blocks

    def _make(self, insn: Insn, before: bytes, after: bytes = b"", kind: int = PLAIN) -> Leaf:
        """before, the guest bytes behind the path, after."""
        n, skip = insn.length, insn.path
        if n == skip:
            before, after, skip = before + after, b"", 0
        length = len(before) + (n - skip if skip else 0) + len(after)
        if kind == PLAIN and after:
            kind = PLAIN_POST
        return (kind, n, skip, before, after, length)

    def _simulate(self, insn: Insn) -> Leaf:
        return (SIMULATE, insn.length, 0, b"", None, 0)

    def _stop(self, insn: Insn) -> Leaf:
        return (STOP, insn.length, 0, b"", None, 0)

    def _function(self, insn: Insn, function: Function) -> Leaf:
        return (FUNCTION, insn.length, 0, b"", function, 0)

    def _segmented(self, insn: Insn, operation: bytes) -> Leaf:
        """An operand through FS or GS: its linear address in r8d, then `operation` on gs:[r8]."""
        pointer = at.FS_POINTER if insn.segment == FS else at.GS_POINTER
        if insn.row.action == "moffs":
            before = MOV_R8
        else:
            before = b"\x44\x8d" + modrm_bytes(insn, 0)  # lea r8d, [...]
        middle = bytes((0x4D, 0x8B, 0x4F, pointer)) + b"\x45\x8b\x09\x47\x8d\x04\x08" + operation
        return self._function(insn, Split(before, insn.disp_at, insn.disp_size, middle,
                                          insn.imm_at, insn.imm_size))

    @staticmethod
    def is_segmented(insn: Insn) -> bool:
        return insn.segment in (FS, GS)

    def _load_r8(self, insn: Insn) -> bytes:
        """mov r8d, r/m32 up to the displacement (plain segments)."""
        if insn.is_memory:
            return WINDOW + b"\x44\x8b" + modrm_bytes(insn, 0)
        return bytes((0x41, 0x89, 0xC0 | insn.rm << 3))

    # ---- shapes, named as the table's actions

    def _copy(self, insn: Insn) -> Leaf:
        row = insn.row
        head, op = legacy(insn), opcode_bytes(insn)
        if insn.modrm < 0:
            return self._make(insn, head + op)
        if not insn.is_memory:
            return self._make(insn, head + op + bytes((insn.modrm,)))
        if self.is_segmented(insn):
            if "Gb" in row.operands and insn.reg >= 4:
                return self._simulate(insn)  # AH..BH can't be named with the REX prefix that r8 needs
            gs = WINDOW if row.action == "bitstring" else b"\x65"  # its bit may lie 256 MiB from r8
            return self._segmented(insn, gs + head + b"\x41" + op + bytes((insn.reg << 3,)))
        return self._make(insn, WINDOW + head + op + modrm_bytes(insn, insn.reg))

    _bitstring = _copy

    def _lea(self, insn: Insn) -> Leaf:
        return self._make(insn, legacy(insn) + b"\x8d" + modrm_bytes(insn, insn.reg))

    def _sim(self, insn: Insn) -> Leaf:
        return self._simulate(insn)

    def _hintnop(self, insn: Insn) -> Leaf:
        return (PLAIN, insn.length, 0, b"\x90", b"", 1)

    def _rdtsc(self, insn: Insn) -> Leaf:
        if self.mode & modes.TSC_SIMULATED:
            return self._simulate(insn)
        return self._make(insn, with_offset() if self.mode & modes.TSC_OFFSET else RDTSC)

    def _incdec(self, insn: Insn) -> Leaf:
        op = insn.row.opcode
        return self._make(insn, legacy(insn) + bytes((0xFF, (0xC0 if op < 0x48 else 0xC8) | op & 7)))

    def _push(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        store = bytes((0x89, 0x44 | (insn.row.opcode & 7) << 3, 0x24, 0xFC))
        return self._make(insn, WINDOW + store + PUSHED)

    def _pop(self, insn: Insn, reg: int | None = None) -> Leaf:
        reg = insn.row.opcode & 7 if reg is None else reg
        if insn.opsize16:
            return self._simulate(insn)
        if reg == 4:
            return self._make(insn, LOAD_TOP + b"\x44\x89\xc4")
        return self._make(insn, WINDOW + bytes((0x8B, 0x04 | reg << 3, 0x24)) + POPPED)

    def _pushimm(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        if insn.imm_size == 4:
            return self._make(insn, STORE_IMM, PUSHED)
        return self._function(insn, lambda page, o, va: STORE_IMM + struct.pack(
            "<i", (page[o + insn.imm_at] ^ 0x80) - 0x80) + PUSHED)

    def _pushm(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        if insn.is_memory and self.is_segmented(insn):
            return self._segmented(insn, b"\x65\x45\x8b\x00" + STORE_R8 + PUSHED)
        return self._make(insn, self._load_r8(insn), STORE_R8 + PUSHED)

    def _popm(self, insn: Insn) -> Leaf:
        if not insn.is_memory:
            return self._pop(insn, insn.rm)
        if insn.opsize16 or insn.base == 4 or self.is_segmented(insn):
            return self._simulate(insn)
        return self._make(insn, LOAD_TOP + WINDOW + b"\x44\x89" + modrm_bytes(insn, 0), POPPED)

    def _pushseg(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        slot = at.SELECTORS + 2 * SEGMENT_NUMBER[insn.row.operands[0]]
        return self._make(insn, bytes((0x45, 0x0F, 0xB7, 0x47, slot)) + STORE_R8 + PUSHED)

    def _movfromseg(self, insn: Insn) -> Leaf:
        if insn.reg > 5:
            return self._stop(insn)
        slot = at.SELECTORS + 2 * insn.reg
        if insn.is_memory:
            if self.is_segmented(insn):
                return self._simulate(insn)
            load = bytes((0x45, 0x0F, 0xB7, 0x47, slot))
            return self._make(insn, load + WINDOW + b"\x66\x44\x89" + modrm_bytes(insn, 0))
        if insn.opsize16:
            return self._make(insn, bytes((0x66, 0x41, 0x8B, 0x47 | insn.rm << 3, slot)))
        return self._make(insn, bytes((0x41, 0x0F, 0xB7, 0x47 | insn.rm << 3, slot)))

    def _pusha(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if insn.opsize16 else self._make(insn, _PUSHA + b"\x8d\x64\x24\xe0")

    def _popa(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if insn.opsize16 else self._make(insn, _POPA + b"\x8d\x64\x24\x20")

    def _pushf(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if insn.opsize16 else self._make(insn, pushf() + STORE_R8 + PUSHED)

    def _popf(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        return self._function(insn, _POPF_USER if self.user else _POPF_KERNEL)

    def _cli(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if self.user else self._make(insn, _CLI)

    def _sti(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if self.user else self._function(insn, _STI)

    def _leave(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        return self._make(insn, WINDOW + b"\x44\x8b\x45\x00" + b"\x8d\x65\x04" + EBP_FROM_R8)

    def _moffs(self, insn: Insn) -> Leaf:
        op = bytes((insn.row.opcode + (0x8A - 0xA0 if insn.row.opcode < 0xA2 else 0x88 - 0xA2),))
        if self.is_segmented(insn):
            return self._segmented(insn, b"\x65" + legacy(insn) + b"\x41" + op + b"\x00")
        return self._make(insn, WINDOW + legacy(insn) + op + b"\x04\x25")

    def _string(self, insn: Insn) -> Leaf:
        op = insn.row.opcode
        source = op not in (0xAA, 0xAB, 0xAE, 0xAF)
        target = op not in (0xAC, 0xAD)
        if source and self.is_segmented(insn):
            return self._simulate(insn)
        before = (LEA_RSI if source else b"") + (LEA_RDI if target else b"")
        after = (CUT_ESI if source else b"") + (CUT_EDI if target else b"")
        return self._make(insn, before + legacy(insn) + bytes((op,)) + after)

    def _xlat(self, insn: Insn) -> Leaf:
        return self._simulate(insn) if self.is_segmented(insn) else self._make(insn, WINDOW + b"\xd7")

    def _maskmov(self, insn: Insn) -> Leaf:
        if self.is_segmented(insn):
            return self._simulate(insn)
        return self._make(insn, WINDOW + legacy(insn) + opcode_bytes(insn) + bytes((insn.modrm,)))

    # ---- control flow

    def _jcc(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        return (JCC, insn.length, insn.path, bytes((0x0F, 0x80 | insn.row.opcode & 15)), b"", 6)

    def _jmp(self, insn: Insn) -> Leaf:
        return self._stop(insn) if insn.opsize16 else (JMP, insn.length, insn.path, b"", b"", 0)

    def _call(self, insn: Insn) -> Leaf:
        return self._stop(insn) if insn.opsize16 else (CALL, insn.length, insn.path, STORE_IMM, PUSHED, 0)

    def _loop(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        return (LOOP, insn.length, insn.path, bytes((0x67, insn.row.opcode)) + b"\x02\xeb\x05\xe9", b"", 10)

    def _ret(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        if insn.imm_size:
            def with_count(page: bytes, o: int, va: int) -> bytes:
                count = 4 + page[o + insn.imm_at] + 256 * page[o + insn.imm_at + 1]
                return LOAD_TOP + b"\x8d\xa4\x24" + struct.pack("<I", count) + JUMP_R8

            return (END, insn.length, 0, b"", with_count, 0)
        return (END, insn.length, 0, LOAD_TOP + POPPED + JUMP_R8, None, 0)

    def _ijmp(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        if insn.is_memory and self.is_segmented(insn):
            return (END, *self._segmented(insn, b"\x65\x45\x8b\x00" + JUMP_R8)[1:])
        leaf = self._make(insn, self._load_r8(insn), JUMP_R8)
        return (END, leaf[1], leaf[2], leaf[3], leaf[4] or None, 0) if leaf[2] else (
            END, leaf[1], 0, leaf[3], None, 0)

    def _icall(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        if insn.is_memory and self.is_segmented(insn):
            return (ICALL, insn.length, 0, STORE_IMM, self._segmented(insn, b"\x65\x45\x8b\x00")[4], 0)
        return (ICALL, insn.length, insn.path if insn.length > insn.path else 0, self._load_r8(insn), None, 0)

"""Templates for mode.SOFT: user code that finds its data by the software TLB (tlb.py), not in a window.

Rules are those of emit.py; besides, r12 holds ECX from the first probe on until the instruction's own last
steps, and a probe that misses has its template begun anew: registers change behind the last probe only.
A probe looks up the pages of the first and of the last byte. It hits where both have the same entry: in one
page, or in two that are neighbours in host memory too. An address that wraps at 4 GiB never does.
Left out, for the simulator: string instructions with a source in FS or GS, MASKMOV, PUSHA (it faults at its
highest dword first), CH with a memory operand, bit strings with 16-bit operands, 16-bit addresses and stack
operations.
"""

from __future__ import annotations

import struct

import msgspec

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node import tlb_strings
from cpu_node.assist_stubs import assist_slot
from cpu_node.decode import FS, Insn
from cpu_node.emit import SEGMENT_NUMBER, Templates, popf, pushf
from cpu_node.encode import (
    CALL,
    EBP_FROM_R8,
    END,
    FUNCTION,
    ICALL,
    JUMP_R8,
    MOV_R8,
    POPPED,
    PUSHED,
    Function,
    Leaf,
    Split,
    legacy,
    modrm_bytes,
    opcode_bytes,
)

SAVE_ECX, RESTORE_ECX = b"\x49\x89\xcc", b"\x4c\x89\xe1"  # mov r12, rcx; mov rcx, r12
_BELOW_TOP, _TOP = b"\x44\x8d\x44\x24\xfc", b"\x44\x8d\x04\x24"  # lea r8d, [rsp-4]; lea r8d, [rsp]
_LOAD_R11, _STORE_R11 = b"\x47\x8b\x5c\x08\xff", b"\x47\x89\x5c\x08\xff"  # of [r8+r9-1]
_LOAD_R8 = b"\x47\x8b\x44\x08\xff"
_PLACE_IN_R9, _PLACE_IN_R11 = b"\x4f\x8d\x4c\x08\xff", b"\x4f\x8d\x5c\x08\xff"  # lea r9, [r8+r9-1]
_STORE_IMM = b"\x43\xc7\x44\x08\xff"  # mov dword [r8+r9-1], imm32
_STORE_IMM_AT_R9 = b"\x41\xc7\x01"
_HIGH_BYTE, _CH = 4, 5  # AH CH DH BH from here on, in operands of bytes
_FWAIT = b"\x9b"  # faults where an x87 exception is pending
_ALIGNED = (  # faults where r8d isn't a multiple of 16
    b"\x41\xba\x1c\x00\x00\x00" + b"\xc4\xc2\x29\xf7\xc8"  # mov r10d, 28; shlx ecx, r8d, r10d
    + b"\xe3\x05" + b"\x41\x0f\x28\x47\x01"  # jrcxz +5; movaps xmm0, [r15+1]
)
_READS, _WRITES = at.TLB_READ - at.TLB_BASE, at.TLB_WRITE - at.TLB_BASE


class SoftCode(Split, frozen=True):
    """With what rollback.py asks: host offsets in the template."""

    saved_from: int = 0  # from here on ECX is in r12
    done_at: int = -1  # here only the copy back from r12 is missing; -1: nowhere


class SoftFunction(msgspec.Struct, frozen=True):
    """A template that is more than the parts of a SoftCode."""

    function: Function
    saved_from: int
    done_at: int = -1

    def __call__(self, page: bytes, offset: int, va: int) -> bytes:
        return self.function(page, offset, va)


def templates_of(mode: int) -> Templates:
    """New templates for a code mode."""
    return SoftTemplates(mode) if mode & modes.SOFT else Templates(mode)


def probe(start: int, size: int, write: bool, save: bool = True, missed: bytes = b"") -> bytes:
    """Host code that looks up the access of `size` bytes at linear address r8d: they lie at r8+r9-1 then.

    start: host bytes between where a miss is to begin anew and this. save: ECX is not in r12 yet. Afterwards
    rcx is 0; r10 and r9 have changed. A miss does `missed` and goes to tlb_stubs.py.
    """
    entry = b"\x8c\xcd" + struct.pack("<i", _WRITES) if write else b"\x4c\xcd" + struct.pack("<b", _READS)
    out = SAVE_ECX if save else b""
    out += b"\xc4\x42\x13\xf7\xc8"  # shrx r9d, r8d, r13d
    load_r9 = b"\x4f\x8b" + entry  # mov r9, [r13+r9*8+...]
    if size == 1:
        out += load_r9 + b"\x41\x0f\xb6\xc9" + b"\x48\x8d\x49\xff"  # movzx ecx, r9b; lea rcx, [rcx-1]
    else:
        last = size - 1
        out += b"\x41\x8d" + (bytes((0x48, last)) if last < 0x80 else b"\x88" + struct.pack("<I", last))
        out += b"\xc4\xe2\x13\xf7\xc9"  # lea ecx, [r8+size-1]; shrx ecx, ecx, r13d
        out += load_r9 + b"\x49\x8b" + entry  # mov rcx, [r13+rcx*8+...]
        out += b"\x45\x0f\xb6\xd1" + b"\x48\xf7\xd1"  # movzx r10d, r9b; not rcx
        out += b"\x4a\x8d\x0c\x09" + b"\x4a\x8d\x0c\x11"  # lea rcx, [rcx+r9]; lea rcx, [rcx+r10]
    missed += b"\x41\xb9" + struct.pack("<I", size - 1)  # mov r9d, size-1
    jump = b"\x41\xff\xa7" + struct.pack("<i", assist_slot("tlb_write" if write else "tlb_read"))
    out += bytes((0xE3, len(missed) + 7 + len(jump))) + missed  # jrcxz ok
    out += b"\x4c\x8d\x15" + struct.pack("<i", -(start + len(out) + 7))  # lea r10, [rip-...]
    return out + jump


class _Code:
    """The parts of a template as they are put together; one displacement at most is copied in between."""

    def __init__(self) -> None:
        self.parts = [b""]
        self.copied = (0, 0)  # offset in the guest instruction, size
        self.saved_from = -1
        self.done_at = -1

    @property
    def length(self) -> int:
        return sum(map(len, self.parts)) + self.copied[1]

    def put(self, *pieces: bytes) -> _Code:
        self.parts[-1] += b"".join(pieces)
        return self

    def copy(self, offset: int, size: int) -> _Code:
        """Guest bytes go here."""
        assert len(self.parts) == 1
        self.parts.append(b"")
        self.copied = (offset, size)
        return self

    def address(self, insn: Insn) -> _Code:
        """The linear address of the memory operand in r8d."""
        if insn.row.action == "moffs":
            self.put(MOV_R8)
        else:
            self.put(b"\x44\x8d" + modrm_bytes(insn, 0))  # lea r8d, [...]
        self.copy(insn.disp_at, insn.disp_size)
        return self.segment(insn)

    def segment(self, insn: Insn) -> _Code:
        """Add the base of FS or GS to r8d; where that may not be used plainly, this faults at 0."""
        if Templates.is_segmented(insn):
            pointer = at.FS_POINTER if insn.segment == FS else at.GS_POINTER
            self.put(bytes((0x4D, 0x8B, 0x4F, pointer)), b"\x45\x8b\x09\x47\x8d\x04\x08")
        return self

    def probe(self, size: int, write: bool, restore: bool = True, missed: bytes = b"") -> _Code:
        """Where the access at r8d goes: r8+r9-1. restore: ECX is needed, or this is the last probe."""
        first = self.saved_from < 0
        start = self.length
        if first:
            self.saved_from = start + len(SAVE_ECX)
        return self.put(probe(start, size, write, first, missed), RESTORE_ECX if restore else b"")

    def top(self, write: bool) -> _Code:
        """The dword that is pushed to or popped from."""
        return self.put(_BELOW_TOP if write else _TOP).probe(4, write)

    def code(self, imm_at: int = 0, imm_size: int = 0) -> SoftCode:
        before, middle = (*self.parts, b"")[:2]
        return SoftCode(before, *self.copied, middle, imm_at, imm_size, self.saved_from, self.done_at)

    def leaf(self, insn: Insn, kind: int = FUNCTION, behind: bytes = b"") -> Leaf:
        return (kind, insn.length, 0, behind, self.code(), 0)


class SoftTemplates(Templates):
    """The trie for one code mode with SOFT."""

    def _copy(self, insn: Insn) -> Leaf:
        if not insn.is_memory:
            return super()._copy(insn)
        row, size = insn.row, insn.row.memory_width(insn.opsize16)
        if not size:
            return self._simulate(insn)
        head, op = legacy(insn), opcode_bytes(insn)
        missed = (_FWAIT if row.waits else b"") + (_ALIGNED if row.aligned else b"")  # what comes before #PF
        out = _Code().address(insn)
        if "Gb" in row.operands and insn.reg >= _HIGH_BYTE:  # can't be named with a REX prefix
            if insn.reg == _CH:
                return self._simulate(insn)
            out.probe(size, row.access in ("w", "m"), restore=False)
            out.put(b"\x4b\x8d\x4c\x08\xff", head, op, bytes((insn.reg << 3 | 1,)))  # lea rcx, [r8+r9-1]
            out.done_at = out.length
            out.put(RESTORE_ECX)
        else:
            out.probe(size, row.access in ("w", "m"), missed=missed)
            out.put(head, b"\x43", op, bytes((0x44 | insn.reg << 3, 0x08, 0xFF)))
        return (FUNCTION, insn.length, 0, b"", out.code(insn.imm_at, insn.imm_size), 0)

    def _bitstring(self, insn: Insn) -> Leaf:
        if not insn.is_memory:
            return super()._copy(insn)
        if insn.opsize16:
            return self._simulate(insn)
        out, reg = _Code().address(insn), insn.reg
        out.put(b"\x41\xba\x05\x00\x00\x00", b"\xc4\x62\x2a\xf7", bytes((0xC8 | reg,)))  # sarx r9d, reg, 5
        out.put(b"\x47\x8d\x04\x88").probe(4, insn.row.access == "m")  # lea r8d, [r8+r9*4]
        out.put(b"\x41\xba\x1b\x00\x00\x00", b"\xc4\x62\x29\xf7", bytes((0xD8 | reg,)))  # shlx r11d, reg, 27
        out.put(b"\xc4\x42\x2b\xf7\xdb")  # shrx r11d, r11d, r10d
        return out.put(legacy(insn), b"\x47", opcode_bytes(insn), b"\x5c\x08\xff").leaf(insn)

    # ---- the stack

    def _push(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        return self._push_register(insn, insn.row.opcode & 7)

    def _push_register(self, insn: Insn, reg: int) -> Leaf:
        store = bytes((0x43, 0x89, 0x44 | reg << 3, 0x08, 0xFF))
        return _Code().top(True).put(store, PUSHED).leaf(insn)

    def _pop(self, insn: Insn, reg: int | None = None) -> Leaf:
        reg = insn.row.opcode & 7 if reg is None else reg
        if insn.opsize16:
            return self._simulate(insn)
        load = bytes((0x43, 0x8B, 0x44 | reg << 3, 0x08, 0xFF))
        return _Code().top(False).put(load, b"" if reg == 4 else POPPED).leaf(insn)

    def _pushimm(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        out = _Code()
        if insn.imm_size == 4:
            return out.top(True).put(_STORE_IMM).copy(insn.imm_at, 4).put(PUSHED).leaf(insn)
        out.put(_BELOW_TOP).probe(4, True, restore=False)
        out.put(b"\x44\x8d\x59").copy(insn.imm_at, 1)  # lea r11d, [rcx+imm8]: rcx is 0
        return out.put(RESTORE_ECX, _STORE_R11, PUSHED).leaf(insn)

    def _pushm(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        if not insn.is_memory:
            return self._push_register(insn, insn.rm)
        out = _Code().address(insn).probe(4, False, restore=False).put(_LOAD_R11)
        return out.top(True).put(_STORE_R11, PUSHED).leaf(insn)

    def _popm(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        if not insn.is_memory:
            return self._pop(insn, insn.rm)
        out = _Code().top(False).put(_LOAD_R11).address(insn)
        if insn.base == 4:
            out.put(b"\x45\x8d\x40\x04")  # lea r8d, [r8+4]: ESP counts as it is afterwards [POP]
        return out.probe(4, True).put(_STORE_R11, POPPED).leaf(insn)

    def _pushseg(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        out = self._segment_in_r11(SEGMENT_NUMBER[insn.row.operands[0]])
        return out.top(True).put(_STORE_R11, PUSHED).leaf(insn)

    def _movfromseg(self, insn: Insn) -> Leaf:
        if insn.reg > 5 or not insn.is_memory:
            return super()._movfromseg(insn)
        out = self._segment_in_r11(insn.reg).address(insn).probe(2, True)
        return out.put(b"\x66", _STORE_R11).leaf(insn)

    @staticmethod
    def _segment_in_r11(number: int) -> _Code:
        return _Code().put(bytes((0x45, 0x0F, 0xB7, 0x5F, at.SELECTORS + 2 * number)))  # movzx r11d, word

    def _pusha(self, insn: Insn) -> Leaf:
        return self._simulate(insn)

    def _popa(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        out = _Code().put(_TOP).probe(32, False)
        out.put(*(bytes((0x43, 0x8B, 0x44 | r << 3, 0x08, 4 * (7 - r) + 0xFF & 0xFF))
                  for r in range(7, -1, -1) if r != 4))
        return out.put(b"\x8d\x64\x24\x20").leaf(insn)

    def _pushf(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        return _Code().top(True).put(_PLACE_IN_R11, pushf(), b"\x45\x89\x03", PUSHED).leaf(insn)

    def _popf(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        out = _Code().top(False).put(b"\x47\x8b\x4c\x08\xff")  # mov r9d, [r8+r9-1]
        before, rest = out.parts[0], _POPF
        function = SoftFunction(lambda page, o, va: before + rest(page, o, va), out.saved_from)
        return self._function(insn, function)

    def _leave(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._simulate(insn)
        out = _Code().put(b"\x44\x8d\x45\x00").probe(4, False)  # lea r8d, [rbp]
        return out.put(_LOAD_R8, b"\x8d\x65\x04", EBP_FROM_R8).leaf(insn)

    # ---- others with an operand of their own

    def _moffs(self, insn: Insn) -> Leaf:
        number = insn.row.opcode
        size = 1 if not number & 1 else insn.opsize
        out = _Code().address(insn).probe(size, number >= 0xA2)
        op = bytes((number + (0x8A - 0xA0 if number < 0xA2 else 0x88 - 0xA2),))
        return out.put(legacy(insn), b"\x43", op, b"\x44\x08\xff").leaf(insn)

    def _xlat(self, insn: Insn) -> Leaf:
        out = _Code().put(b"\x44\x0f\xb6\xc0", b"\x45\x8d\x04\x18")  # movzx r8d, al; lea r8d, [r8+rbx]
        return out.segment(insn).probe(1, False).put(b"\x43\x8a\x44\x08\xff").leaf(insn)

    def _string(self, insn: Insn) -> Leaf:
        operation = tlb_strings.operation_of(insn.row.opcode)
        if operation is None or (self.is_segmented(insn) and tlb_strings.OPERATIONS[operation].source):
            return self._simulate(insn)
        slot = assist_slot(tlb_strings.name(operation, insn.opsize if insn.row.opcode & 1 else 1))
        code = b"\x41\xb9" + struct.pack("<I", insn.rep)  # mov r9d, prefix
        code += b"\x4c\x8d\x15\x07\x00\x00\x00"  # lea r10, [rip+7]: behind the jump
        code += b"\x41\xff\xa7" + struct.pack("<i", slot)
        assert len(code) == tlb_strings.LENGTH
        return self._make(insn, code)

    def _maskmov(self, insn: Insn) -> Leaf:
        return self._simulate(insn)

    # ---- control flow

    def _call(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        out = _Code().top(True).put(_STORE_IMM)
        return (CALL, insn.length, insn.path, out.parts[0], out.code(), 0)

    def _ret(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        out = _Code().top(False).put(_LOAD_R8)
        if insn.imm_size:
            out.put(b"\x41\xba").copy(insn.imm_at, 2)  # mov r10d, imm16; lea esp, [rsp+r10+4]
            return out.put(b"\x00\x00", b"\x42\x8d\x64\x14\x04", JUMP_R8).leaf(insn, END)
        return out.put(POPPED, JUMP_R8).leaf(insn, END)

    def _ijmp(self, insn: Insn) -> Leaf:
        if insn.opsize16 or not insn.is_memory:
            return super()._ijmp(insn)
        return _Code().address(insn).probe(4, False).put(_LOAD_R8, JUMP_R8).leaf(insn, END)

    def _icall(self, insn: Insn) -> Leaf:
        if insn.opsize16:
            return self._stop(insn)
        if insn.is_memory:
            out = _Code().address(insn).probe(4, False, restore=False).put(_LOAD_R11)
            target = b"\x45\x89\xd8"  # mov r8d, r11d
        else:
            out = _Code()
            target = bytes((0x41, 0x89, 0xC0 | insn.rm << 3))  # mov r8d, reg
        return out.top(True).put(_PLACE_IN_R9, target).leaf(insn, ICALL, _STORE_IMM_AT_R9)


_POPF = popf(True, "")

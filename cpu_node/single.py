"""One guest instruction executed natively, its memory operand redirected to a scratch window.

For what cannot run in the guest's own window: operands in memory-mapped I/O, segments with a base or a
limit, 16-bit addresses, an operand that wraps at 4 GiB. The operand is read and written through the
simulator's memory, so its ALU semantics need no second implementation.
Left out: instructions with more than one memory operand (strings: handlers_string.py) or none of ModRM.
"""

from __future__ import annotations

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.cache import SINGLE
from cpu_node.cpu import CR4_OSXMMEXCPT, Cpu
from cpu_node.decode import SS, Insn
from cpu_node.encode import EXIT_SIMULATE, MOV_R8, WINDOW, legacy, opcode_bytes
from cpu_node.errors import DE, GP, MF, UD, XM, GuestFault
from cpu_node.errors import SS as SS_FAULT
from cpu_node.record_unsafe import Record

_HOST_TRAPS = {0: DE, 6: UD, 13: GP, 16: MF, 19: XM}  # host vector -> guest vector
_FX_WRITTEN = 288  # FXSAVE in 32-bit mode leaves the rest alone [vol. 2, FXSAVE]
_OPERAND = 0x400  # of the scratch page
_ES = 0x80  # in the x87 status word: an unmasked exception is pending


def guest_fault(trap: int, cpu: Cpu) -> GuestFault | None:
    """The guest's exception for a host trap in its code; None when no guest instruction can have caused it.

    Left out: CR0.NE = 0 (FERR# and IRQ 13); #MF comes whatever NE says.
    """
    vector = _HOST_TRAPS.get(trap)
    if vector is None:
        return None
    if vector == XM and not cpu.cr4 & CR4_OSXMMEXCPT:
        vector = UD  # [vol. 3 6.15, interrupt 19]
    return GuestFault(vector, 0 if vector == GP else None)


class HostTrap(AssertionError):
    """A host fault that no guest instruction can have caused."""


class Single:
    """Executes instructions one at a time for the simulator."""

    def __init__(self, record: Record, code: memoryview, cpu: Cpu) -> None:
        self.record = record
        self.code = code
        self.cpu = cpu
        host.map_anonymous(at.SCRATCH, 0x1000, host.PROT_READ | host.PROT_WRITE)
        self.scratch = host.view8(at.SCRATCH, 0x1000)

    def native(self, code: bytes) -> None:
        """Run host code that touches no guest memory. Raises GuestFault; status then is as before it."""
        record = self.record
        d, q = record.d, record.q
        tail = MOV_R8 + bytes(4) + EXIT_SIMULATE
        self.code[SINGLE : SINGLE + len(code) + len(tail)] = code + tail
        window = q[at.WINDOW // 8]
        q[at.WINDOW // 8] = at.SCRATCH
        try:
            while True:
                q[at.ENTRY // 8] = at.CODE + SINGLE
                record.enter()
                reason = d[at.REASON // 4]
                if reason == at.EXIT_SIMULATE:
                    return
                if reason == at.EXIT_UNENTERED:
                    continue
                rip = q[at.FAULT_RIP // 8]
                if reason == at.EXIT_SIGNAL:
                    if rip >= at.CODE + SINGLE + len(code):
                        return
                    continue
                fault = guest_fault(q[at.FAULT_TRAP // 8], self.cpu)
                if reason != at.EXIT_FAULT or fault is None:
                    raise HostTrap(f"host trap {q[at.FAULT_TRAP // 8]} at {rip:#x} in {code.hex()}")
                raise fault
        finally:
            q[at.WINDOW // 8] = window

    def linear(self, segment: int, offset: int, length: int, write: bool) -> int:
        """The linear address of an access, after the segment's checks [vol. 3 5.3, 5.5]."""
        seg = self.cpu.seg[segment]
        if not (seg.flat and seg.writable):
            vector = SS_FAULT if segment == SS else GP
            if not seg.usable:
                raise GuestFault(GP, 0)
            if self.cpu.protected and ((write and not seg.writable) or (not write and not
                                       (seg.readable or seg.writable))):
                raise GuestFault(vector, 0)
            if length and (offset < seg.lowest or offset + length - 1 > seg.highest) and not (
                    seg.flat and offset + length > 1 << 32):
                raise GuestFault(vector, 0)
        return seg.base + offset & 0xFFFFFFFF

    def offset(self, insn: Insn) -> int:
        """The effective address of the ModRM operand."""
        regs = self.cpu.regs
        ea = insn.disp
        if insn.base is not None:
            ea += regs[insn.base]
        if insn.index is not None:
            ea += regs[insn.index] << insn.scale
        return ea & (0xFFFF if insn.addr16 else 0xFFFFFFFF)

    def operand(self, insn: Insn, write: bool) -> int:
        """Linear address of the ModRM memory operand."""
        width = insn.row.memory_width(insn.opsize16)
        return self.linear(insn.default_segment, self.offset(insn), width, write)

    def execute(self, insn: Insn, text: bytes) -> None:
        """A plain instruction; `text` is its guest bytes."""
        head, op = legacy(insn), opcode_bytes(insn)
        if insn.row.action == "moffs":
            memory = insn.disp & 0xFFFFFFFF
            segment = 3 if insn.segment is None else insn.segment
            opcode = insn.row.opcode
            op = bytes((opcode + (0x8A - 0xA0 if opcode < 0xA2 else 0x88 - 0xA2),))
            width = 1 if not opcode & 1 else insn.opsize
            self._with_operand(insn, head + op, 0, segment, memory, width, b"")
            return
        immediate = text[insn.imm_at : insn.imm_at + insn.imm_size] if insn.imm_size else b""
        if insn.modrm < 0:
            if insn.row.action == "incdec":
                op = bytes((0xFF, (0xC0 if insn.row.opcode < 0x48 else 0xC8) | insn.row.opcode & 7))
            self.native(head + op + immediate)
            return
        if not insn.is_memory:
            self.native(head + op + bytes((insn.modrm,)) + immediate)
            return
        offset = self.offset(insn)
        if insn.row.action == "lea":
            regs = self.cpu.regs
            mask = 0xFFFF if insn.opsize16 else 0xFFFFFFFF
            regs[insn.reg] = regs[insn.reg] & ~mask & 0xFFFFFFFF | offset & mask
            return
        width = insn.row.memory_width(insn.opsize16)
        if width == 0:
            return
        if insn.row.access == "-":  # CLFLUSH: checked as a load
            self.cpu.memory.read8(self.linear(insn.default_segment, offset, width, False), self.cpu.cpl == 3)
            return
        keep = None
        if insn.row.action == "bitstring":
            regs = self.cpu.regs
            keep = regs[insn.reg]
            bits = 8 * insn.opsize
            value = keep & (1 << bits) - 1
            signed = value - (1 << bits) if value >> bits - 1 else value
            offset = offset + (signed >> (4 if bits == 16 else 5)) * insn.opsize
            offset &= 0xFFFF if insn.addr16 else 0xFFFFFFFF
            regs[insn.reg] = value & bits - 1
        try:
            self._with_operand(insn, head + op, insn.reg, insn.default_segment, offset, width, immediate)
        finally:
            if keep is not None:
                self.cpu.regs[insn.reg] = keep

    def _with_operand(self, insn: Insn, opcode: bytes, reg: int, segment: int, offset: int, width: int,
                      immediate: bytes) -> None:
        cpu, memory, scratch = self.cpu, self.cpu.memory, self.scratch
        user = cpu.cpl == 3
        access = insn.row.access
        if insn.row.waits and self.record.b[at.FX + 2] & _ES:
            raise GuestFault(MF)
        if insn.row.aligned and cpu.seg[segment].base + offset & 15:
            raise GuestFault(GP, 0)
        va = self.linear(segment, offset, width, access in "wm")
        if access in "wm":
            memory.probe_write(va, width, user)
        place = _OPERAND + (va & 15 if width >= 16 else 0)  # LOCK doesn't cross cache lines here
        if access in "rm" or insn.row.group == "x87":  # an unmasked exception suppresses an x87 store
            scratch[place : place + width] = memory.read(va, width, user)  # type: ignore[attr-defined]
        self.native(WINDOW + opcode + bytes((reg << 3 | 4, 0x25)) + place.to_bytes(4, "little") + immediate)
        if access in "wm":
            written = _FX_WRITTEN if width == 512 else width
            memory.write(va, bytes(scratch[place : place + written]), user)  # type: ignore[attr-defined]

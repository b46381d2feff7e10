"""The simulator: one guest instruction, of any kind and in any mode, as a function of the shadow state.

System instructions, segment loads, far transfers, I/O and whatever the translator leaves to it; also every
instruction where code runs interpreted (16-bit code, segments with base or limit, single steps over such).
Plain instructions go to single.py, which lets the host compute them. Handlers are found by the row's action
or, for `sim` and `stop`, by mnemonic (handlers_system.py) — after the decoder, with cpu.eip already behind
the instruction; a GuestFault puts it back.
Left out: nothing the table has a row for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpu_node import handlers_stack, handlers_string, handlers_system
from cpu_node.cpu import CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, Cpu
from cpu_node.decode import MAX_LENGTH, Insn, TooLong, Truncated, Undefined, decode
from cpu_node.descriptor import CS
from cpu_node.errors import GP, NM, UD, GuestFault
from cpu_node.single import Single
from cpu_node.table import Row

if TYPE_CHECKING:
    from cpu_node.paging import GuestMemory
    from cpu_node.platform import Platform

Handler = Callable[["Simulator", Insn], None]


class Simulator:
    """Executes one instruction at cs:eip."""

    def __init__(self, cpu: Cpu, memory: GuestMemory, single: Single, platform: Platform) -> None:
        self.cpu: Cpu = cpu
        self.memory = memory
        self.single = single
        self.platform = platform
        self.text = b""
        self.at = 0  # EIP of the instruction that is being run
        self._fetch_bytes = memory.read  # data breakpoints see only what handlers read
        self.kick: Callable[[], None] = lambda: None  # interrupts may have changed: have them looked at
        self.on_port: Callable[[int, int], None] = lambda port, width: None  # an I/O instruction's access
        self._decoded: dict[tuple[bytes, bool], Insn] = {}

    @property
    def user(self) -> bool:
        return self.cpu.cpl == 3

    def fetch(self) -> Insn:
        """Decode the instruction at cs:eip. Raises GuestFault (#PF, #GP, #UD)."""
        cpu = self.cpu
        code = cpu.seg[CS]
        eip = cpu.eip
        if eip > code.highest:
            raise GuestFault(GP, 0)
        va = code.base + eip & 0xFFFFFFFF
        left = 0x1000 - (va & 0xFFF)
        text = self._fetch_bytes(va, min(left, MAX_LENGTH), self.user)
        code16 = not code.big
        try:
            try:
                insn = self._decode(text, code16)
            except Truncated:
                text += self._fetch_bytes(va + left & 0xFFFFFFFF, MAX_LENGTH - left, self.user)
                insn = self._decode(text, code16)
        except Undefined:
            raise GuestFault(UD) from None
        except TooLong:
            raise GuestFault(GP, 0) from None
        if eip + insn.length - 1 > code.highest and not code.flat:
            raise GuestFault(GP, 0)
        self.text = text
        return insn

    def _decode(self, text: bytes, code16: bool) -> Insn:
        insn = self._decoded.get((text, code16))
        if insn is None:
            if len(self._decoded) > 4000:
                self._decoded.clear()
            insn = self._decoded[text, code16] = decode(text, 0, code16)
        return insn

    def step(self) -> Row:
        """Execute one instruction; its row. Raises GuestFault with cpu.eip at the instruction."""
        cpu = self.cpu
        start = self.at = cpu.eip
        insn = self.fetch()
        cpu.eip = start + insn.length & (0xFFFFFFFF if cpu.seg[CS].big else 0xFFFF)
        try:
            self.execute(insn)
        except GuestFault:
            cpu.eip = start
            raise
        return insn.row

    def execute(self, insn: Insn) -> None:
        """Run a decoded instruction; cpu.eip is behind it."""
        handler_of(insn.row)(self, insn)

    def check_fpu(self, row: Row) -> None:
        """#NM and #UD by CR0 and CR4 [vol. 3 2.5, table 2-2; 13.1]."""
        cr0, group = self.cpu.cr0, row.group
        if group == "x87":
            if row.mnemonic == "fwait":
                if cr0 & CR0_MP and cr0 & CR0_TS:
                    raise GuestFault(NM)
            elif cr0 & (CR0_EM | CR0_TS):
                raise GuestFault(NM)
            return
        needs_osfxsr = group == "sse" and row.mnemonic not in ("fxsave", "fxrstor")
        if cr0 & CR0_EM or (needs_osfxsr and not self.cpu.cr4 & CR4_OSFXSR):
            raise GuestFault(UD)
        if cr0 & CR0_TS:
            raise GuestFault(NM)

    # ---- operands

    def read_rm(self, insn: Insn, size: int) -> int:
        """The r/m operand as an unsigned value of `size` bytes."""
        if insn.is_memory:
            va = self.single.linear(insn.default_segment, self.single.offset(insn), size, False)
            return int.from_bytes(self.memory.read(va, size, self.user), "little")
        return self.read_reg(insn.rm, size)

    def write_rm(self, insn: Insn, size: int, value: int) -> None:
        """Write the r/m operand."""
        if insn.is_memory:
            va = self.single.linear(insn.default_segment, self.single.offset(insn), size, True)
            self.memory.write(va, (value & (1 << 8 * size) - 1).to_bytes(size, "little"), self.user)
        else:
            self.write_reg(insn.rm, size, value)

    def read_reg(self, number: int, size: int) -> int:
        """A general register, low `size` bytes (size 1: AL..BH)."""
        regs = self.cpu.regs
        if size == 4:
            return regs[number]
        if size == 2:
            return regs[number] & 0xFFFF
        return regs[number & 3] >> (8 if number >= 4 else 0) & 0xFF

    def write_reg(self, number: int, size: int, value: int) -> None:
        """Write a general register; the rest of it stays."""
        regs = self.cpu.regs
        if size == 4:
            regs[number] = value & 0xFFFFFFFF
        elif size == 2:
            regs[number] = regs[number] & 0xFFFF0000 | value & 0xFFFF
        elif number >= 4:
            regs[number & 3] = regs[number & 3] & 0xFFFF00FF | (value & 0xFF) << 8
        else:
            regs[number] = regs[number] & 0xFFFFFF00 | value & 0xFF

    def jump(self, target: int, size: int) -> None:
        """A near transfer; #GP(0) beyond the code segment."""
        cpu = self.cpu
        if size == 2:
            target &= 0xFFFF
        if target > cpu.seg[CS].highest:
            raise GuestFault(GP, 0)
        cpu.eip = target


HANDLERS: dict[str, Handler] = {**handlers_stack.HANDLERS, **handlers_string.HANDLERS}


@functools.cache
def handler_of(row: Row) -> Handler:
    """What executes a row's instructions."""
    handler = HANDLERS.get(row.action)
    if handler is None and row.action in ("sim", "stop"):
        handler = handlers_system.handler_of(row)
    if handler is None:  # plain, or in a shape the translator doesn't do
        handler = _native
    if row.group in ("x87", "mmx", "sse"):
        return functools.partial(_with_fpu, handler)
    return handler


def _native(sim: Simulator, insn: Insn) -> None:
    sim.single.execute(insn, sim.text)


def _with_fpu(handler: Handler, sim: Simulator, insn: Insn) -> None:
    sim.check_fpu(insn.row)
    handler(sim, insn)

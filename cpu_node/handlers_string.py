"""Simulated string instructions, one element at a time, and MASKMOV.

Source: Intel SDM vol. 2, MOVS, CMPS, SCAS, LODS, STOS, REP, MASKMOV. INS, OUTS: handlers_port.py.
Registers move with each element, so a fault in the middle leaves a state that restarts. Long repeats are
left with EIP at the instruction every BURST elements, so that interrupts get in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cpu_node.cpu import EAX, ECX, EDI, ESI
from cpu_node.decode import ES, Insn
from cpu_node.errors import MF, GuestFault
from cpu_node.flags import DF, TF
from cpu_node.layout import FX

if TYPE_CHECKING:
    from cpu_node.simulate import Handler, Simulator

BURST = 1024
_ZF = 0x40
_ES, _TOP = 0x80, 0x38  # x87 status: exception summary in its low byte, top of stack in its high byte


def string(sim: Simulator, insn: Insn) -> None:
    """MOVS, CMPS, STOS, LODS, SCAS."""
    opcode = insn.row.opcode
    size = insn.opsize if opcode & 1 else 1
    kind = opcode & 0xFE
    compares = kind in (0xA6, 0xAE)

    def element() -> bool:
        memory, user = sim.memory, sim.user
        value = 0
        if kind in (0xA4, 0xA6, 0xAC):
            source = 3 if insn.segment is None else insn.segment
            va = sim.single.linear(source, index(sim, insn, ESI), size, False)
            value = int.from_bytes(memory.read(va, size, user), "little")
        else:
            value = sim.read_reg(EAX, size)
        if kind in (0xA4, 0xAA):
            va = sim.single.linear(ES, index(sim, insn, EDI), size, True)
            memory.write(va, value.to_bytes(size, "little"), user)
        elif kind == 0xAC:
            sim.write_reg(EAX, size, value)
        else:
            va = sim.single.linear(ES, index(sim, insn, EDI), size, False)
            other = int.from_bytes(memory.read(va, size, user), "little")
            _compare(sim, value, other, size)
        if kind in (0xA4, 0xA6, 0xAC):
            advance(sim, insn, ESI, size)
        if kind != 0xAC:
            advance(sim, insn, EDI, size)
        return not compares or bool(sim.cpu.eflags & _ZF) == (insn.rep == 0xF3)

    repeat(sim, insn, element)


def mask_move(sim: Simulator, insn: Insn) -> None:
    """MASKMOVQ, MASKMOVDQU: bytes whose mask has bit 7 set, to DS:EDI. The others may fault too, and do."""
    fx, mmx = sim.single.record.b, insn.row.prefix != 0x66
    size = 8 if mmx else 16
    if mmx and fx[FX + 2] & _ES:
        raise GuestFault(MF)
    source, mask = (_mmx(fx, n) if mmx else _xmm(fx, n) for n in (insn.reg, insn.rm))
    if mmx:  # TOP = 0, all registers in use [vol. 1 9.5.1]; hosts do so even if the store faults
        top = fx[FX + 3] >> 3 & 7
        st = bytes(fx[FX + 32 : FX + 160])  # by distance from TOP
        fx[FX + 32 : FX + 160] = st[16 * (8 - top) :] + st[: 16 * (8 - top)]
        fx[FX + 3] &= ~_TOP
        fx[FX + 4] = 0xFF
    segment = 3 if insn.segment is None else insn.segment
    va = sim.single.linear(segment, index(sim, insn, EDI), size, True)
    for part in range(0, size, 8):  # alignment is checked by quadwords
        sim.memory.probe_write(va + part & 0xFFFFFFFF, 8, sim.user)
    for n in range(size):
        if mask[n] & 0x80:
            sim.memory.write8(va + n & 0xFFFFFFFF, source[n], sim.user)


def _xmm(record: memoryview, number: int) -> bytes:
    return bytes(record[FX + 160 + 16 * number : FX + 176 + 16 * number])


def _mmx(record: memoryview, number: int) -> bytes:
    """MMn aliases the mantissa of physical register n; the image holds ST(i) [vol. 1 table 10-2]."""
    top = record[FX + 3] >> 3 & 7
    slot = number - top & 7
    return bytes(record[FX + 32 + 16 * slot : FX + 40 + 16 * slot])


def index(sim: Simulator, insn: Insn, register: int) -> int:
    return sim.cpu.regs[register] & (0xFFFF if insn.addr16 else 0xFFFFFFFF)


def advance(sim: Simulator, insn: Insn, register: int, size: int) -> None:
    regs = sim.cpu.regs
    mask = 0xFFFF if insn.addr16 else 0xFFFFFFFF
    step = -size if sim.cpu.eflags & DF else size
    regs[register] = regs[register] & ~mask & 0xFFFFFFFF | regs[register] + step & mask


def repeat(sim: Simulator, insn: Insn, element: Callable[[], bool]) -> None:
    if not insn.rep:
        element()
        return
    cpu = sim.cpu
    mask = 0xFFFF if insn.addr16 else 0xFFFFFFFF
    stepped = cpu.eflags & TF or cpu.dr[7] & 0xFF  # single steps and breakpoints stop after every element
    for _ in range(1 if stepped else BURST):
        old = cpu.regs[ECX]
        if not old & mask:
            return
        go_on = element()
        cpu.regs[ECX] = old & ~mask & 0xFFFFFFFF | old - 1 & mask
        if not go_on:
            return
    if cpu.regs[ECX] & mask:
        cpu.eip = cpu.eip - insn.length & 0xFFFFFFFF


def _compare(sim: Simulator, left: int, right: int, size: int) -> None:
    """Status flags of left - right."""
    bits = 8 * size
    top = 1 << bits - 1
    result = left - right & (1 << bits) - 1
    flags = sim.cpu.eflags & ~0x8D5
    flags |= int(left < right) | ((left ^ right ^ result) & 0x10) | (0x80 if result & top else 0)
    flags |= (0x40 if result == 0 else 0) | (0x800 if (left ^ right) & (left ^ result) & top else 0)
    flags |= 0 if (result & 0xFF).bit_count() & 1 else 4
    sim.cpu.eflags = flags


HANDLERS: dict[str, Handler] = {"string": string, "maskmov": mask_move}

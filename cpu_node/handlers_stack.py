"""Simulated stack and control-flow instructions: any operand size, any stack, any segment.

Source: Intel SDM vol. 2. The translator runs the 32-bit flat forms natively; these are for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node import control, msr, stack
from cpu_node.cpu import EAX, EBX, ECX, ESP
from cpu_node.decode import Insn
from cpu_node.descriptor import CS
from cpu_node.errors import GP, SS, UD, GuestFault

if TYPE_CHECKING:
    from cpu_node.simulate import Handler, Simulator

_SEGMENTS = {"ES": 0, "CS": 1, "SS": 2, "DS": 3, "FS": 4, "GS": 5}


def push(sim: Simulator, insn: Insn) -> None:
    stack.push(sim.cpu, (sim.read_reg(insn.row.opcode & 7, insn.opsize),), insn.opsize)


def pop(sim: Simulator, insn: Insn) -> None:
    (value,) = stack.peek(sim.cpu, 1, insn.opsize)
    stack.release(sim.cpu, insn.opsize)
    sim.write_reg(insn.row.opcode & 7, insn.opsize, value)


def push_immediate(sim: Simulator, insn: Insn) -> None:
    stack.push(sim.cpu, (insn.imm & (0xFFFF if insn.opsize16 else 0xFFFFFFFF),), insn.opsize)


def push_rm(sim: Simulator, insn: Insn) -> None:
    stack.push(sim.cpu, (sim.read_rm(insn, insn.opsize),), insn.opsize)


def pop_rm(sim: Simulator, insn: Insn) -> None:
    """ESP as a base counts after the increment [POP]."""
    cpu = sim.cpu
    (value,) = stack.peek(cpu, 1, insn.opsize)
    before = cpu.regs[ESP]
    stack.release(cpu, insn.opsize)
    try:
        sim.write_rm(insn, insn.opsize, value)
    except GuestFault:
        cpu.regs[ESP] = before
        raise


def push_segment(sim: Simulator, insn: Insn) -> None:
    stack.push(sim.cpu, (sim.cpu.seg[_SEGMENTS[insn.row.operands[0]]].selector,), insn.opsize)


def store_segment(sim: Simulator, insn: Insn) -> None:
    if insn.reg > 5:
        raise GuestFault(UD)
    selector = sim.cpu.seg[insn.reg].selector
    sim.write_rm(insn, 2 if insn.is_memory else insn.opsize, selector)


def push_all(sim: Simulator, insn: Insn) -> None:
    stack.push_singly(sim.cpu, [sim.read_reg(n, insn.opsize) for n in range(7, -1, -1)], insn.opsize)


def pop_all(sim: Simulator, insn: Insn) -> None:
    """A page fault in the middle leaves the registers that have been popped, and ESP."""
    size = insn.opsize
    try:
        values = stack.peek(sim.cpu, 8, size)
    except GuestFault as fault:
        if fault.vector != SS:
            for i in range(8):  # until it faults again
                _set_popped(sim, 7 - i, size, *stack.peek(sim.cpu, 1, size, skip=i * size))
        raise
    stack.release(sim.cpu, 8 * size)
    for number, value in zip(range(7, -1, -1), values, strict=True):
        _set_popped(sim, number, size, value)


def _set_popped(sim: Simulator, number: int, size: int, value: int) -> None:
    if number != ESP:
        sim.write_reg(number, size, value)


def push_flags(sim: Simulator, insn: Insn) -> None:
    stack.pushf(sim.cpu, insn.opsize)


def pop_flags(sim: Simulator, insn: Insn) -> None:
    stack.popf(sim.cpu, insn.opsize)


def leave(sim: Simulator, insn: Insn) -> None:
    stack.leave(sim.cpu, insn.opsize)


def _check_target(sim: Simulator, target: int) -> None:
    if target > sim.cpu.seg[CS].highest:
        raise GuestFault(GP, 0)


def call(sim: Simulator, insn: Insn) -> None:
    _call(sim, insn, sim.cpu.eip + insn.imm)


def _call(sim: Simulator, insn: Insn, target: int) -> None:
    target &= 0xFFFF if insn.opsize16 else 0xFFFFFFFF
    _check_target(sim, target)
    stack.push(sim.cpu, (sim.cpu.eip,), insn.opsize)
    sim.cpu.eip = target


def jump(sim: Simulator, insn: Insn) -> None:
    sim.jump(sim.cpu.eip + insn.imm & 0xFFFFFFFF, insn.opsize)


def jump_if(sim: Simulator, insn: Insn) -> None:
    if condition(sim.cpu.eflags, insn.row.opcode & 15):
        jump(sim, insn)


def condition(flags: int, code: int) -> bool:
    """Is condition 0..15 (O NO B NB Z NZ BE NBE S NS P NP L NL LE NLE) met?"""
    carry, zero, sign, overflow = flags & 1, flags >> 6 & 1, flags >> 7 & 1, flags >> 11 & 1
    less = sign ^ overflow
    base = (overflow, carry, zero, carry | zero, sign, flags >> 2 & 1, less, zero | less)
    return bool(base[code >> 1]) != bool(code & 1)


def loop(sim: Simulator, insn: Insn) -> None:
    """LOOP, LOOPE, LOOPNE, JCXZ; the counter's width is the address size."""
    cpu = sim.cpu
    mask = 0xFFFF if insn.addr16 else 0xFFFFFFFF
    old = cpu.regs[ECX]
    count = old & mask
    opcode = insn.row.opcode
    if opcode == 0xE3:
        if count == 0:
            jump(sim, insn)
        return
    count = count - 1 & mask
    taken = count != 0 and (opcode == 0xE2 or bool(cpu.eflags & 0x40) == (opcode == 0xE1))
    if taken:
        jump(sim, insn)
    cpu.regs[ECX] = old & ~mask & 0xFFFFFFFF | count


def ret(sim: Simulator, insn: Insn) -> None:
    (target,) = stack.peek(sim.cpu, 1, insn.opsize)
    sim.jump(target, insn.opsize)
    stack.release(sim.cpu, insn.opsize + insn.imm)


def jump_rm(sim: Simulator, insn: Insn) -> None:
    sim.jump(sim.read_rm(insn, insn.opsize), insn.opsize)


def call_rm(sim: Simulator, insn: Insn) -> None:
    _call(sim, insn, sim.read_rm(insn, insn.opsize))


def translate_byte(sim: Simulator, insn: Insn) -> None:
    """XLAT."""
    regs = sim.cpu.regs
    offset = regs[EBX] + (regs[EAX] & 0xFF) & (0xFFFF if insn.addr16 else 0xFFFFFFFF)
    va = sim.single.linear(3 if insn.segment is None else insn.segment, offset, 1, False)
    sim.write_reg(0, 1, sim.memory.read8(va, sim.user))


def hint(sim: Simulator, insn: Insn) -> None:
    """A no-operation, whatever its operand."""


HANDLERS: dict[str, Handler] = {
    "push": push, "pop": pop, "pushimm": push_immediate, "pushm": push_rm, "popm": pop_rm,
    "pushseg": push_segment, "movfromseg": store_segment, "pusha": push_all, "popa": pop_all,
    "pushf": push_flags, "popf": pop_flags, "leave": leave, "call": call, "jmp": jump, "jcc": jump_if,
    "loop": loop, "ret": ret, "ijmp": jump_rm, "icall": call_rm, "xlat": translate_byte,
    "cli": lambda sim, insn: control.cli(sim.cpu), "sti": lambda sim, insn: control.sti(sim.cpu),
    "rdtsc": lambda sim, insn: msr.rdtsc(sim.cpu), "hintnop": hint,
}  # fmt: skip

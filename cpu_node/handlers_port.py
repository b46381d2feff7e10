"""Simulated port I/O: IN, OUT, INS, OUTS.

Source: Intel SDM vol. 2; permission [vol. 3 19.5.2] in tasks.check_io. A repeated INS or OUTS that goes
upwards within one page is one string access of the platform, which the bus carries as one message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node import tasks
from cpu_node.cpu import EAX, ECX, EDI, EDX, ESI
from cpu_node.decode import DS, ES, Insn
from cpu_node.flags import DF, TF
from cpu_node.handlers_string import advance, index, repeat

if TYPE_CHECKING:
    from cpu_node.simulate import Simulator

PAGE = 0x1000


def _port(sim: Simulator, insn: Insn) -> tuple[int, int]:
    """(port, width), after the permission check."""
    opcode = insn.row.opcode
    width = insn.opsize if opcode & 1 else 1
    by_dx = opcode >= 0xEC or opcode < 0xE0
    port = sim.cpu.regs[EDX] & 0xFFFF if by_dx else insn.imm & 0xFF
    tasks.check_io(sim.cpu, port, width)
    if not insn.rep or sim.cpu.regs[ECX] & (0xFFFF if insn.addr16 else 0xFFFFFFFF):
        sim.on_port(port, width)
    return port, width


def read(sim: Simulator, insn: Insn) -> None:
    """IN."""
    port, width = _port(sim, insn)
    sim.write_reg(EAX, width, sim.platform.port_read(port, width))


def write(sim: Simulator, insn: Insn) -> None:
    """OUT."""
    port, width = _port(sim, insn)
    sim.platform.port_write(port, width, sim.read_reg(EAX, width))


def read_string(sim: Simulator, insn: Insn) -> None:
    """INS."""
    port, width = _port(sim, insn)

    def element() -> bool:
        va = sim.single.linear(ES, index(sim, insn, EDI), width, True)
        sim.memory.probe_write(va, width, sim.user)
        value = sim.platform.port_read(port, width)
        sim.memory.write(va, value.to_bytes(width, "little"), sim.user)
        advance(sim, insn, EDI, width)
        return True

    count = _burst(sim, insn, EDI, width)
    if count < 2:
        repeat(sim, insn, element)
        return
    va = sim.single.linear(ES, index(sim, insn, EDI), count * width, True)
    sim.memory.probe_write(va, count * width, sim.user)
    sim.memory.write(va, sim.platform.port_in_string(port, width, count), sim.user)
    _finish(sim, insn, EDI, width, count)


def write_string(sim: Simulator, insn: Insn) -> None:
    """OUTS."""
    port, width = _port(sim, insn)
    source = DS if insn.segment is None else insn.segment

    def element() -> bool:
        va = sim.single.linear(source, index(sim, insn, ESI), width, False)
        sim.platform.port_write(port, width, int.from_bytes(sim.memory.read(va, width, sim.user), "little"))
        advance(sim, insn, ESI, width)
        return True

    count = _burst(sim, insn, ESI, width)
    if count < 2:
        repeat(sim, insn, element)
        return
    va = sim.single.linear(source, index(sim, insn, ESI), count * width, False)
    sim.platform.port_out_string(port, width, sim.memory.read(va, count * width, sim.user))
    _finish(sim, insn, ESI, width, count)


def _burst(sim: Simulator, insn: Insn, register: int, width: int) -> int:
    """Elements that one string access may take, 0 where it must be one at a time.

    Those within the page of a flat segment: none of them can fault when the first doesn't.
    """
    cpu = sim.cpu
    segment = ES if register == EDI else DS if insn.segment is None else insn.segment
    debugged = cpu.eflags & TF or cpu.dr[7] & 0xFF
    if not insn.rep or insn.addr16 or cpu.eflags & DF or debugged or not cpu.seg[segment].flat:
        return 0
    return min(cpu.regs[ECX], (PAGE - (cpu.regs[register] & PAGE - 1)) // width)


def _finish(sim: Simulator, insn: Insn, register: int, width: int, count: int) -> None:
    """Move the registers; go on with the same instruction while elements are left."""
    cpu = sim.cpu
    cpu.regs[register] = cpu.regs[register] + count * width & 0xFFFFFFFF
    cpu.regs[ECX] -= count
    if cpu.regs[ECX]:
        cpu.eip = cpu.eip - insn.length & 0xFFFFFFFF

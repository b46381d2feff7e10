"""What instruction the CPU is at, in words: for reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node.decode import decode
from cpu_node.descriptor import CS
from cpu_node.errors import GuestFault

if TYPE_CHECKING:
    from cpu_node.engine import Engine


def describe_instruction(engine: Engine, at_next: bool) -> str:
    """CS:EIP, bytes and disassembly; at_next: EIP is behind the instruction (the simulator is in it)."""
    import capstone

    cpu = engine.cpu
    eip = cpu.eip
    code = cpu.seg[CS]
    if at_next and engine.simulator.text:
        insn = decode(engine.simulator.text, 0, not code.big)
        eip = eip - insn.length & 0xFFFFFFFF
    try:
        text = engine.memory.read(code.base + eip & 0xFFFFFFFF, 15)
    except GuestFault:
        return f"{code.selector:04x}:{eip:08x}: not readable"
    bits = capstone.CS_MODE_32 if code.big else capstone.CS_MODE_16
    for _, size, name, operands in capstone.Cs(capstone.CS_ARCH_X86, bits).disasm_lite(text, eip, 1):
        return f"{code.selector:04x}:{eip:08x}: {text[:size].hex(' ')}  {name} {operands}".rstrip()
    return f"{code.selector:04x}:{eip:08x}: {text[:8].hex(' ')}  (no instruction)"

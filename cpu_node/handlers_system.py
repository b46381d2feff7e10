"""Simulated system instructions, I/O and decimal arithmetic: binds the table's mnemonics to functions.

Source: Intel SDM vol. 2. What the instructions mean is in segments, far, gates, control, msr and cpuid; here
operands are fetched and results stored.
Left out: nothing the table marks `sim` or `stop`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cpu_node import control, cpuid, far, gates, handlers_port, iret, msr, segments, stack
from cpu_node.cpu import EAX, ESP, Cpu
from cpu_node.decode import Insn
from cpu_node.descriptor import DS, ES, FS, GS, SS
from cpu_node.errors import DE, UD, GuestFault

if TYPE_CHECKING:
    from cpu_node.simulate import Handler, Simulator
    from cpu_node.table import Row

_SEGMENTS = {"ES": ES, "SS": SS, "DS": DS, "FS": FS, "GS": GS}
_LOADS = {"les": ES, "lds": DS, "lss": SS, "lfs": FS, "lgs": GS}
_ZF, _CF, _AF = 0x40, 0x01, 0x10


def handler_of(row: Row) -> Handler | None:
    """What runs a row whose action is `sim` or `stop`; None: nothing special, the host can execute it."""
    return HANDLERS.get((row.map, row.opcode)) or NAMED.get(row.mnemonic)


# ---- segments


def _load_segment(sim: Simulator, insn: Insn) -> None:
    if insn.reg > 5 or insn.reg == 1:
        raise GuestFault(UD)
    segments.load_segment(sim.cpu, insn.reg, sim.read_rm(insn, 2))


def _pop_segment(sim: Simulator, insn: Insn) -> None:
    cpu = sim.cpu
    (value,) = stack.peek(cpu, 1, insn.opsize)
    index = _SEGMENTS[insn.row.operands[0]]
    if index == SS:  # the pop is from the old stack
        old = cpu.regs[ESP]
        stack.release(cpu, insn.opsize)
        try:
            segments.load_segment(cpu, index, value & 0xFFFF)
        except GuestFault:
            cpu.regs[ESP] = old
            raise
        return
    segments.load_segment(cpu, index, value & 0xFFFF)
    stack.release(cpu, insn.opsize)


def _far_operand(sim: Simulator, insn: Insn) -> tuple[int, int]:
    """(selector, offset) from memory."""
    size = insn.opsize
    va = sim.single.linear(insn.default_segment, sim.single.offset(insn), size + 2, False)
    offset = sim.memory.read(va, size, sim.user)
    selector = sim.memory.read16(va + size & 0xFFFFFFFF, sim.user)
    return selector, int.from_bytes(offset, "little")


def _load_far(sim: Simulator, insn: Insn) -> None:
    selector, offset = _far_operand(sim, insn)
    segments.load_segment(sim.cpu, _LOADS[insn.row.mnemonic], selector)
    sim.write_reg(insn.reg, insn.opsize, offset)


def _rights(sim: Simulator, insn: Insn) -> None:
    query = segments.lar if insn.row.mnemonic == "lar" else segments.lsl
    value = query(sim.cpu, sim.read_rm(insn, 2))
    if value is not None:
        sim.write_reg(insn.reg, insn.opsize, value)
    _set_zf(sim, value is not None)


def _verify(sim: Simulator, insn: Insn) -> None:
    query = segments.verr if insn.row.mnemonic == "verr" else segments.verw
    _set_zf(sim, query(sim.cpu, sim.read_rm(insn, 2)))


def _set_zf(sim: Simulator, value: bool) -> None:
    sim.cpu.eflags = sim.cpu.eflags & ~_ZF | (_ZF if value else 0)


def _arpl(sim: Simulator, insn: Insn) -> None:
    if not sim.cpu.protected:
        raise GuestFault(UD)
    target, source = sim.read_rm(insn, 2), sim.read_reg(insn.reg, 2)
    lower = target & 3 < source & 3
    if lower:
        sim.write_rm(insn, 2, target & ~3 | source & 3)
    _set_zf(sim, lower)


def _store_word(read: Callable[[Simulator], int]) -> Callable[[Simulator, Insn], None]:
    """SLDT, STR, SMSW: 16 bits to memory, the operand size to a register."""

    def store(sim: Simulator, insn: Insn) -> None:
        value = read(sim)
        if insn.is_memory:
            sim.write_rm(insn, 2, value & 0xFFFF)
        else:
            sim.write_rm(insn, insn.opsize, value)

    return store


def _privileged_word(load: Callable[[Cpu, int], None]) -> Callable[[Simulator, Insn], None]:
    """LLDT, LTR, LMSW: the privilege is checked before the operand is read."""

    def handler(sim: Simulator, insn: Insn) -> None:
        if sim.cpu.protected:
            control.require_ring0(sim.cpu)
        load(sim.cpu, sim.read_rm(insn, 2))

    return handler


def _load_table(sim: Simulator, insn: Insn) -> None:
    control.require_ring0(sim.cpu)
    va = sim.single.linear(insn.default_segment, sim.single.offset(insn), 6, False)
    data = sim.memory.read(va, 6, sim.user)
    load = control.lgdt if insn.row.mnemonic == "lgdt" else control.lidt
    load(sim.cpu, int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little"), insn.opsize)


def _store_table(sim: Simulator, insn: Insn) -> None:
    limit, base = (control.sgdt if insn.row.mnemonic == "sgdt" else control.sidt)(sim.cpu)
    va = sim.single.linear(insn.default_segment, sim.single.offset(insn), 6, True)
    sim.memory.write(va, limit.to_bytes(2, "little") + base.to_bytes(4, "little"), sim.user)


def _invlpg(sim: Simulator, insn: Insn) -> None:
    segment = sim.cpu.seg[insn.default_segment]
    control.invlpg(sim.cpu, segment.base + sim.single.offset(insn) & 0xFFFFFFFF)


# ---- control transfer


def _far_direct(sim: Simulator, insn: Insn) -> None:
    transfer = far.far_call if insn.row.mnemonic == "call" else far.far_jump
    transfer(sim.cpu, insn.imm2, insn.imm, insn.opsize)


def _int(sim: Simulator, insn: Insn) -> None:
    cpl = sim.cpu.cpl
    gates.int_n(sim.cpu, insn.imm & 0xFF)
    sim.cpu.hooks.interrupted(insn.imm & 0xFF, cpl)


def _iret(sim: Simulator, insn: Insn) -> None:
    in_nmi = sim.cpu.nmi_blocked
    iret.iret(sim.cpu, insn.opsize)
    if in_nmi:
        sim.kick()  # another NMI may have waited for this


def _group5(sim: Simulator, insn: Insn) -> None:
    """FF /3, /5: far through memory; /2, /4, /6 get here when the shape has no template."""
    if insn.reg in (3, 5):
        selector, offset = _far_operand(sim, insn)
        (far.far_call if insn.reg == 3 else far.far_jump)(sim.cpu, selector, offset, insn.opsize)
    else:
        sim.single.execute(insn, sim.text)


def _bound(sim: Simulator, insn: Insn) -> None:
    size = insn.opsize
    va = sim.single.linear(insn.default_segment, sim.single.offset(insn), 2 * size, False)
    bounds = (sim.memory.read(place & 0xFFFFFFFF, size, sim.user) for place in (va, va + size))
    lower, upper = (int.from_bytes(bound, "little") for bound in bounds)
    gates.bound(sim.read_reg(insn.reg, size), lower, upper, size)


def _into(sim: Simulator, insn: Insn) -> None:
    gates.into(sim.cpu)


def _undefined(sim: Simulator, insn: Insn) -> None:
    raise GuestFault(UD)


# ---- control registers


def _move_control(sim: Simulator, insn: Insn) -> None:
    cpu, opcode = sim.cpu, insn.row.opcode
    if opcode == 0x20:
        cpu.regs[insn.rm] = control.read_cr(cpu, insn.reg)
    elif opcode == 0x21:
        cpu.regs[insn.rm] = control.read_dr(cpu, insn.reg)
    elif opcode == 0x22:
        control.write_cr(cpu, insn.reg, cpu.regs[insn.rm])
    else:
        control.write_dr(cpu, insn.reg, cpu.regs[insn.rm])


def _wrmsr(sim: Simulator, insn: Insn) -> None:
    msr.wrmsr(sim.cpu)
    sim.kick()  # the local APIC's deadline may be another


# ---- decimal arithmetic, which 64-bit mode lacks


def _status(value: int) -> int:
    """SF, ZF, PF of a byte."""
    return value & 0x80 | (0 if value else _ZF) | (0 if value.bit_count() & 1 else 4)


def _set_al(sim: Simulator, al: int, flags: int) -> None:
    sim.write_reg(EAX, 1, al)
    sim.cpu.eflags = sim.cpu.eflags & ~0xD5 | flags | _status(al & 0xFF)


def _daa_das(sim: Simulator, insn: Insn) -> None:
    sign = 1 if insn.row.mnemonic == "daa" else -1
    al, flags = sim.read_reg(EAX, 1), sim.cpu.eflags
    carry, out, old = flags & _CF, 0, al
    if al & 15 > 9 or flags & _AF:
        changed = al + 6 * sign
        out |= _AF | (_CF if carry or (sign < 0 and changed < 0) else 0)
        al = changed & 0xFF
    if old > 0x99 or carry:
        al = al + 0x60 * sign & 0xFF
        out |= _CF
    elif sign > 0:
        out &= ~_CF
    _set_al(sim, al, out)


def _aaa_aas(sim: Simulator, insn: Insn) -> None:
    sign = 1 if insn.row.mnemonic == "aaa" else -1
    ax, flags = sim.read_reg(EAX, 2), sim.cpu.eflags
    adjust = ax & 15 > 9 or bool(flags & _AF)
    if adjust:
        ax = ax + 0x106 * sign & 0xFFFF if sign > 0 else (ax - 6 & 0xFFFF) - 0x100 & 0xFFFF
    ax &= 0xFF0F
    sim.write_reg(EAX, 2, ax)
    sim.cpu.eflags = flags & ~0xD5 | (_AF | _CF if adjust else 0) | _status(ax & 0xFF)


def _aam(sim: Simulator, insn: Insn) -> None:
    base = insn.imm & 0xFF
    if base == 0:
        raise GuestFault(DE)
    high, low = divmod(sim.read_reg(EAX, 1), base)
    sim.write_reg(EAX, 2, high << 8 | low)
    sim.cpu.eflags = sim.cpu.eflags & ~0x8D5 | _status(low)


def _aad(sim: Simulator, insn: Insn) -> None:
    ax = sim.read_reg(EAX, 2)
    al = (ax & 0xFF) + (ax >> 8) * (insn.imm & 0xFF) & 0xFF
    sim.write_reg(EAX, 2, al)
    sim.cpu.eflags = sim.cpu.eflags & ~0x8D5 | _status(al)


def _salc(sim: Simulator, insn: Insn) -> None:
    sim.write_reg(EAX, 1, 0xFF if sim.cpu.eflags & _CF else 0)


HANDLERS: dict[tuple[int, int], Handler] = {
    (0, 0x8E): _load_segment,
    (0, 0x07): _pop_segment, (0, 0x17): _pop_segment, (0, 0x1F): _pop_segment,
    (1, 0xA1): _pop_segment, (1, 0xA9): _pop_segment,
    (0, 0x9A): _far_direct, (0, 0xEA): _far_direct, (0, 0xFF): _group5,
    (1, 0x20): _move_control, (1, 0x21): _move_control, (1, 0x22): _move_control, (1, 0x23): _move_control,
    (0, 0xE4): handlers_port.read, (0, 0xE5): handlers_port.read,
    (0, 0xEC): handlers_port.read, (0, 0xED): handlers_port.read,
    (0, 0xE6): handlers_port.write, (0, 0xE7): handlers_port.write,
    (0, 0xEE): handlers_port.write, (0, 0xEF): handlers_port.write,
    (0, 0x6C): handlers_port.read_string, (0, 0x6D): handlers_port.read_string,
    (0, 0x6E): handlers_port.write_string, (0, 0x6F): handlers_port.write_string,
}  # fmt: skip

NAMED: dict[str, Handler] = {
    **dict.fromkeys(_LOADS, _load_far),
    "lar": _rights, "lsl": _rights, "verr": _verify, "verw": _verify, "arpl": _arpl,
    "sldt": _store_word(lambda sim: segments.sldt(sim.cpu)),
    "str": _store_word(lambda sim: segments.store_tr(sim.cpu)),
    "smsw": _store_word(lambda sim: control.smsw(sim.cpu)),
    "lldt": _privileged_word(segments.lldt),
    "ltr": _privileged_word(segments.ltr),
    "lmsw": _privileged_word(control.lmsw),
    "lgdt": _load_table, "lidt": _load_table, "sgdt": _store_table, "sidt": _store_table,
    "invlpg": _invlpg,
    "clts": lambda sim, insn: control.clts(sim.cpu),
    "invd": lambda sim, insn: control.wbinvd(sim.cpu),
    "wbinvd": lambda sim, insn: control.wbinvd(sim.cpu),
    "hlt": lambda sim, insn: control.hlt(sim.cpu),
    "rdmsr": lambda sim, insn: msr.rdmsr(sim.cpu),
    "wrmsr": _wrmsr,
    "rdpmc": lambda sim, insn: msr.rdpmc(sim.cpu),
    "cpuid": lambda sim, insn: cpuid.cpuid(sim.cpu),
    "sysenter": lambda sim, insn: far.sysenter(sim.cpu),
    "sysexit": lambda sim, insn: far.sysexit(sim.cpu),
    "iret": _iret,
    "retf": lambda sim, insn: far.far_return(sim.cpu, insn.opsize, insn.imm),
    "int": _int,
    "int3": lambda sim, insn: gates.int3(sim.cpu),
    "into": _into,
    "int1": lambda sim, insn: gates.int1(sim.cpu),
    "bound": _bound, "ud2": _undefined,
    "enter": lambda sim, insn: stack.enter(sim.cpu, insn.imm & 0xFFFF, insn.imm2 & 0xFF, insn.opsize),
    "daa": _daa_das, "das": _daa_das, "aaa": _aaa_aas, "aas": _aaa_aas, "aam": _aam, "aad": _aad,
    "salc": _salc,
}  # fmt: skip

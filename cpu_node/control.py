"""Control and debug registers, descriptor-table registers, and the small privileged instructions.

Source: Intel SDM vol. 3A sections 2.4 to 2.8, 4.10.4 (what flushes), vol. 3B section 17.2 (debug registers);
instruction pages of vol. 2. MSRs and the time-stamp counter are in msr.py.
Left out: reserved bits of CR0 and CR3 are ignored, as the P6 family does.
"""

from __future__ import annotations

from cpu_node import cpu as state
from cpu_node.cpu import Cpu
from cpu_node.errors import DB, UD, GuestFault, general_protection
from cpu_node.flags import IF, IOPL, IOPL_SHIFT

CR0_DEFINED = (
    state.CR0_PE | state.CR0_MP | state.CR0_EM | state.CR0_TS | state.CR0_ET | state.CR0_NE
    | state.CR0_WP | state.CR0_AM | state.CR0_NW | state.CR0_CD | state.CR0_PG
)  # fmt: skip
CR4_DEFINED = (
    state.CR4_TSD | state.CR4_DE | state.CR4_PSE | state.CR4_PGE | state.CR4_PCE
    | state.CR4_OSFXSR | state.CR4_OSXMMEXCPT
)  # fmt: skip
LMSW_BITS = state.CR0_PE | state.CR0_MP | state.CR0_EM | state.CR0_TS

DR6_WRITABLE = 0x0000_E00F  # B0..B3, BD, BS, BT
DR7_WRITABLE = 0xFFFF_23FF  # L0..G3, LE, GE, GD, R/W and LEN fields
DR7_GD = 0x2000


def require_ring0(cpu: Cpu) -> None:
    if cpu.cpl:
        raise general_protection()


# Control registers


def read_cr(cpu: Cpu, number: int) -> int:
    """MOV r32, CRn."""
    _check_cr(cpu, number)
    return (cpu.cr0, 0, cpu.cr2, cpu.cr3, cpu.cr4)[number]


def write_cr(cpu: Cpu, number: int, value: int) -> None:
    """MOV CRn, r32."""
    _check_cr(cpu, number)
    match number:
        case 0:
            _write_cr0(cpu, value)
        case 2:
            cpu.cr2 = value
        case 3:
            cpu.cr3 = value
            cpu.hooks.flush_tlb(False)
        case _:
            _write_cr4(cpu, value)


def _check_cr(cpu: Cpu, number: int) -> None:
    if number not in (0, 2, 3, 4):
        raise GuestFault(UD)
    require_ring0(cpu)


def _write_cr0(cpu: Cpu, value: int) -> None:
    value = value & CR0_DEFINED | state.CR0_ET
    if value & state.CR0_PG and not value & state.CR0_PE:
        raise general_protection()
    if value & state.CR0_NW and not value & state.CR0_CD:
        raise general_protection()
    changed = value ^ cpu.cr0
    if not changed:
        return
    cpu.cr0 = value
    if changed & (state.CR0_PG | state.CR0_PE | state.CR0_WP):
        cpu.hooks.flush_tlb(True)
    cpu.hooks.mode_changed()


def _write_cr4(cpu: Cpu, value: int) -> None:
    if value & ~CR4_DEFINED:
        raise general_protection()
    changed = value ^ cpu.cr4
    if not changed:
        return
    cpu.cr4 = value
    if changed & (state.CR4_PSE | state.CR4_PGE):
        cpu.hooks.flush_tlb(True)
    cpu.hooks.mode_changed()


def lmsw(cpu: Cpu, value: int) -> None:
    """LMSW: can set PE but not clear it."""
    require_ring0(cpu)
    _write_cr0(cpu, cpu.cr0 & ~(LMSW_BITS ^ state.CR0_PE) | value & LMSW_BITS)


def smsw(cpu: Cpu) -> int:
    """SMSW, at any CPL: CR0; a memory or 16-bit destination takes its low word."""
    return cpu.cr0


def clts(cpu: Cpu) -> None:
    require_ring0(cpu)
    if cpu.cr0 & state.CR0_TS:
        cpu.cr0 &= ~state.CR0_TS
        cpu.hooks.mode_changed()


# Debug registers


def read_dr(cpu: Cpu, number: int) -> int:
    """MOV r32, DRn."""
    return cpu.dr[_checked_dr(cpu, number)]


def write_dr(cpu: Cpu, number: int, value: int) -> None:
    """MOV DRn, r32; mode_changed is called when breakpoints may have changed."""
    number = _checked_dr(cpu, number)
    if number == 6:
        value = value & DR6_WRITABLE | state.DR6_FIXED
    elif number == 7:
        value = value & DR7_WRITABLE | state.DR7_FIXED
    if cpu.dr[number] != value:
        cpu.dr[number] = value
        if number != 6:
            cpu.hooks.mode_changed()


def _checked_dr(cpu: Cpu, number: int) -> int:
    """The register behind a DR number; DR4 and DR5 are DR6 and DR7 unless CR4.DE [17.2.2]."""
    if number in (4, 5):
        if cpu.cr4 & state.CR4_DE:
            raise GuestFault(UD)
        number += 2
    require_ring0(cpu)
    if cpu.dr[7] & DR7_GD:
        cpu.dr[6] |= state.DR6_BD
        raise GuestFault(DB)
    return number


# Descriptor tables


def lgdt(cpu: Cpu, limit: int, base: int, size: int) -> None:
    """LGDT; operand size 2 takes 24 bits of the base."""
    require_ring0(cpu)
    cpu.gdt_limit, cpu.gdt_base = limit, base if size == 4 else base & 0xFFFFFF
    cpu.hooks.mode_changed()


def lidt(cpu: Cpu, limit: int, base: int, size: int) -> None:
    """LIDT; operand size 2 takes 24 bits of the base."""
    require_ring0(cpu)
    cpu.idt_limit, cpu.idt_base = limit, base if size == 4 else base & 0xFFFFFF
    cpu.hooks.mode_changed()


def sgdt(cpu: Cpu) -> tuple[int, int]:
    """SGDT: (limit, base), all 32 bits of the base whatever the operand size."""
    return cpu.gdt_limit, cpu.gdt_base


def sidt(cpu: Cpu) -> tuple[int, int]:
    """SIDT: (limit, base)."""
    return cpu.idt_limit, cpu.idt_base


# Caches and TLB


def invlpg(cpu: Cpu, va: int) -> None:
    """INVLPG; `va` is the linear address, the segment base added."""
    require_ring0(cpu)
    cpu.hooks.invlpg(va)


def wbinvd(cpu: Cpu) -> None:
    """WBINVD and INVD: memory is always coherent here."""
    require_ring0(cpu)


# Interrupt flag and halt


def _check_iopl(cpu: Cpu, flags: int) -> None:
    if cpu.cpl > (flags & IOPL) >> IOPL_SHIFT:
        raise general_protection()


def cli(cpu: Cpu) -> None:
    """CLI; in virtual-8086 mode too, where CPL is 3."""
    flags = cpu.eflags
    _check_iopl(cpu, flags)
    cpu.eflags = flags & ~IF


def sti(cpu: Cpu) -> None:
    """STI: interrupts wait for one more instruction if IF was clear."""
    flags = cpu.eflags
    _check_iopl(cpu, flags)
    if not flags & IF:
        cpu.eflags = flags | IF
        cpu.inhibit_interrupts = True


def hlt(cpu: Cpu) -> None:
    """HLT; delivering any event ends it."""
    require_ring0(cpu)
    cpu.halted = True

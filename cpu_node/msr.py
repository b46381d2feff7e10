"""Model-specific registers and the time-stamp counter.

Source: Intel SDM vol. 4 table 2-2 (architectural MSRs), vol. 3B section 17.17 (TSC, TSC_ADJUST).
Left out: performance counters (RDPMC is #GP), DEBUGCTL other than 0, microcode updates, MTRRs and EFER
(absent: #GP, as CPUID says).
"""

from __future__ import annotations

from enum import IntEnum

from cpu_node.control import require_ring0
from cpu_node.cpu import CR4_TSD, EAX, ECX, EDX, Cpu
from cpu_node.cpuid import MISC_ENABLE_FAST_STRINGS, MISC_ENABLE_LIMIT_CPUID
from cpu_node.errors import GuestFault, general_protection

MASK64 = (1 << 64) - 1
FEATURE_CONTROL_LOCKED = 1
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))  # UC, WC, WT, WP, WB, UC- [vol. 3A table 11-10]
MISC_ENABLE_WRITABLE = MISC_ENABLE_FAST_STRINGS | MISC_ENABLE_LIMIT_CPUID


class Msr(IntEnum):
    TSC = 0x10
    PLATFORM_ID = 0x17
    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    TSC_ADJUST = 0x3B
    BIOS_SIGN_ID = 0x8B
    PLATFORM_INFO = 0xCE
    MISC_FEATURES_ENABLES = 0x140
    SYSENTER_CS = 0x174
    SYSENTER_ESP = 0x175
    SYSENTER_EIP = 0x176
    MISC_ENABLE = 0x1A0
    DEBUGCTL = 0x1D9
    PAT = 0x277
    TSC_DEADLINE = 0x6E0


def tsc(cpu: Cpu) -> int:
    """The guest's time-stamp counter, 64 bits."""
    return (cpu.hooks.rdtsc() + cpu.tsc_adjust) & MASK64


def rdtsc(cpu: Cpu) -> None:
    """RDTSC: EDX:EAX; privileged with CR4.TSD."""
    if cpu.cr4 & CR4_TSD:
        require_ring0(cpu)
    _to_edx_eax(cpu, tsc(cpu))


def rdpmc(cpu: Cpu) -> None:
    """RDPMC: there are no counters, so every index is invalid."""
    raise general_protection()


def rdmsr(cpu: Cpu) -> None:
    """RDMSR: EDX:EAX from the MSR in ECX."""
    require_ring0(cpu)
    _to_edx_eax(cpu, read_msr(cpu, cpu.regs[ECX]))


def wrmsr(cpu: Cpu) -> None:
    """WRMSR: EDX:EAX to the MSR in ECX."""
    require_ring0(cpu)
    write_msr(cpu, cpu.regs[ECX], cpu.regs[EDX] << 32 | cpu.regs[EAX])


def _to_edx_eax(cpu: Cpu, value: int) -> None:
    cpu.regs[EAX], cpu.regs[EDX] = value & 0xFFFFFFFF, value >> 32


def read_msr(cpu: Cpu, index: int) -> int:
    """The MSR's value; an unknown one is reported to the hooks, then #GP(0)."""
    apic = cpu.hooks.apic
    match index:
        case Msr.TSC:
            return tsc(cpu)
        case Msr.PLATFORM_ID | Msr.DEBUGCTL | Msr.MISC_FEATURES_ENABLES:
            return 0
        case Msr.APIC_BASE if apic is not None:
            return apic.base
        case Msr.FEATURE_CONTROL:
            return FEATURE_CONTROL_LOCKED
        case Msr.TSC_ADJUST:
            return cpu.tsc_adjust
        case Msr.BIOS_SIGN_ID:
            return cpu.model.microcode_revision << 32
        case Msr.PLATFORM_INFO:
            return round(cpu.model.tsc_hz / 100e6) << 8  # maximum non-turbo ratio
        case Msr.SYSENTER_CS:
            return cpu.sysenter_cs
        case Msr.SYSENTER_ESP:
            return cpu.sysenter_esp
        case Msr.SYSENTER_EIP:
            return cpu.sysenter_eip
        case Msr.MISC_ENABLE:
            return cpu.misc_enable
        case Msr.PAT:
            return cpu.pat
        case Msr.TSC_DEADLINE if apic is not None:
            return apic.read_tsc_deadline()
        case _:
            raise _unknown(cpu, index, is_write=False, value=0)


def write_msr(cpu: Cpu, index: int, value: int) -> None:
    """Set an MSR; #GP(0) for reserved bits and for an unknown MSR, which is reported first."""
    apic = cpu.hooks.apic
    match index:
        case Msr.TSC_DEADLINE if apic is not None:  # first: the tick of a tickless kernel
            apic.set_tsc_deadline(value, tsc(cpu))
        case Msr.TSC:
            _adjust_tsc(cpu, value - cpu.hooks.rdtsc())
        case Msr.TSC_ADJUST:
            _adjust_tsc(cpu, value)
        case Msr.APIC_BASE if apic is not None:
            if not apic.set_base(value):
                raise general_protection()
            cpu.hooks.flush_tlb(True)  # the page of its registers came, went or moved
        case Msr.BIOS_SIGN_ID:
            pass  # CPUID writes the revision back [vol. 3A 9.11.7.1]
        case Msr.SYSENTER_CS:
            cpu.sysenter_cs = value & 0xFFFFFFFF
            cpu.hooks.mode_changed()
        case Msr.SYSENTER_ESP:
            cpu.sysenter_esp = value & 0xFFFFFFFF
            cpu.hooks.mode_changed()
        case Msr.SYSENTER_EIP:
            cpu.sysenter_eip = value & 0xFFFFFFFF
            cpu.hooks.mode_changed()
        case Msr.MISC_ENABLE:
            if (value ^ cpu.misc_enable) & ~MISC_ENABLE_WRITABLE:
                raise general_protection()
            cpu.misc_enable = value
        case Msr.DEBUGCTL | Msr.MISC_FEATURES_ENABLES:
            if value:
                raise general_protection()
        case Msr.PAT:
            if any(value >> shift & 0xFF not in PAT_TYPES for shift in range(0, 64, 8)):
                raise general_protection()
            cpu.pat = value
        case Msr.PLATFORM_ID | Msr.FEATURE_CONTROL | Msr.PLATFORM_INFO:
            raise general_protection()  # read-only, or locked
        case _:
            raise _unknown(cpu, index, is_write=True, value=value)


def _adjust_tsc(cpu: Cpu, adjust: int) -> None:
    adjust &= MASK64
    if adjust == cpu.tsc_adjust:
        return
    cpu.tsc_adjust = adjust
    apic = cpu.hooks.apic
    deadline = 0 if apic is None else apic.read_tsc_deadline()
    if apic is not None and deadline:
        apic.set_tsc_deadline(deadline, tsc(cpu))  # the same TSC value comes at another time now
    cpu.hooks.mode_changed()


def _unknown(cpu: Cpu, index: int, is_write: bool, value: int) -> GuestFault:
    cpu.hooks.unknown_msr(index, is_write, value)
    return general_protection()

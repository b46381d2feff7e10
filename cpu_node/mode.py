"""The code mode: what a translation depends on besides its bytes. Part of every translation's key.

Bits say what departs from 32-bit kernel code with flat segments and a usable FPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node.descriptor import CS, DS, ES, SS
from cpu_node.flags import VM

if TYPE_CHECKING:
    from cpu_node.cpu import Cpu

USER = 0x01  # CPL 3
NO_FPU = 0x02  # CR0.EM or CR0.TS: x87, MMX and SSE go to the simulator, which raises #NM or #UD
NO_SSE = 0x04  # CR4.OSFXSR clear
TSC_SIMULATED = 0x08  # RDTSC needs the simulator (CR4.TSD at CPL 3, or an adjusted counter)
CODE16 = 0x10  # CS.D clear
STACK16 = 0x20  # SS.B clear
NOT_FLAT = 0x40  # CS, SS, DS or ES has a base or a limit
STEP = 0x80  # real or virtual-8086 mode, CPL 1 and 2, breakpoints without paging
WATCHED = 0x100  # breakpoints are armed: their pages are left to the simulator
SOFT = 0x200  # data by way of the software TLB (tlb.py) instead of a window; CPL 3 only
TSC_OFFSET = 0x400  # RDTSC adds the machine's offset, which isn't 0
INTERPRETED = CODE16 | STACK16 | NOT_FLAT | STEP  # no translation in this mode: the simulator runs it

FLAG_NAMES = ("user", "no-fpu", "no-sse", "tsc", "code16", "stack16", "not-flat", "step", "watched",
              "soft", "tsc-offset")


_TS_EM, _OSFXSR, _TSD, _PE, _PG = 0x0C, 0x200, 0x04, 0x01, 0x8000_0000  # of CR0, CR4, CR4, CR0, CR0


def of(cpu: Cpu, cpl: int) -> int:
    """The mode with the CPU's state as it is, but for the privilege level."""
    mode = USER if cpl == 3 else STEP if cpl else 0
    if cpu.cr0 & _TS_EM:
        mode |= NO_FPU
    if not cpu.cr4 & _OSFXSR:
        mode |= NO_SSE
    if cpu.tsc_adjust or (cpu.cr4 & _TSD and cpl):
        mode |= TSC_SIMULATED
    else:
        mode |= cpu.tsc_mode
    seg = cpu.seg
    code, stack, data, extra = seg[CS], seg[SS], seg[DS], seg[ES]
    if not code.big:
        mode |= CODE16
    if not stack.big:
        mode |= STACK16
    if not (code.flat and stack.flat and data.flat and extra.flat
            and stack.writable and data.writable and extra.writable):
        mode |= NOT_FLAT
    if not cpu.cr0 & _PE or cpu.eflags & VM:
        mode |= STEP
    elif cpu.dr[7] & 0xFF:
        mode |= WATCHED if cpu.cr0 & _PG else STEP
    return mode


def describe(mode: int) -> str:
    """'kernel', 'user+no-fpu', ..."""
    names = [name for bit, name in enumerate(FLAG_NAMES) if mode >> bit & 1]
    return "+".join(names) if names else "kernel"

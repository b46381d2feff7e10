"""The code mode: what a translation depends on besides its bytes. Part of every translation's key.

Bits say what departs from 32-bit kernel code with flat segments and a usable FPU.
"""

from __future__ import annotations

USER = 0x01  # CPL 3
NO_FPU = 0x02  # CR0.EM or CR0.TS: x87, MMX and SSE go to the simulator, which raises #NM or #UD
NO_SSE = 0x04  # CR4.OSFXSR clear
TSC_SIMULATED = 0x08  # RDTSC needs the simulator (CR4.TSD at CPL 3, or an adjusted counter)
CODE16 = 0x10  # CS.D clear
STACK16 = 0x20  # SS.B clear
NOT_FLAT = 0x40  # CS, SS, DS or ES has a base or a limit
STEP = 0x80  # EFLAGS.TF, an armed breakpoint, real or virtual-8086 mode
INTERPRETED = CODE16 | STACK16 | NOT_FLAT | STEP  # no translation in this mode: the simulator runs it

FLAG_NAMES = ("user", "no-fpu", "no-sse", "tsc", "code16", "stack16", "not-flat", "step")


def describe(mode: int) -> str:
    """'kernel', 'user+no-fpu', ..."""
    names = [name for bit, name in enumerate(FLAG_NAMES) if mode >> bit & 1]
    return "+".join(names) if names else "kernel"

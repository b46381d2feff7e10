"""RDTSC in translated code, where the machine's counter is the host's plus an offset.

A machine that was never paused has none, and executes RDTSC as it is. Otherwise mode.TSC_OFFSET is part of
the key of its translations, and the sum is made without touching the flags.
"""

from __future__ import annotations

import functools

from cpu_node import layout as at
from cpu_node.assembled import assemble

RDTSC = b"\x0f\x31"
OFFSET_FLAG = "bmi2"  # of the host, for RORX; without it the simulator executes RDTSC
SAVED_FROM = 6  # from here on in the host code EAX is in r10d and EDX in r11d


@functools.cache
def with_offset() -> bytes:
    """The host code. EAX and EDX are whole 32-bit registers at every instruction of it."""
    return assemble(
        f"""
        mov r10d, eax
        mov r11d, edx
        rdtsc
        rorx r8, rdx, 32
        lea r8, [r8+rax]
        mov r9, [r15+{at.TSC_OFFSET}]
        lea r8, [r8+r9]
        mov eax, r8d
        rorx r8, r8, 32
        mov edx, r8d
        """,
        0,
    )

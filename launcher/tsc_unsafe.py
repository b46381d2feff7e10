"""The frequency of the host's time-stamp counter, measured against CLOCK_MONOTONIC_RAW.

RDTSC needs machine code: a page with five instructions, called through ctypes. The guest is told this
frequency (CPUID leaf 15h), so that it calibrates nothing. Source: Intel SDM vol. 2B, RDTSC.
Left out: hosts whose counter is not invariant (the measurement is then of now only).
"""

from __future__ import annotations

import ctypes
import mmap
import time

# rdtsc ; shl rdx, 32 ; or rax, rdx ; ret
CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")
WINDOW_NS = 50_000_000  # between the two samples; an error of 100 ns in each is then 4e-6
TRIES = 20  # per sample: the one with the least time between the two clock reads around it counts


class TscClock:
    """Takes the first sample when made, the second when asked: do other work in between."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(CODE)
        self._entry = ctypes.c_char.from_buffer(self._page)
        self._rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(self._entry))
        self._first = self._sample()

    def frequency_hz(self) -> int:
        """Ticks per second; waits until WINDOW_NS have passed since the first sample."""
        start_ns, start_ticks = self._first
        wait_ns = start_ns + WINDOW_NS - _raw_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)
        end_ns, end_ticks = self._sample()
        return (end_ticks - start_ticks) * 1_000_000_000 // (end_ns - start_ns)

    def _sample(self) -> tuple[int, int]:
        """(clock in ns, counter) of one moment, as nearly as can be."""
        best: tuple[int, int, int] | None = None
        for _ in range(TRIES):
            before = _raw_ns()
            ticks = self._rdtsc()
            after = _raw_ns()
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2, ticks)
        assert best is not None
        return best[1], best[2]


def _raw_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)

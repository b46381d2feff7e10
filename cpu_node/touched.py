"""Which linear pages something was derived from: INVLPG of any other page has nothing to do.

A map has a byte for each linear page, 0 or 1. A space's own is marked by every page walk in it (windows, the
simulator's memory, user code); one map is marked by fetches of kernel code, whose dispatch tables all spaces
share. Assists look at both (assist_stubs.py). A mark is taken back where it is cheap to know that it may be.
"""

from __future__ import annotations

from cpu_node import host_unsafe as host
from cpu_node import layout as at

KERNEL_CODE = 0  # number of the map of kernel code; a space's is the number of its kernel window
_BIG = b"\1" * 1024


class Touched:
    """One map, zero at first."""

    def __init__(self, number: int) -> None:
        self.ha = at.TOUCHED + number * at.TOUCHED_SIZE
        host.map_anonymous(self.ha, at.TOUCHED_SIZE, host.PROT_READ | host.PROT_WRITE)
        self.pages = host.view8(self.ha, at.TOUCHED_SIZE)

    def mark(self, va: int, size: int) -> None:
        """Something is derived from the translation of `va`, by an entry for `size` bytes."""
        if not self.pages[va >> 12]:
            if size == 1 << 12:
                self.pages[va >> 12] = 1
            else:
                self.mark_big(va >> 22, 1)

    def mark_big(self, va_big: int, count: int) -> None:
        """The same for `count` pages of 4 MiB."""
        self.pages[va_big << 10 : va_big + count << 10] = _BIG * count

    def close(self) -> None:
        """Give the memory back."""
        self.pages.release()
        host.unmap(self.ha, at.TOUCHED_SIZE)

"""Which pages of RAM hold translated code, for devices that write memory.

The memory node's region "code": a byte for each page of RAM, then, in a page of its own, a stamp of 8 bytes.
The CPU node sets HOLDS where translations of a page depend on its bytes. A device looks at the bytes of the
pages that it has written; where one holds code it adds WRITTEN and gives the stamp a new value. That comes
before the device's interrupt, so it needs no message: the CPU node looks at the stamp whenever anything
arrives. Why so: docs/decisions/050-dma-and-translated-code.md.
Left out: a guest that runs code which a device is writing at that moment.
"""

from __future__ import annotations

import re
import time

REGION = "code"
PAGE = 4096
HOLDS, WRITTEN = 1, 2
_MARKED = rb"[\2\3]"


def size_of(memory_size: int) -> int:
    """Bytes of the region for so much RAM."""
    return -(-memory_size // PAGE // PAGE) * PAGE + PAGE


class CodeMap:
    """Either side's view of the region."""

    def __init__(self, region: memoryview) -> None:
        self.pages = region[:-PAGE]
        self._stamp = region[-PAGE:].cast("Q")
        self._seen = self._stamp[0]

    def written(self, pa: int, size: int) -> None:
        """A device has written these bytes of RAM."""
        first, end = pa // PAGE, (pa + size - 1) // PAGE + 1
        held = bytes(self.pages[first:end])
        if any(held):
            for page, byte in enumerate(held, first):
                if byte:
                    self.pages[page] |= WRITTEN
            self._stamp[0] = time.monotonic_ns()

    def news(self) -> bool:
        """Whether a device has said something since this was asked last."""
        stamp = self._stamp[0]
        new = stamp != self._seen
        self._seen = stamp
        return new

    def marked(self) -> list[int]:
        """Pages that are WRITTEN."""
        return [found.start() for found in re.finditer(_MARKED, bytes(self.pages))]

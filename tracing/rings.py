"""A ring that is being written (bus/recorder.py), read from outside: its writer knows nothing of it.

What was overwritten while it was copied is left out, and counted as lost.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from bus.recorder import BLOCK, H_BLOCKS, H_MAGIC, H_ON, H_TAIL, H_VERSION, MAGIC, PAGE, VERSION, BadRing


class Ring:
    """The reading side of one ring. Positions count bytes since the ring was made."""

    def __init__(self, name: str, fd: int, writable: bool = False) -> None:
        """`fd` stays the caller's; `writable`: for switch(). Raises BadRing."""
        size = os.fstat(fd).st_size
        if size < PAGE:
            raise BadRing(f"{name}: a trace ring is too short")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.name = name
        self._bytes = memoryview(mmap.mmap(fd, size, prot=access))
        self._words = self._bytes.cast("Q")
        if (self._words[H_MAGIC], self._words[H_VERSION]) != (MAGIC, VERSION):
            raise BadRing(f"{name}: no trace ring of version {VERSION}")
        self._size = self._words[H_BLOCKS] * BLOCK
        if self._size + PAGE != size:
            raise BadRing(f"{name}: a trace ring of another size than it says")

    @property
    def tail(self) -> int:
        """Position behind the last record."""
        return self._words[H_TAIL]

    @property
    def oldest(self) -> int:
        """Position of the first block that can still be read."""
        return max(0, self.tail // BLOCK * BLOCK + BLOCK - self._size)

    @property
    def on(self) -> bool:
        return self._words[H_ON] != 0

    def switch(self, on: bool) -> None:
        """Have its writer record, or not; it looks now and then."""
        self._words[H_ON] = int(on)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(position, bytes) from position `begin` to `end`, no piece beyond a block. Positions that are
        skipped were overwritten."""
        while begin < end:
            begin = max(begin, self.oldest)
            upto = min(end, begin - begin % BLOCK + BLOCK)
            offset = PAGE + begin % self._size
            data = bytes(self._bytes[offset : offset + upto - begin])
            if begin >= self.oldest and data:
                yield begin, data
            begin = upto

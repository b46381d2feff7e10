"""Guest memory as devices see it: bytes by physical address, from 0 to the end of RAM.

Left out: an IOMMU; RAM above 4 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence

from bus.codemap import CodeMap
from devices.base import BadDma

Segments = Sequence[tuple[int, int]]  # pa, size


class GuestRam:
    """Reads and writes; BadDma for what is not all RAM. `code`: whom to tell of writes."""

    def __init__(self, ram: memoryview, code: CodeMap | None = None) -> None:
        self._ram = ram
        self._code = code

    def check(self, pa: int, size: int) -> None:
        if pa < 0 or size < 0 or pa + size > len(self._ram):
            raise BadDma(f"{size} bytes at {pa:#x} are not all in RAM, which ends at {len(self._ram):#x}")

    def read(self, pa: int, size: int) -> bytes:
        self.check(pa, size)
        return bytes(self._ram[pa : pa + size])

    def write(self, pa: int, data: bytes) -> None:
        self.check(pa, len(data))
        self._ram[pa : pa + len(data)] = data
        self.written(((pa, len(data)),))

    def written(self, segments: Segments) -> None:
        """Say that these bytes are new."""
        if self._code is not None:
            for pa, size in segments:
                if size:
                    self._code.written(pa, size)

    def views(self, segments: Segments) -> list[memoryview]:
        """The segments themselves, for preadv and pwritev."""
        for pa, size in segments:
            self.check(pa, size)
        return [self._ram[pa : pa + size] for pa, size in segments if size]

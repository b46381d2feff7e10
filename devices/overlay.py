"""A disk of a restored machine: what the guest writes goes into an overlay, the file stays as it is.

The overlay is a sparse file: as long as the disk, rounded up to pages, what was written lies where it lies on
the disk; behind that a bit for each sector says that it was. Data comes before its bits: a process that is
killed in between loses writes that nobody was told of. The overlay outlives processes, not the machine.
Left out: growth, discard, merging an overlay into its file.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
SECTOR = 512
IOV_MAX = 1024


def overlay_size(disk_size: int) -> int:
    """Bytes of the overlay of a disk, data and bits."""
    return _bits_at(disk_size) + _pages(-(-disk_size // SECTOR // 8))


class Overlay:
    """The sectors of one disk that were written. Offsets and lengths are whole sectors."""

    def __init__(self, path: str | Path, disk_size: int) -> None:
        """Made if it is not there. Raises OSError; ValueError if it is another disk's."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size, found = overlay_size(disk_size), os.fstat(self._fd).st_size
        if found not in (0, size):
            os.close(self._fd)
            raise ValueError(f"{path} has {found} bytes, an overlay of this disk has {size}")
        os.ftruncate(self._fd, size)
        at = _bits_at(disk_size)
        self._bits = mmap.mmap(self._fd, size - at, offset=at)

    def close(self) -> None:
        self._bits.close()
        os.close(self._fd)

    def patch(self, offset: int, views: list[memoryview]) -> None:
        """Views hold what the disk's file has from `offset` on: put in what was written since. OSError."""
        length = sum(map(len, views))
        for start, end in self._runs(offset // SECTOR, -(-(offset + length) // SECTOR)):
            first, last = max(start * SECTOR, offset), min(end * SECTOR, offset + length)
            self._read(first, _part(views, first - offset, last - offset))

    def write(self, offset: int, views: list[memoryview]) -> None:
        """OSError; then some of it may be written."""
        first, length = offset, sum(map(len, views))
        if first % SECTOR or length % SECTOR:
            raise OSError(errno.EINVAL, f"{length} bytes at {first} are no whole sectors")
        while views:
            done = os.pwritev(self._fd, views[:IOV_MAX], offset)
            views, offset = _part(views, done, sum(map(len, views))), offset + done
        self._set(first // SECTOR, -(-(first + length) // SECTOR))

    def _read(self, offset: int, views: list[memoryview]) -> None:
        while views:
            done = os.preadv(self._fd, views[:IOV_MAX], offset)
            views, offset = _part(views, done, sum(map(len, views))), offset + done

    def _set(self, first: int, end: int) -> None:
        bits = self._bits
        while first < end:
            if first % 8 == 0 and end - first >= 8:
                whole = (end - first) // 8
                bits[first // 8 : first // 8 + whole] = b"\xff" * whole
                first += 8 * whole
            else:
                bits[first // 8] |= 1 << first % 8
                first += 1

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(first, behind the last) of the sectors in the range that were written."""
        low = first // 8
        here = int.from_bytes(self._bits[low : -(-end // 8)], "little")
        here = here >> first % 8 & (1 << end - first) - 1
        at = first
        while here:
            skip = (here & -here).bit_length() - 1
            here, at = here >> skip, at + skip
            run = (~here & here + 1).bit_length() - 1
            yield at, at + run
            here, at = here >> run, at + run


def _part(views: list[memoryview], start: int, end: int) -> list[memoryview]:
    """Bytes start..end of the views together."""
    out, at = [], 0
    for view in views:
        a, b = max(start - at, 0), min(end - at, len(view))
        if a < b:
            out.append(view[a:b])
        at += len(view)
    return out


def _pages(size: int) -> int:
    return size + -size % PAGE


def _bits_at(disk_size: int) -> int:
    return _pages(disk_size)

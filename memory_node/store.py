"""The files that are the machine's physical memory: one per region.

A region is a memfd (sealed against a change of size, so that no holder of a descriptor can take pages
away under the others), or a file the user named. Access here goes through pread/pwrite, never through
a mapping: the first touch of a mapped page costs ten times a page's copy (DESIGN section 2).
In a machine the launcher opens them and keeps them open, so that they outlive the memory node's process.
Left out: huge pages, NUMA placement.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from memory_node.regions import PAGE, Kind, Region, check_regions

CHUNK = 1 << 20
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class BadAccess(ValueError):
    """A request beyond a region, or for one that is not there."""


def write_pieces(fd: int, size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Write (offset, data) pairs into a region's file of so many bytes."""
    for offset, data in pieces:
        if offset < 0 or offset + len(data) > size:
            raise BadAccess(f"{offset:#x}+{len(data):#x} is beyond its {size:#x} bytes")
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done


class Store:
    """Has every region's file, and opens those that it is not given; owns the descriptors."""

    def __init__(self, machine: str, regions: list[Region], given: Mapping[str, int] | None = None) -> None:
        """`given`: descriptors of what is there already, by region; they are the store's then."""
        check_regions(regions)
        given = given or {}
        self.regions = regions
        self._by_name = {r.name: r for r in regions}
        self._fds = {
            r.name: given[r.name] if r.name in given else open_region(machine, r)
            for r in regions
            if r.kind is not Kind.RESERVED
        }

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def region(self, name: str) -> Region:
        if name not in self._by_name:
            raise BadAccess(f"no region {name!r}, there are: {', '.join(self._by_name)}")
        return self._by_name[name]

    def fd(self, name: str) -> int:
        region = self.region(name)
        if name not in self._fds:
            raise BadAccess(f"region {name!r} is {region.kind}, it has no bytes")
        return self._fds[name]

    def grant(self, name: str, writable: bool) -> int:
        """A new descriptor for another process; a read-only one cannot be mapped writable."""
        fd = self.fd(name)
        if not writable:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        if self.region(name).kind is Kind.ROM:
            raise BadAccess(f"region {name!r} is ROM, it is granted for reading only")
        return os.dup(fd)

    def read(self, name: str, offset: int, size: int) -> bytes:
        fd = self.fd(name)
        self._check_range(name, offset, size)
        return b"".join(self._parts(fd, offset, size))

    def write(self, name: str, offset: int, data: bytes) -> None:
        fd = self.fd(name)
        self._check_range(name, offset, len(data))
        write_pieces(fd, self.region(name).size, [(offset, data)])

    def load_file(self, name: str, offset: int, path: Path) -> int:
        """Copy a whole file to `offset`; its size."""
        fd = self.fd(name)
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            self._check_range(name, offset, size)
            os.lseek(fd, offset, os.SEEK_SET)
            left = size
            while left:
                if not (done := os.sendfile(fd, source.fileno(), None, left)):
                    raise BadAccess(f"{path} became shorter while it was read")
                left -= done
        return size

    def dump(self, name: str, path: Path) -> int:
        """Copy a whole region into a new file, leaving holes where nothing was ever written; its size."""
        fd, size = self.fd(name), self.region(name).size
        with path.open("xb") as target:
            target.truncate(size)
            for start, end in data_extents(fd, size):
                for at in range(start, end, CHUNK):
                    os.pwrite(target.fileno(), os.pread(fd, min(CHUNK, end - at), at), at)
        return size

    def bytes_in_use(self, name: str) -> int:
        """Host memory (or disk blocks) behind the region."""
        return os.fstat(self.fd(name)).st_blocks * 512

    def _check_range(self, name: str, offset: int, size: int) -> None:
        whole = self.region(name).size
        if offset < 0 or size < 0 or offset + size > whole:
            raise BadAccess(f"{name}: {offset:#x}+{size:#x} is beyond its {whole:#x} bytes")

    @staticmethod
    def _parts(fd: int, offset: int, size: int) -> Iterator[bytes]:
        while size:
            part = os.pread(fd, min(size, CHUNK), offset)
            yield part
            offset, size = offset + len(part), size - len(part)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end), page-aligned, of what was ever written in a sparse file; the rest reads as zeros."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # no data after `at`
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)  # some file systems count in less than pages
        start, at = max(at, start - start % PAGE), min(end + -end % PAGE, size)
        yield start, at


def open_region(machine: str, region: Region) -> int:
    """A region's file, all zeros: its descriptor. BadAccess, OSError where it can't be had."""
    return _open_file(region) if region.file else open_memfd(f"{machine}-{region.name}", region.size)


def open_memfd(name: str, size: int) -> int:
    """Anonymous memory whose size nobody can change."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def _open_file(region: Region) -> int:
    """The user's file, emptied: RAM holds zeros at power-on. The lock keeps a second machine out."""
    assert region.file is not None
    fd = os.open(region.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise BadAccess(f"{region.file} is another machine's memory") from e
    os.ftruncate(fd, 0)
    os.ftruncate(fd, region.size)
    return fd

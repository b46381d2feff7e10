"""A cpio archive in "newc" form, as the Linux kernel unpacks it into its first root file system.

Source: Documentation/driver-api/early-userspace/buffer-format.rst. The same entries give the same bytes:
inode numbers count from 1 and all times are 0. Left out: hard links, sockets, block devices.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
BLOCK = 512


@dataclass(slots=True)
class Archive:
    """Entries are added in order (a directory before what is in it); `bytes()` ends the archive."""

    _out: bytearray = field(default_factory=bytearray)
    _count: int = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._entry(path, stat.S_IFDIR | mode, links=2)

    def file(self, path: str, data: bytes, mode: int = 0o755) -> None:
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def __bytes__(self) -> bytes:
        whole = self._out + _record(0, TRAILER, 0, b"", 1, (0, 0))
        return bytes(whole + bytes(-len(whole) % BLOCK))

    def _entry(
        self, path: str, mode: int, data: bytes = b"", links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._count += 1
        self._out += _record(self._count, path.lstrip("/"), mode, data, links, device)


def _record(inode: int, name: str, mode: int, data: bytes, links: int, device: tuple[int, int]) -> bytes:
    raw = name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize maj min rmaj rmin namesize chksum
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw), 0)
    head = MAGIC + b"".join(b"%08X" % value for value in fields) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)

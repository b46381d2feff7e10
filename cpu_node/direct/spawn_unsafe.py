"""Starts the process of a child, and the shared list through which it is told what to map.

Preconditions: Linux; the calling thread is the one that will trace and wait, and lives as long as the
machine (the kernel kills the child when it ends). The file executed lives in memory.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import struct

from cpu_node.direct import image

RAM_FD, LIST_FD = 0, 1  # in the child; LIST_FD until the list is mapped
_ENTRY = struct.Struct("<7Q8x")
_FIRST_FD = 10  # descriptors of ours that the child's own must not collide with


class CallList:
    """System calls for a child to make, in memory that it can only read."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("backplane-list", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, image.LIST_SIZE)
        self._view = mmap.mmap(self.fd, image.LIST_SIZE)

    def write(self, calls: list[tuple[int, ...]]) -> None:
        """`calls`: (number, up to six arguments), LIST_CAPACITY at most."""
        for index, call in enumerate(calls):
            _ENTRY.pack_into(self._view, index * image.LIST_ENTRY, *call, *(0,) * (7 - len(call)))

    def write_bytes(self, offset: int, data: bytes) -> int:
        """Put bytes into the list's memory; the address the child sees them at."""
        self._view[offset : offset + len(data)] = data
        return image.LIST + offset

    def close(self) -> None:
        """Give both back; a child keeps its mapping."""
        self._view.close()
        os.close(self.fd)


class Program:
    """The executable, kept for all children of this process."""

    def __init__(self, data: bytes) -> None:
        self.fd = os.memfd_create("backplane-child", os.MFD_CLOEXEC)
        os.write(self.fd, data)

    def spawn(self, ram_fd: int, list_fd: int) -> int:
        """A process with these two descriptors and no others; its pid. Raises OSError."""
        ram = fcntl.fcntl(ram_fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
        calls = fcntl.fcntl(list_fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
        try:
            return os.posix_spawn(
                f"/proc/self/fd/{self.fd}",
                ["backplane guest"],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, ram, RAM_FD), (os.POSIX_SPAWN_DUP2, calls, LIST_FD),
                              (os.POSIX_SPAWN_CLOSE, 2)],
                setsigmask=(),
                setsigdef=tuple(s for s in signal.valid_signals()
                                if s not in (signal.SIGKILL, signal.SIGSTOP)),
            )
        finally:
            os.close(ram)
            os.close(calls)

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
from collections.abc import Sequence

from cpu_node.direct import image

RAM_FD, LIST_FD, FRAME_FD = range(3)  # in the child; the list's and the frame's until they are mapped
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

    def spawn(self, fds: Sequence[int]) -> int:
        """A process with these descriptors, as 0, 1, ..., and no others; its pid. Raises OSError."""
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD) for fd in fds]
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(ours)]
        try:
            return os.posix_spawn(
                f"/proc/self/fd/{self.fd}",
                ["backplane guest"],
                {},
                file_actions=[*actions, *((os.POSIX_SPAWN_CLOSE, fd) for fd in range(len(fds), 3))],
                setsigmask=(),
                setsigdef=tuple(s for s in signal.valid_signals()
                                if s not in (signal.SIGKILL, signal.SIGSTOP)),
            )
        finally:
            for fd in ours:
                os.close(fd)

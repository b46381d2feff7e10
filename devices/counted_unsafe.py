"""Sends and receives of which the kernel itself notes how much they did, in memory that outlives the process.

A process that is killed right after send() has told nobody how many bytes went. sendmmsg(2) and recvmmsg(2)
write that number into the memory of their caller before they return to it; a signal that kills is acted on
after that. Where that memory is shared, a successor reads there what its predecessor has not lived to say.
Also fallocate(2), which takes away pages of a file that nobody will read again.
Linux x86-64: struct mmsghdr is a msghdr of 56 bytes, a 32-bit count and 4 bytes of padding [recvmmsg(2)].
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

NOTE_SIZE = 96  # bytes of memory for a Counted; a new one's are zero
MSG_DONTWAIT, MSG_NOSIGNAL = 0x40, 0x4000
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_NOTHING = 0xFFFF_FFFF  # a count that no call gives
_POSITION, _COUNT = 0, 88 // 4  # the first in units of 8 bytes, the second of 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_libc.recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class _Vector(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Vector)), ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t), ("flags", ctypes.c_int),
    )  # fmt: skip


class Counted:
    """Calls about a stream of bytes, each with the position in it that the call begins at.

    One call is noted at a time: whoever calls has used the count of the one before.
    """

    def __init__(self, note: memoryview) -> None:
        """`note`: NOTE_SIZE bytes, 8-byte aligned."""
        assert len(note) == NOTE_SIZE
        self._words, self._halves = note.cast("Q"), note.cast("I")
        self._message = _Message.from_buffer(note[32:88])
        self._header = ctypes.addressof(self._message)
        self._vector = _Vector()

    def send(self, sock: int, position: int, data: bytes) -> int | None:
        """How many bytes of `data`, which must not be empty, were sent; None: it would have to wait.
        OSError."""
        buffer = ctypes.c_char_p(data)
        self._vector.base, self._vector.length = ctypes.cast(buffer, ctypes.c_void_p), len(data)
        flags = MSG_DONTWAIT | MSG_NOSIGNAL
        return self._call(position, lambda header: _libc.sendmmsg(sock, header, 1, flags))

    def receive(self, sock: int, position: int, area: memoryview) -> int | None:
        """How many bytes came into `area`, which must not be empty; 0: the stream has ended; None: it would
        have to wait. OSError."""
        self._vector.base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self._vector.length = len(area)
        return self._call(position, lambda header: _libc.recvmmsg(sock, header, 1, MSG_DONTWAIT, None))

    def done(self, position: int) -> int:
        """How many bytes a call at this position did, of a process that may have ended since; 0 if none."""
        count = self._halves[_COUNT]
        return count if self._words[_POSITION] == position and count != _NOTHING else 0

    def _call(self, position: int, call: Callable[[int], Any]) -> int | None:
        self._halves[_COUNT] = _NOTHING  # first: what is noted of another call is not this one's
        self._words[_POSITION] = position
        message = self._message
        ctypes.memset(self._header, 0, ctypes.sizeof(message))
        message.vectors, message.vector_count = ctypes.pointer(self._vector), 1
        if call(self._header) == 1:
            return self._halves[_COUNT]
        number = ctypes.get_errno()
        if number in (errno.EAGAIN, errno.EINTR):
            return None
        raise OSError(number, os.strerror(number))


def punch(fd: int, start: int, end: int) -> None:
    """Take away the pages of a file between two offsets; they read as zeros. OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

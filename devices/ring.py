"""Rings: the bytes of a device's channel on their way between its process and the rim (devices/rim.py).

They lie in a memfd, which outlives either process. One process puts, one takes. Positions are absolute: bytes
ever put (`tail`) and ever taken (`head`), so that a process can do its last write again and change nothing.
Who waits for the other says so in `waiting`, before the system call that wakes the other: that orders the
two, and no wake-up is lost. Left out: several writers, growing.
"""

from __future__ import annotations

import contextlib
import mmap
import os

HEADER = 4096  # bytes before the ring's own; each word in a cache line of its own
OUTPUT, INPUT = 1 << 20, 64 << 10  # bytes
PIECES = 4  # at most a ring's fourth is put at once: what lies behind that in `back` is sound
MAGIC = 0x31474E5252504B42  # "BKPRRNG1"
_MAGIC, _SIZE, _TAIL, _HEAD, _WAITING = 0, 1, 8, 16, 24  # words of 8 bytes, little endian


class BadRing(RuntimeError):
    """A memory that is no ring, or positions that can't be."""


class Ring:
    """A ring in `memory`: HEADER bytes, then as many as it holds. New memory is all zero."""

    def __init__(self, memory: memoryview) -> None:
        self.size = len(memory) - HEADER
        self._words = memory[:HEADER].cast("Q")
        self._bytes = memory[HEADER:]
        if (self._words[_MAGIC], self._words[_SIZE]) not in ((0, 0), (MAGIC, 0), (MAGIC, self.size)):
            raise BadRing("not a ring of this version and size")
        self._words[_MAGIC] = MAGIC
        self._words[_SIZE] = self.size

    @property
    def tail(self) -> int:
        """Bytes ever put. Set it after `write_at`, once the bytes are there."""
        return self._words[_TAIL]

    @tail.setter
    def tail(self, position: int) -> None:
        self._words[_TAIL] = position

    @property
    def head(self) -> int:
        """Bytes ever taken. Setting it gives their room back."""
        return self._words[_HEAD]

    @head.setter
    def head(self, position: int) -> None:
        self._words[_HEAD] = position

    @property
    def waiting(self) -> bool:
        """Who puts waits for room, and wants to be woken when there is some. It alone sets this."""
        return bool(self._words[_WAITING])

    @waiting.setter
    def waiting(self, waits: bool) -> None:
        self._words[_WAITING] = waits

    def used(self) -> int:
        """Bytes that are put and not taken."""
        used = self.tail - self.head
        if not 0 <= used <= self.size:
            raise BadRing(f"head {self.head}, tail {self.tail} in a ring of {self.size} bytes")
        return used

    def room(self) -> int:
        """Bytes that can be put now."""
        return self.size - self.used()

    def write_at(self, position: int, data: bytes) -> None:
        """Copy bytes to where those of this position belong; they count when `tail` is set."""
        at = position % self.size
        first = min(len(data), self.size - at)
        self._bytes[at : at + first] = data[:first]
        self._bytes[: len(data) - first] = data[first:]

    def put(self, data: bytes) -> bytes:
        """Put as much as there is room for, and no more than a fourth of the ring; what is left over."""
        piece = data[: min(self.room(), self.size // PIECES)]
        if piece:
            tail = self.tail
            self.write_at(tail, piece)
            self.tail = tail + len(piece)
        return data[len(piece) :]

    def peek(self, most: int) -> bytes:
        """Up to `most` bytes from `head` on; they stay."""
        return self._at(self.head, min(most, self.used()))

    def back(self, most: int) -> bytes:
        """Up to `most` of the bytes before `head` that are still there, though others are being put."""
        head = self.head
        start = max(0, head - most, self.tail - self.size)
        data = self._at(start, max(0, head - start))
        sound = max(0, self.tail - self.size + self.size // PIECES)
        return data[max(0, sound - start) :]

    def _at(self, position: int, length: int) -> bytes:
        at = position % self.size
        first = min(length, self.size - at)
        return bytes(self._bytes[at : at + first]) + bytes(self._bytes[: length - first])


class ChannelRings:
    """Both rings of a channel in one memfd, whose descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        length = 2 * HEADER + OUTPUT + INPUT
        if os.fstat(fd).st_size != length:
            raise BadRing("not the rings of a channel: the size is wrong")
        memory = memoryview(mmap.mmap(fd, length))
        self.output = Ring(memory[: HEADER + OUTPUT])
        self.input = Ring(memory[HEADER + OUTPUT :])

    @staticmethod
    def make(name: str) -> int:
        """Empty ones: their descriptor."""
        fd = os.memfd_create(f"{name}.rings", os.MFD_CLOEXEC)
        os.ftruncate(fd, 2 * HEADER + OUTPUT + INPUT)
        return fd


def make_wake() -> int:
    """An eventfd to wake a process with: its descriptor."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def wake(fd: int) -> None:
    """Wake who waits for this eventfd; once is as good as often."""
    os.eventfd_write(fd, 1)


def woken(fd: int) -> None:
    """Take the wake-ups that have come; none may have."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)

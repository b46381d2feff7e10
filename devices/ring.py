"""Rings: the bytes of a device's channel on their way between its process and the rim (devices/rim.py).

They lie in a memfd, which outlives either process. One process puts, one takes. Positions are absolute: bytes
ever put (`tail`) and ever taken (`head`), so that a process can do its last write again and change nothing.
Who waits for the other says so in `waiting`, before the system call that wakes the other: that orders the
two, and no wake-up is lost. Who takes and is in no hurry says `lazy`. Left out: several writers, growing.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from devices.counted_unsafe import NOTE_SIZE
from devices.history import History

HEADER = 4096  # bytes before the ring's own; each word in a cache line of its own
OUTPUT, INPUT = 1 << 20, 64 << 10  # bytes
PIECES = 4  # at most a ring's fourth is put at once
RIM_PAGE = 4096  # bytes of the rim's own, behind the rings
NOTE = 1024  # where in them the note of the last input lies (devices/counted_unsafe.py)
MAPPED = 2 * HEADER + OUTPUT + INPUT + RIM_PAGE
HISTORY = 2 << 20  # where in the file it begins (devices/history.py)
FILE_SIZE = 1 << 50  # what is never written takes no memory
MAGIC = 0x32474E5252504B42  # "BKPRRNG2"
_MAGIC, _SIZE, _TAIL, _HEAD, _WAITING, _LAZY = 0, 1, 8, 16, 24, 32  # words of 8 bytes, little endian


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

    @property
    def lazy(self) -> bool:
        """Who takes need not be woken before half of the ring is used. It alone sets this."""
        return bool(self._words[_LAZY])

    @lazy.setter
    def lazy(self, is_lazy: bool) -> None:
        self._words[_LAZY] = is_lazy

    def hurries(self) -> bool:
        """Whether who takes is to be woken for what has been put."""
        return not self._words[_LAZY] or self.used() > self.size // 2

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

    def area(self) -> memoryview:
        """Where the next bytes belong, as far as there is room in one piece: for who writes them in place."""
        at = self.tail % self.size
        return self._bytes[at : min(self.size, at + self.room())]

    def _at(self, position: int, length: int) -> bytes:
        at = position % self.size
        first = min(length, self.size - at)
        return bytes(self._bytes[at : at + first]) + bytes(self._bytes[: length - first])


class ChannelRings:
    """Both rings of a channel in one memfd, whose descriptor stays the caller's, and what the rim needs
    besides."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != FILE_SIZE:
            raise BadRing("not the rings of a channel: the size is wrong")
        memory = memoryview(mmap.mmap(fd, MAPPED))
        at_input, at_page = HEADER + OUTPUT, 2 * HEADER + OUTPUT + INPUT
        self.output = Ring(memory[:at_input])
        self.input = Ring(memory[at_input:at_page])
        page = memory[at_page:]
        self.history = History(fd, HISTORY, page[:8])
        self.note = page[NOTE : NOTE + NOTE_SIZE]

    @staticmethod
    def make(name: str) -> int:
        """Empty ones: their descriptor."""
        fd = os.memfd_create(f"{name}.rings", os.MFD_CLOEXEC)
        os.ftruncate(fd, FILE_SIZE)
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

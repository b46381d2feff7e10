"""Recorder: what one thread of a process does, noted in a ring of memory that outlives the process.

A ring is a memfd that the launcher makes (launcher/recording.py) and anybody may read at any time
(tracing/rings.py): the writer waits for nobody and overwrites what is oldest. Nothing is merged or parsed
here: a frame is noted as the bytes that came, with the times it was taken and done with. Who takes a frame
notes it; its header says when it was sent. Layouts of the records are at the end.

The ring is a page of header and BLOCK-sized blocks, used round and round. A position counts bytes since the
ring was made. Records don't cross blocks; a block's rest without a record begins with 8 zeros. The oldest
block that can be relied on is the one behind the block that is being written. Each block begins with the
number of records before it, so what was overwritten can be counted.
Figures: docs/decisions/071-rings-of-raw-records.md.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

PAGE = 4096  # of header, before the blocks
BLOCK = 1 << 16
DATA_MAX = 1 << 14  # bytes of a frame that are noted; of a longer one the beginning
MAGIC = 0x4345_5254_4C50_4B42  # "BKPLTREC"
VERSION = 1
# Words of the header, 8 bytes each.
H_MAGIC, H_VERSION, H_BLOCKS, H_TAIL, H_ON, H_COUNT = range(6)
now_ns = time.monotonic_ns


class HasCr3(Protocol):
    cr3: int


class Instruction(Protocol):
    """The instruction of the guest that is being done: its address, and CR3."""

    at: int

    @property
    def cpu(self) -> HasCr3: ...


class BadRing(ValueError):
    """Memory that is no ring of this version."""


def make(name: str, blocks: int, on: bool = True) -> int:
    """A new ring of `blocks` blocks, at least 4: its descriptor. Pages that are never written cost nothing.
    `on`: it is recorded to from the start."""
    assert blocks >= 4
    fd = os.memfd_create(f"trace:{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE + blocks * BLOCK)
    os.pwrite(fd, struct.pack("<5Q", MAGIC, VERSION, blocks, 0, on), 0)
    return fd


def attached(fds: Mapping[str, int], title: str, name: str = "trace") -> Recorder | None:
    """The writer of the ring that a process was given under this name, if it was. BadRing."""
    return Recorder(fds[name], title) if name in fds else None


class Recorder:
    """The writing side. One thread; a successor's begins when that of the process before it has ended."""

    __slots__ = ("_at", "_base", "_bytes", "_count", "_cr3", "_end", "_halves", "_last", "_size", "_words",
                 "on")  # fmt: skip

    def __init__(self, fd: int, title: str) -> None:
        """`fd`: of make(), stays the caller's. `title`: of the process. Raises BadRing."""
        size = os.fstat(fd).st_size
        if size < PAGE + 4 * BLOCK:
            raise BadRing("a trace ring is too short")
        self._bytes = memoryview(mmap.mmap(fd, size))
        words = self._words = self._bytes.cast("Q")
        self._halves = self._bytes.cast("I")
        if (words[H_MAGIC], words[H_VERSION]) != (MAGIC, VERSION) or PAGE + words[H_BLOCKS] * BLOCK != size:
            raise BadRing(f"no trace ring of version {VERSION}")
        self._size = words[H_BLOCKS] * BLOCK
        tail = words[H_TAIL]
        self._at = PAGE + tail % self._size  # where the next record goes, in the file
        self._base = tail - self._at  # added to an offset in the file it gives the position
        self._end = self._at - (self._at - PAGE) % BLOCK + BLOCK  # of the block
        self._cr3 = -1
        self._last = 0  # where the last ACCESS is, in the file
        self._count = words[H_COUNT]
        self.on = bool(words[H_ON])
        begin = self._end - BLOCK
        if self._at == begin:
            self._at = self._begin_block(begin)
        while (begin := begin + 8 * (words[begin >> 3] & 0xFFFF)) < self._at:  # a process before us
            self._count += words[begin >> 3] >> 16 & 0xFF != SPACE
        self.long(PROCESS, os.getpid(), title, now_ns())

    def look(self) -> bool:
        """Whether it is switched on by now, also in `on`."""
        self.on = self._words[H_ON] != 0
        return self.on

    def frame(self, peer: bytes, data: bytes, taken_ns: int) -> int:
        """A frame was taken from `peer`; returns what `done` wants when all it asked for is done."""
        kept = data if len(data) <= DATA_MAX else data[:DATA_MAX]
        name = len(peer)
        size = 24 + name + len(kept) + 7 >> 3
        at = self._at
        if at + 8 * size > self._end:
            at = self._next_block()
        buffer = self._bytes
        _FRAME(buffer, at, size, FRAME, name, len(data), taken_ns, 0)
        buffer[at + 24 : at + 24 + name + len(kept)] = peer + kept
        self._at = end = at + 8 * size
        self._count += 1
        self._words[H_TAIL] = self._base + end
        return at + 16 >> 3

    def done(self, place: int) -> None:
        """All that the step of `frame`, `step` or `disk` asked for is done."""
        self._words[place] = now_ns()

    def access(self, flags: int, instruction: Instruction, address: int, value: int) -> int:
        """The guest accesses a register. `flags`: see ACCESS; `value`: 0 for a read, and what is returned is
        for `value`."""
        at = self._at
        if at + 40 > self._end:
            at = self._next_block()
        if instruction.cpu.cr3 != self._cr3:
            self._cr3 = instruction.cpu.cr3
            _SHORT(self._bytes, at, 2, SPACE, 0, self._cr3, now_ns())
            at += 16
        _ACCESS(self._bytes, at, 3, ACCESS, flags, instruction.at, address, value, now_ns())
        self._last = at
        self._at = end = at + 24
        self._count += 1
        self._words[H_TAIL] = self._base + end
        return at + 12 >> 2

    def told(self) -> None:
        """The last access was answered by the mirror, and its device is told of it with the next batch."""
        if self._last:
            self._bytes[self._last + 3] |= TOLD

    def value(self, place: int, value: int) -> None:
        """What was read."""
        self._halves[place] = value

    def short(self, kind: int, flags: int, value: int) -> None:
        """A record of 16 bytes, with the time: VECTOR, EOI."""
        at = self._at
        if at + 16 > self._end:
            at = self._next_block()
        _SHORT(self._bytes, at, 2, kind, flags, value, now_ns())
        self._at = end = at + 16
        self._count += 1
        self._words[H_TAIL] = self._base + end

    def step(self, kind: int, number: int, name: str, trace: int, position: int) -> int:
        """A step of a device that no frame began, or disk I/O; as frame()."""
        return self.long(kind, number, name, now_ns(), 0, trace, position) + 16 >> 3

    def long(self, kind: int, number: int, name: str, *words: int) -> int:
        """A record of words and a name; its offset in the file."""
        text = name.encode()
        size = 1 + len(words) + (len(text) + 7 >> 3)
        at = self._at
        if at + 8 * size > self._end:
            at = self._next_block()
        first = at >> 3
        self._words[first] = size | kind << 16 | len(text) << 24 | number << 32
        for place, word in enumerate(words, first + 1):
            self._words[place] = word
        begin = at + 8 * (1 + len(words))
        self._bytes[begin : begin + len(text)] = text
        self._at = end = at + 8 * size
        self._count += 1
        self._words[H_TAIL] = self._base + end
        return at

    def dma(self, pieces: Sequence[tuple[int, int, bool]]) -> None:
        """What the step in force has moved between device and guest memory: (pa, bytes, written)."""
        for first in range(0, len(pieces), 255):
            words = [word for pa, size, written in pieces[first : first + 255]
                     for word in (pa, size << 1 | written)]  # fmt: skip
            self.long(DMA, len(words) // 2, "", *words)

    def _next_block(self) -> int:
        """Where the next record goes, in the next block; what was in that is forgotten."""
        at, end = self._at, self._end
        if at < end:
            self._words[at >> 3] = 0
        if end >= PAGE + self._size:
            end = PAGE
            self._base += self._size
        self._end = end + BLOCK
        self._words[H_TAIL] = self._base + end  # from here on nobody relies on it
        self._at = at = self._begin_block(end)
        return at

    def _begin_block(self, at: int) -> int:
        self._words[H_COUNT] = self._count
        self._cr3 = -1  # who begins to read here has to know
        _SHORT(self._bytes, at, 2, BLOCK_BEGINS, 0, 0, self._count)
        self._words[H_TAIL] = self._base + at + 16
        return at + 16


# A record is a multiple of 8 bytes. It begins with its size in units of 8 bytes (16 bits, 0: the rest of the
# block is empty), its kind (8), flags (8), a number (32). Little endian; times are CLOCK_MONOTONIC in ns.
# `name`: as many bytes as the flags say, at the end. `done`: when the step was done, 0: not, or not yet.
# In a device's ring, what follows a step's record belongs to that step, up to the next one.
BLOCK_BEGINS = 18  # how many records (of other kinds than this and SPACE) were before it
PROCESS = 1  # a process begins to write. number: pid; time; name: its title
FRAME = 2  # a frame was taken (and, by a device, dealt with: a step). number: its length; flags: length of
#            the peer's name; taken, done; name, then the frame, see bus/codec.py, or its first DATA_MAX bytes
ACCESS = 3  # flags: see below; number: EIP; address (32), value (32); time. Then comes what it leads to
SPACE = 4  # number: CR3 of the accesses and vectors that follow; time
ASK = 5  # the CPU waits for an answer. number: EIP; time, span of the request; name: of the device
BATCH = 6  # posted accesses to a device leave. number: entries; time, span; name: of the device
VECTOR = 7  # an interrupt is delivered. flags: vector; number: EIP of the interrupted; time
EOI = 8  # at the local APIC. flags: vector; number: EIP; time
TIMER = 9  # a step. time, done, trace, deadline (machine's clock); name: of the timer
INPUT = 10  # a step: bytes of the host side. number: how many; time, done, trace, position; name: channel
DISK_DONE = 11  # a step: disk I/O has been done. number: tag; time, done, trace, 0; name: of the disk
DISK = 12  # disk I/O. number: bytes; time, done, trace, offset << 2 | 0 read, 1 write, 2 flush; name: disk
DMA = 13  # of the step. number: how many pairs follow: pa, bytes << 1 | written by the device
OUTPUT = 14  # of the step: bytes for the host side. number: how many; time, position; name: of the channel
MARK = 15  # of the step, by the device itself: Wiring.mark. time, value; name
RIM_OUT = 16  # `consoles` passed output on. number: bytes; time, position; name: "device:channel"
RIM_IN = 17  # `consoles` took input. number: bytes; time, position; name: "device:channel"
RESUMED = 19  # a step: a process goes on where the one before it ended. number: pid; time, done, trace of the
#               last step that it had committed, 0
ACCEPTED = 20  # the local APIC has taken a message. flags: vector; number: low half of the frame's span; time
# Flags of ACCESS: width (bits 0-2), WRITE, MMIO, POSTED, LONG (a string: `value` is the number of elements).
# TOLD: a read of a latched register, of which the next batch tells the device (bus/asking.py, noter).
WRITE, MMIO, POSTED, LONG, TOLD = 8, 16, 32, 64, 128
_SHORT = struct.Struct("<HBBIQ").pack_into
_FRAME = struct.Struct("<HBBIQQ").pack_into
_ACCESS = struct.Struct("<HBBIIIQ").pack_into

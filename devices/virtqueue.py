"""A split virtqueue in guest memory: chains of descriptors come, used elements go.

Reference: Virtual I/O Device (VIRTIO) Version 1.2, section 2.7. What the driver may not do is BadRing; memory
that is not there is BadDma. Positions are in the state record, so a successor goes on where this one stopped.
Left out: packed virtqueues, VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, used.flags (we are always notified).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from devices.base import Wiring

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4  # flags of a descriptor [2.7.5]
AVAIL_NO_INTERRUPT = 1  # flags of the driver's ring [2.7.6]
SIZE_MAX = 32768  # [2.7]
_DESC = struct.Struct("<QIHH")  # address, length, flags, next
_AVAIL = struct.Struct("<HH")  # flags, index; then the ring
_USED = struct.Struct("<II")  # head of the chain, bytes written


class BadRing(ValueError):
    """The driver broke a rule of section 2.7."""


@dataclass(slots=True)
class QueueState:
    """Where a queue lies [2.7] and how far it is. Indices are 16 bits and wrap."""

    ready: bool = False
    size: int = 0
    desc: int = 0  # pa of the descriptor table
    driver: int = 0  # pa of the available ring
    device: int = 0  # pa of the used ring
    next_avail: int = 0
    next_used: int = 0


class Chain(NamedTuple):
    """One buffer of the driver's; (pa, size) of what the device may read, then of what it may write."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def room(self) -> int:
        return sum(size for _, size in self.writable)


class Virtqueue:
    """The rings of one queue, for the length of one step."""

    def __init__(self, wiring: Wiring, state: QueueState, indirect: bool) -> None:
        """`indirect`: VIRTIO_F_INDIRECT_DESC was negotiated."""
        self._wiring = wiring
        self._q = state
        self._indirect = indirect

    def chains(self, take: bool = True) -> Iterator[Chain]:
        """What is available now, oldest first. Each is taken (unless not `take`) when it comes out here."""
        q, read = self._q, self._wiring.dma_read
        if not q.ready:
            return
        _, index = _AVAIL.unpack(read(q.driver, _AVAIL.size))
        count = index - q.next_avail & 0xFFFF
        if count > q.size:
            raise BadRing(f"{count} buffers are available in a queue of {q.size}")
        if not count:
            return
        ring = struct.unpack(f"<{q.size}H", read(q.driver + _AVAIL.size, 2 * q.size))
        table = read(q.desc, _DESC.size * q.size)
        at = q.next_avail
        for n in range(count):
            head = ring[(at + n) % q.size]
            chain = self._chain(head, table)
            if take:
                q.next_avail = q.next_avail + 1 & 0xFFFF
            yield chain

    def push(self, head: int, written: int) -> None:
        """Give a buffer back; the used index follows the element [2.7.8]."""
        q, write = self._q, self._wiring.dma_write
        write(q.device + 4 + _USED.size * (q.next_used % q.size), _USED.pack(head, written))
        q.next_used = q.next_used + 1 & 0xFFFF
        write(q.device + 2, q.next_used.to_bytes(2, "little"))

    def wants_interrupts(self) -> bool:
        """What the driver says now; it may be about to change its mind [2.7.7]."""
        flags, _ = _AVAIL.unpack(self._wiring.dma_read(self._q.driver, _AVAIL.size))
        return not flags & AVAIL_NO_INTERRUPT

    def _chain(self, head: int, table: bytes) -> Chain:
        """[2.7.4.2, 2.7.5.3.1]"""
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        size = len(table) // _DESC.size
        index, left, inside = head, size, False
        while True:
            if index >= size:
                raise BadRing(f"descriptor {index} of {size}")
            if not left:
                raise BadRing(f"the chain at {head} is a loop")
            left -= 1
            pa, length, flags, after = _DESC.unpack_from(table, index * _DESC.size)
            if flags & DESC_INDIRECT:
                if inside or not self._indirect or flags & (DESC_NEXT | DESC_WRITE):
                    raise BadRing(f"descriptor {index} of the chain at {head} must not be indirect")
                if not length or length % _DESC.size or length > _DESC.size * SIZE_MAX:
                    raise BadRing(f"an indirect table of {length} bytes")
                table = self._wiring.dma_read(pa, length)
                size = left = length // _DESC.size
                index, inside = 0, True
                continue
            if flags & DESC_WRITE:
                writable.append((pa, length))
            elif writable:
                raise BadRing(f"the chain at {head} has a part to read behind one to write")
            else:
                readable.append((pa, length))
            if not flags & DESC_NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = after


def gather(wiring: Wiring, segments: tuple[tuple[int, int], ...], limit: int | None = None) -> bytes:
    """The bytes of the segments, the first `limit` of them."""
    data = bytearray()
    for pa, size in segments:
        part = size if limit is None else min(size, limit - len(data))
        if part:
            data += wiring.dma_read(pa, part)
    return bytes(data)


def scatter(wiring: Wiring, segments: tuple[tuple[int, int], ...], data: bytes) -> int:
    """Write `data` into the segments as far as they reach; how much that was."""
    at = 0
    for pa, size in segments:
        part = data[at : at + size]
        if part:
            wiring.dma_write(pa, part)
        at += len(part)
    return at


def beyond(segments: tuple[tuple[int, int], ...], skip: int) -> tuple[tuple[int, int], ...]:
    """The segments without their first `skip` bytes."""
    rest = []
    for pa, size in segments:
        cut = min(skip, size)
        skip -= cut
        if size > cut:
            rest.append((pa + cut, size - cut))
    return tuple(rest)

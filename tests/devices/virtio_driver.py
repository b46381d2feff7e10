"""The driver's side of virtio: sets a device up over its registers, fills rings, reads what was used.

Written after sections 2.7, 3.1 and 4.2 of VIRTIO 1.2, without a look at the device's side.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.base import Device
from devices.fake import Board, Part

BASE = 0xD000_0000
VERSION_1 = 1 << 32
Piece = tuple[int, int, bool]  # pa, size, may the device write it


@dataclass
class Ring:
    """One queue in guest memory, `size` descriptors."""

    number: int
    size: int
    pa: int
    offered: int = 0
    seen: int = 0

    @property
    def available(self) -> int:
        return self.pa + 16 * self.size

    @property
    def used(self) -> int:
        return self.available + 8 + 2 * self.size & ~3


class Driver:
    """A board with one virtio device and its driver."""

    def __init__(
        self, cls: type[Device[Any]], settings: Mapping[str, Any], disks: Mapping[str, bytes] | None = None
    ) -> None:
        part = Part("dev", cls, {"regs": BASE}, {"intr": 10}, settings, disks or {})
        self.board = Board([part])
        self.io, self.ram, self.slot = self.board.io, self.board.ram, self.board.slots["dev"]
        self.rings: list[Ring] = []

    def r(self, offset: int, width: int = 4) -> int:
        return self.io.mmio_read(BASE + offset, width)

    def w(self, offset: int, value: int) -> None:
        self.io.mmio_write(BASE + offset, 4, value)

    def flush(self) -> None:
        """What was posted is done, and timers that are due have run."""
        self.io.flush()
        self.board.advance(0)

    @property
    def line(self) -> bool:
        return self.slot._levels["intr"]

    def features(self) -> int:
        words = []
        for select in (0, 1):
            self.w(0x14, select)
            words.append(self.r(0x10))
        return words[0] | words[1] << 32

    def negotiate(self, features: int) -> bool:
        """Reset, then up to FEATURES_OK; whether the device took them."""
        for status in (0, 1, 3):
            self.w(0x70, status)
        for select in (0, 1):
            self.w(0x24, select)
            self.w(0x20, features >> 32 * select & 0xFFFFFFFF)
        self.w(0x70, 0xB)
        return bool(self.r(0x70) & 8)

    def start(self, features: int = VERSION_1, sizes: Sequence[int] = (8,), pa: int = 0x10000) -> None:
        """The whole of section 3.1."""
        assert self.negotiate(features)
        self.rings = []
        for number, size in enumerate(sizes):
            ring = Ring(number, size, pa + 0x8000 * number)
            self.ram[ring.pa : ring.pa + 0x8000] = bytes(0x8000)
            self.w(0x30, number)
            assert self.r(0x34) >= size
            assert self.r(0x44) == 0
            self.w(0x38, size)
            for register, at in ((0x80, ring.pa), (0x90, ring.available), (0xA0, ring.used)):
                self.w(register, at)
                self.w(register + 4, 0)
            self.w(0x44, 1)
            assert self.r(0x44) == 1
            self.rings.append(ring)
        self.w(0x70, 0xF)

    def describe(self, queue: int, index: int, pa: int, size: int, flags: int, after: int = 0) -> None:
        struct.pack_into("<QIHH", self.ram, self.rings[queue].pa + 16 * index, pa, size, flags, after)

    def chain(self, queue: int, first: int, pieces: Iterable[Piece]) -> int:
        """Descriptors first, first + 1, ... modulo the size; the head."""
        ring, parts = self.rings[queue], list(pieces)
        for n, (pa, size, writable) in enumerate(parts):
            more = n + 1 < len(parts)
            at, after = (first + n) % ring.size, (first + n + 1) % ring.size
            self.describe(queue, at, pa, size, 2 * writable | more, after if more else 0)
        return first % ring.size

    def offer(self, queue: int, *heads: int, notify: bool = True) -> None:
        ring = self.rings[queue]
        for head in heads:
            slot = ring.available + 4 + 2 * (ring.offered % ring.size)
            struct.pack_into("<H", self.ram, slot, head)
            ring.offered = ring.offered + 1 & 0xFFFF
        struct.pack_into("<H", self.ram, ring.available + 2, ring.offered)
        if notify:
            self.w(0x50, queue)
            self.flush()

    def no_interrupts(self, queue: int, flag: bool) -> None:
        struct.pack_into("<H", self.ram, self.rings[queue].available, int(flag))

    def used(self, queue: int) -> list[tuple[int, int]]:
        """(head, length) of what was used since the last look."""
        ring = self.rings[queue]
        (index,) = struct.unpack_from("<H", self.ram, ring.used + 2)
        found = []
        while ring.seen != index:
            at = ring.used + 4 + 8 * (ring.seen % ring.size)
            found.append(struct.unpack_from("<II", self.ram, at))
            ring.seen = ring.seen + 1 & 0xFFFF
        return found

    def acknowledge(self) -> int:
        """InterruptStatus, acknowledged."""
        status = self.r(0x60)
        self.w(0x64, status)
        self.flush()
        return status

    def events(self) -> list[str]:
        texts = [event.text for event in self.board.events]
        self.board.events.clear()
        return texts

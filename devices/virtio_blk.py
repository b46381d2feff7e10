"""virtio block device: a raw disk.

Reference: Virtual I/O Device (VIRTIO) Version 1.2, section 5.2; transport and queues are virtio_mmio.py's.
A request is two steps: its chain is taken and the disk asked (QueueNotify); status and used element are
written (disk_done). Between them it is in `pending`. A write is done when the host's kernel has it; a driver
that negotiated VIRTIO_BLK_F_FLUSH asks for stable storage when it needs it, for one that didn't each write is
flushed before it is done [5.2.6.2].
Left out: several queues, discard, write zeroes, secure erase, zones, lifetime, topology, geometry, changes of
the cache's mode, SCSI commands.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from devices.base import Disk
from devices.virtio_mmio import VirtioMmio, VirtioState, registers
from devices.virtqueue import BadRing, Chain, beyond, gather, scatter

SECTOR = 512
QUEUE_SIZE = 256
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9  # [5.2.3]
SEG_MAX = QUEUE_SIZE - 2  # header and status take a descriptor each
SIZE_MAX = 1 << 20  # bytes of one segment
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8  # [5.2.6]
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
ID_LENGTH = 20
DISK = "disk"
_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_CONFIG = struct.Struct("<QII4xI")  # capacity, size_max, seg_max, geometry, blk_size


@dataclass(frozen=True, slots=True)
class VirtioBlkSettings:
    file: str  # a raw image or block device
    read_only: bool = False
    id: str = ""  # what GET_ID answers; "": the file's name

    def serial(self) -> bytes:
        """At most 20 bytes [5.2.6]."""
        name = self.id or self.file.rpartition("/")[2]
        return name.encode("ascii", "replace")[:ID_LENGTH].ljust(ID_LENGTH, b"\0")


@dataclass(slots=True)
class Pending:
    """A request that the disk was asked for."""

    tag: int
    head: int
    status_pa: int
    written: int  # bytes that the chain got, with its status, if all goes well


@dataclass(slots=True)
class VirtioBlkState(VirtioState):
    capacity: int = 0  # sectors, as the driver knows it
    next_tag: int = 0
    flushing: list[int] = field(default_factory=list)  # tags of writes that are done but not flushed
    pending: list[Pending] = field(default_factory=list)


class _Request(NamedTuple):
    kind: int
    sector: int
    out: tuple[tuple[int, int], ...]
    into: tuple[tuple[int, int], ...]
    status_pa: int


class VirtioBlk(VirtioMmio[VirtioBlkState]):
    NAME = "virtio_blk"
    MMIO = (registers(posted_notify=True),)
    SETTINGS = VirtioBlkSettings
    DISKS = (Disk(DISK),)
    STATE = VirtioBlkState
    DEVICE_ID = 2
    QUEUES = (QUEUE_SIZE,)

    def fresh_state(self) -> VirtioBlkState:
        state = super().fresh_state()
        state.capacity = self.wiring.disk_size(DISK) // SECTOR
        if hasattr(self, "state"):
            state.next_tag = self.state.next_tag  # what is still asked for is nobody's
        return state

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        capacity = self.wiring.disk_size(DISK) // SECTOR
        if capacity != self.state.capacity:  # another disk
            self.state.capacity = capacity
            self.config_changed()
            self.drive_lines()

    def features(self) -> int:
        return F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | (F_RO if self.settings.read_only else 0)

    def config(self) -> bytes:
        return _CONFIG.pack(self.state.capacity, SIZE_MAX, SEG_MAX, SECTOR)

    def notified(self, queue: int) -> None:
        for chain in self.queue(queue).chains():
            self._begin(chain)

    def disk_done(self, disk: str, tag: int, error: str) -> None:
        s = self.state
        request = next((p for p in s.pending if p.tag == tag), None)
        if request is None:
            return  # it was asked for before a reset
        if error:
            self.wiring.event("log", f"{self.NAME}: {error}")
        elif tag in s.flushing:
            s.flushing.remove(tag)
            self.wiring.disk_flush(DISK, tag)
            return
        s.pending.remove(request)
        if tag in s.flushing:
            s.flushing.remove(tag)
        with self.judged():
            self._finish(request.head, request.status_pa, S_IOERR if error else S_OK, request.written)
        self.drive_lines()

    def _begin(self, chain: Chain) -> None:
        request, s = self._parse(chain), self.state
        kind, sector, out, into, status_pa = request
        if any(p.head == chain.head for p in s.pending):
            raise BadRing(f"buffer {chain.head} was made available again before it was used")
        if kind in (T_IN, T_OUT):
            segments = into if kind == T_IN else out
            size = sum(length for _, length in segments)
            outside = size % SECTOR or sector + size // SECTOR > s.capacity
            if outside or (kind == T_OUT and self.settings.read_only):
                self._finish(chain.head, status_pa, S_IOERR, 1)
                return
            tag = self._pend(chain, status_pa, (size if kind == T_IN else 0) + 1)
            if kind == T_IN:
                self.wiring.disk_read(DISK, tag, sector * SECTOR, segments)
            else:
                if not s.driver_features & F_FLUSH:
                    s.flushing.append(tag)
                self.wiring.disk_write(DISK, tag, sector * SECTOR, segments)
        elif kind == T_FLUSH:
            self.wiring.disk_flush(DISK, self._pend(chain, status_pa, 1))
        elif kind == T_GET_ID:
            written = scatter(self.wiring, into, self.settings.serial())
            self._finish(chain.head, status_pa, S_OK, written + 1)
        else:
            self._finish(chain.head, status_pa, S_UNSUPP, 1)

    def _parse(self, chain: Chain) -> _Request:
        """However the driver has cut header, data and status into descriptors [2.7.4.1]."""
        header = gather(self.wiring, chain.readable, _HEADER.size)
        if len(header) < _HEADER.size or not chain.room:
            raise BadRing(f"the chain at {chain.head} has no room for header and status")
        kind, _, sector = _HEADER.unpack(header)
        into = tuple((pa, size) for pa, size in chain.writable if size)
        (pa, size) = into[-1]
        into = (*into[:-1], (pa, size - 1)) if size > 1 else into[:-1]
        return _Request(kind, sector, beyond(chain.readable, _HEADER.size), into, pa + size - 1)

    def _pend(self, chain: Chain, status_pa: int, written: int) -> int:
        s = self.state
        tag = s.next_tag
        s.next_tag = tag + 1 & 0xFFFFFFFF
        s.pending.append(Pending(tag, chain.head, status_pa, written))
        return tag

    def _finish(self, head: int, status_pa: int, status: int, written: int) -> None:
        self.wiring.dma_write(status_pa, bytes([status]))
        self.queue(0).push(head, written)
        self.used(0)

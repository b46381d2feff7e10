"""What a device's host notes in its trace ring besides the frames that its endpoint takes.

`trace` is the chain that the step in force belongs to, also while nothing is recorded: effects carry it.
"""

from __future__ import annotations

import os

import msgspec

from bus.recorder import DISK, DISK_DONE, INPUT, MARK, OUTPUT, RESUMED, TIMER, Recorder, now_ns
from devices.disks import DiskRequest

KINDS = {"read": 0, "write": 1, "flush": 2}


class Counts(msgspec.Struct):
    """Of one process of a device; what another one has done before is not in it."""

    reads: int = 0  # of registers that the device was asked for; elements of strings each
    writes: int = 0  # posted ones, too
    interrupts: int = 0  # rises of its lines and of INT, messages
    bytes_in: int = 0  # of consoles
    bytes_out: int = 0
    disk_requests: int = 0
    disk_read: int = 0  # bytes
    disk_written: int = 0


class Notes:
    """Of one Slot. Without a recorder, or while that is off, it only carries `trace`."""

    __slots__ = ("_dma", "_place", "_recorder", "_resumed", "counts", "trace")

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.trace = 0
        self.counts = Counts()
        self._recorder = recorder
        self._dma: list[tuple[int, int, bool]] = []
        self._resumed = 0
        self._place = 0  # of the step in force, unless it is a frame's

    def look(self) -> None:
        """Between two steps: is recording on by now?"""
        if self._recorder is not None:
            self._recorder.look()

    def timer(self, name: str, deadline_ns: int) -> None:
        """A step begins."""
        self._begin(TIMER, 0, name, deadline_ns)

    def input(self, channel: str, count: int, position: int) -> None:
        """A step begins."""
        self.counts.bytes_in += count
        self._begin(INPUT, count, channel, position)

    def disk_done(self, request: DiskRequest) -> None:
        """A step begins."""
        self._begin(DISK_DONE, request.tag & 0xFFFF_FFFF, request.disk, 0)

    def disk(self, request: DiskRequest) -> None:
        """Disk I/O begins; over() ends it."""
        count = sum(size for _, size in request.segments)
        self.counts.disk_requests += 1
        if request.kind == "read":
            self.counts.disk_read += count
        else:
            self.counts.disk_written += count
        self._begin(DISK, count & 0xFFFF_FFFF, request.disk, request.offset << 2 | KINDS[request.kind])
        if self._place:
            self._dma += [(pa, size, request.kind == "read") for pa, size in request.segments]

    def dma(self, pa: int, size: int, written: bool) -> None:
        if self._recorder is not None and self._recorder.on:
            self._dma.append((pa, size, written))

    def output(self, channel: str, count: int, position: int) -> None:
        self.counts.bytes_out += count
        if self._recorder is not None and self._recorder.on:
            self._recorder.long(OUTPUT, count, channel, now_ns(), position)

    def mark(self, name: str, value: int) -> None:
        if self._recorder is not None and self._recorder.on:
            self._recorder.long(MARK, 0, name[:255], now_ns(), value)

    def resume(self) -> None:
        """A step begins: what a process before this one had committed is brought to its end."""
        self._begin(RESUMED, os.getpid(), "", 0)
        self._resumed, self._place = self._place, 0

    def resumed(self) -> None:
        """It has been."""
        if self._recorder is not None and self._resumed:
            self._recorder.done(self._resumed)

    def over(self) -> None:
        """The step, or the disk I/O, has been done."""
        recorder = self._recorder
        if recorder is None:
            return
        if self._dma:
            recorder.dma(self._dma)
            self._dma.clear()
        if self._place:
            recorder.done(self._place)
            self._place = 0

    def _begin(self, kind: int, number: int, name: str, position: int) -> None:
        if self._recorder is not None and self._recorder.on:
            self._place = self._recorder.step(kind, number, name, self.trace, position)

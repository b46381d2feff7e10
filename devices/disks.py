"""Disks: files of the host that are read and written in place, straight from and to guest memory.

A disk that is written is locked (flock), so that no two processes write one image; one that is only read is
locked against writers. Errors of I/O are a line of text for the device, never an exception.
Left out: images in another format than raw, O_DIRECT, discard, changes of size.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from devices.base import Device
from devices.dma import GuestRam, Segments
from devices.overlay import Overlay

SECTOR = 512
IOV_MAX = 1024  # segments of one preadv [readv(2)]


class BadDisk(ValueError):
    """A file that can't be a disk; one line says why."""


class DiskRequest(NamedTuple):
    """What a device asked for. `segments` is empty for a flush."""

    disk: str
    tag: int
    kind: Literal["read", "write", "flush"]
    offset: int = 0
    segments: Segments = ()


class AsksDisks:
    """The part of devices.base.Wiring that asks for disk I/O."""

    def ask_disk(self, request: DiskRequest) -> None:
        """Have it done behind this step. KeyError: no such disk; BadDma: segments not in RAM."""
        raise NotImplementedError

    def disk_read(self, disk: str, tag: int, offset: int, segments: Segments) -> None:
        self.ask_disk(DiskRequest(disk, tag, "read", offset, tuple(segments)))

    def disk_write(self, disk: str, tag: int, offset: int, segments: Segments) -> None:
        self.ask_disk(DiskRequest(disk, tag, "write", offset, tuple(segments)))

    def disk_flush(self, disk: str, tag: int) -> None:
        self.ask_disk(DiskRequest(disk, tag, "flush"))


class DiskFile:
    """One open disk."""

    def __init__(self, path: str | Path, read_only: bool, overlay: str | None = None) -> None:
        """`overlay`: where writes go instead (overlay.py). Raises BadDisk."""
        self.path = Path(path)
        self._overlay: Overlay | None = None
        read_only = read_only or overlay is not None
        try:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            what = "read" if read_only or not os.access(path, os.R_OK) else "written"
            raise BadDisk(f"{path} cannot be {what} ({error.strerror})") from error
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise BadDisk(f"{path} is neither a file nor a block device")
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if not self.size or self.size % SECTOR:
                raise BadDisk(f"{path} is {self.size} bytes long, which is no multiple of {SECTOR} above 0")
            fcntl.flock(self._fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if overlay is not None:
                self._overlay = self._open_overlay(overlay)
        except BlockingIOError as error:
            os.close(self._fd)
            raise BadDisk(f"{path} is in use already, by this machine or another") from error
        except BadDisk:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give it back: another process may open it now."""
        os.close(self._fd)
        if self._overlay is not None:
            self._overlay.close()

    def _open_overlay(self, path: str) -> Overlay:
        try:
            return Overlay(path, self.size)
        except (OSError, ValueError) as error:
            raise BadDisk(f"{self.path}: its overlay can't be used: {error}") from error

    def read(self, offset: int, views: list[memoryview]) -> None:
        """Fill the views. OSError, EOFError."""
        whole, start = views, offset
        while views:
            done = os.preadv(self._fd, views[:IOV_MAX], offset)
            if not done:
                raise EOFError(f"{self.path} ends before byte {offset}")
            views, offset = _rest(views, done), offset + done
        if self._overlay is not None:
            self._overlay.patch(start, whole)

    def write(self, offset: int, views: list[memoryview]) -> None:
        """Write the views out. OSError; EOFError beyond the end, which stays where it was."""
        if offset + sum(map(len, views)) > self.size:
            raise EOFError(f"{self.path} ends at byte {self.size}")
        if self._overlay is not None:
            self._overlay.write(offset, views)
            return
        while views:
            done = os.pwritev(self._fd, views[:IOV_MAX], offset)
            views, offset = _rest(views, done), offset + done

    def flush(self) -> None:
        """Nothing to do for an overlay, which lives no longer than the machine."""
        if self._overlay is None:
            os.fdatasync(self._fd)


class Disks:
    """A device's disks by name."""

    def __init__(self, disks: Mapping[str, DiskFile]) -> None:
        self._disks = dict(disks)

    @classmethod
    def open(
        cls, device: type[Device[Any]], settings: Any, overlays: Mapping[str, str] | None = None
    ) -> Disks:
        """As the settings say; `overlays`: paths by disk name, of a restored machine. BadDisk."""
        opened = cls({})
        try:
            for disk in device.DISKS:
                path, read_only = getattr(settings, disk.setting), getattr(settings, disk.read_only)
                opened._disks[disk.name] = DiskFile(path, read_only, (overlays or {}).get(disk.name))
        except BadDisk:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        for disk in self._disks.values():
            disk.close()
        self._disks.clear()

    def size(self, disk: str) -> int:
        return self._disks[disk].size

    def perform(self, request: DiskRequest, ram: GuestRam) -> str:
        """Do it; "" or what went wrong, in one line."""
        disk = self._disks[request.disk]
        try:
            match request.kind:
                case "read":
                    try:
                        disk.read(request.offset, ram.views(request.segments))
                    finally:
                        ram.written(request.segments)
                case "write":
                    disk.write(request.offset, ram.views(request.segments))
                case "flush":
                    disk.flush()
        except (OSError, EOFError) as error:
            return f"{request.kind} of {disk.path}: {' '.join(str(error).split())}"
        return ""


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the views behind their first `done` bytes."""
    for at, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[at + 1 :]]
        done -= len(view)
    return []

"""Snapshot files: one file holds a machine, and says so in a way that can be checked.

    prelude, 48 bytes   magic, format, offset and length of the index, the index's checksum
    frames              memory (memory_node/snapshot.py), then boot images, then disks' changes; zstd each
    index               msgpack: see Index

The index has the checksum of each frame, the prelude that of the index, and the file ends with the index: so
a file that was cut off or changed anywhere is refused. Nothing in it depends on when or by whom it was
written: of a machine that has not run meanwhile a second snapshot is the same file.
Left out: signatures (a checksum finds damage, not intent); encryption; the contents of disks.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from launcher.errors import ConfigError
from memory_node.snapshot import (
    DIGEST,
    Damaged,
    Piece,
    compress,
    decompress,
    digest,
    pieces_of,
    read,
    restore,
)

FORMAT = 1  # of file, index and what nodes are told; state records have versions of their own
MAGIC = b"BPSNAP\x0d\n"
_PRELUDE = struct.Struct("<8sIIQQ16s")
INDEX_MAX = 256 << 20
SUFFIX_OF_UNFINISHED = ".unfinished"


class Origin(msgspec.Struct, frozen=True):
    """The machine file, as it was read."""

    name: str
    file: str
    text: str


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """A zstd frame in the file."""

    offset: int
    length: int
    size: int  # unpacked
    digest: bytes


class DiskUse(msgspec.Struct, frozen=True):
    """A disk that the machine has: the file, and what tells that nobody has written to it since.

    `changes`: of a machine that was restored, its overlay (devices/overlay.py), as memory is kept.
    """

    node: str
    disk: str
    setting: str
    path: str
    read_only: bool
    size: int = 0
    mtime_ns: int = 0
    overlay_size: int = 0
    changes: list[Piece] | None = None


class NodeRecord(msgspec.Struct, frozen=True):
    """What a node is told, but for names and clocks, and its state (None: it has none)."""

    node: str
    config: dict[str, Any]
    state: dict[str, Any] | None


class Index(msgspec.Struct, frozen=True):
    origin: Origin
    clock_ns: int  # where the machine's clock stood
    stop_on_reset: bool
    console: str | None
    host_cpu: int | Literal["auto", "any"]
    start: dict[str, int]  # registers after a reset
    memory_size: int
    pieces: list[Piece]
    images: list[tuple[int, Frame]]  # what a reset loads: physical address
    nodes: list[NodeRecord]  # memory, devices, CPU, in the order of their start
    disks: list[DiskUse]
    channels: list[dict[str, str]] | None = None  # launcher/rings.py; None: not noted


class BadSnapshot(ConfigError):
    """A snapshot that can't be restored: one line, exit status 2."""


class Snapshot:
    """An open snapshot file; it stays readable after it was removed or replaced."""

    def __init__(self, path: Path) -> None:
        """Raises BadSnapshot for what is no snapshot, or an incomplete or changed one."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise BadSnapshot(path, "", f"cannot be read ({e.strerror})", "name a snapshot file") from e
        try:
            self.index = self._read_index()
        except (BadSnapshot, OSError):
            os.close(self._fd)
            raise

    def fill(self, memory: int) -> None:
        """Put the memory into a file of zeros; BadSnapshot. May run in a thread of its own."""
        with self._refusing():
            restore(memory, self.index.memory_size, self._fd, self.index.pieces)

    def fill_overlay(self, disk: DiskUse, path: Path) -> None:
        """Make the overlay of a disk, with the changes that the snapshot holds; BadSnapshot, OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if disk.changes is not None:
                os.ftruncate(fd, disk.overlay_size)
                with self._refusing():
                    restore(fd, disk.overlay_size, self._fd, disk.changes)
        finally:
            os.close(fd)

    def frame(self, frame: Frame, what: str) -> bytes:
        """A frame's contents; BadSnapshot."""
        with self._refusing():
            return decompress(self.packed(frame, what), frame.size, what)

    def packed(self, frame: Frame, what: str) -> bytes:
        """A frame as it is in the file. Raises Damaged."""
        return read(self._fd, frame.offset, frame.length, frame.digest, what)

    def close(self) -> None:
        os.close(self._fd)

    def _read_index(self) -> Index:
        prelude = os.pread(self._fd, _PRELUDE.size, 0)
        if prelude[: len(MAGIC)] != MAGIC[: len(prelude)] or not prelude:
            raise BadSnapshot(self.path, "", "is no snapshot", "name a file that `launcher snapshot` wrote")
        if len(prelude) < _PRELUDE.size:
            raise self._truncated()
        _, version, _, offset, length, wanted = _PRELUDE.unpack(prelude)
        if version != FORMAT:
            problem = f"is of format {version}, this program reads format {FORMAT}"
            raise BadSnapshot(self.path, "", problem, "restore it with the version that wrote it")
        size = os.fstat(self._fd).st_size
        if size < offset + length:
            raise self._truncated()
        if size > offset + length or length > INDEX_MAX:
            raise self._altered("its length is wrong")
        data = os.pread(self._fd, length, offset)
        if digest(prelude[:-DIGEST] + data) != wanted:
            raise self._altered("the checksum of its index is wrong")
        try:
            return msgspec.msgpack.decode(data, type=Index)
        except msgspec.DecodeError as e:
            raise self._altered(f"its index is not understood: {e}") from e

    def _truncated(self) -> BadSnapshot:
        return BadSnapshot(self.path, "", "is cut off: its end is missing", "copy it again, or take another")

    def _altered(self, why: str) -> BadSnapshot:
        return BadSnapshot(self.path, "", f"is damaged: {why}", "copy it again, or take another")

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Damaged as e:
            raise self._altered(str(e)) from e


class SnapshotImages:
    """Boot images of a snapshot, unpacked when they are needed: at a reset."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for pa, frame in self._snapshot.index.images:
            yield pa, self._snapshot.frame(frame, f"the boot image for {pa:#x}")

    def packed(self) -> Iterator[tuple[int, bytes, int]]:
        """(pa, frame, size unpacked). Raises Damaged."""
        for pa, frame in self._snapshot.index.images:
            yield pa, self._snapshot.packed(frame, f"the boot image for {pa:#x}"), frame.size


Images = Iterable[tuple[int, bytes]]


class Writer:
    """Writes a snapshot beside `path`, and puts it there when it is complete."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        self._unfinished = path.with_name(path.name + SUFFIX_OF_UNFINISHED)
        self._file: BinaryIO = self._unfinished.open("wb")
        self._at = _PRELUDE.size
        self._file.write(bytes(_PRELUDE.size))

    def memory(self, memory: int, size: int) -> list[Piece]:
        pieces = []
        for number, pages, frame in pieces_of(memory, size):
            pieces.append(Piece(number, self._at, len(frame), pages, digest(frame)))
            self._put(frame)
        return pieces

    def images(self, images: Images) -> list[tuple[int, Frame]]:
        if isinstance(images, SnapshotImages):
            return [(pa, self.packed(frame, size)) for pa, frame, size in images.packed()]
        return [(pa, self.data(image)) for pa, image in images]

    def data(self, plain: bytes) -> Frame:
        return self.packed(compress(plain), len(plain))

    def packed(self, frame: bytes, size: int) -> Frame:
        placed = Frame(self._at, len(frame), size, digest(frame))
        self._put(frame)
        return placed

    def finish(self, index: Index) -> int:
        """The file is complete; its size."""
        data = msgspec.msgpack.encode(index)
        head = _PRELUDE.pack(MAGIC, FORMAT, 0, self._at, len(data), bytes(DIGEST))[:-DIGEST]
        self._put(data)
        self._file.seek(0)
        self._file.write(head + digest(head + data))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._unfinished.rename(self._path)
        return self._at

    def abandon(self) -> None:
        """Leave nothing."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._at += len(data)

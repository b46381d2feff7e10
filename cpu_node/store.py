"""Translations on disk, for the next start: a folder of files that hold records (kept.py).

    <folder>/<version>/<time>-<pid>-<n>.kept    header, records, index

The version is a hash of the CPU node's sources, the assembler's version and the host CPU's features: another
translator sees none of it. A file is written under another name and renamed, and never changed after that, so
machines may share a folder and a kill costs what wasn't written. Records are read when they are needed and
checked then. When there are many files they become one; when all of them are too large, those not used for
longest go. Whatever is wrong is said once in the log, and the machine translates for itself.

A record is machine code that the CPU node will run: folder and files must belong to the user, and nobody else
may write to them, or they are not used. Checksums find damage, not intent.
Left out: fsync (after a power cut a file may be damaged, which is noticed).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import logging
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from bus.checksum import blake2b
from cpu_node.folders import Refused, check_owner, open_folder
from cpu_node.kept import Kept, Key, Probe, key_of, label, unpack
from cpu_node.line import Line

LIMIT = 128 << 20  # bytes of all files
MOST_FILES = 8  # of one version
MOST_ALIKE = 32  # records with one key that are compared
SUFFIX = ".kept"
_A_DAY = 86_400
_HEADER = struct.Struct("<8s32sQII")  # magic, version, index offset, entries, checksum of the index
_ENTRY = struct.Struct("<IHHQIIIHHI")  # key, offset, length, checksum, last use in seconds, probe
_MAGIC = b"BPKEPT\x02\n"
_serial = itertools.count()

log = logging.getLogger(__name__)


def version(host: Iterable[str]) -> bytes:
    """What a translation depends on besides its key: all sources here, keystone, the host CPU's flags."""
    digest = blake2b(digest_size=32)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_bytes()
        digest.update(f"{file.name} {len(text)}\n".encode() + text)
    digest.update(assembler_version() + f"{' '.join(sorted(host))}\n".encode())
    return digest.digest()


def assembler_version() -> bytes:
    """What keystone's package says of its version, keystone itself not being loaded (it is large)."""
    spec = importlib.util.find_spec("keystone")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("keystone is not installed")
    return Path(spec.origin).with_name("keystone_const.py").read_bytes()


class _File(msgspec.Struct, eq=False):
    """One file of records, open."""

    name: str
    fd: int
    size: int
    used: bool = False


class _Entry(msgspec.Struct, eq=False):
    """One record of the index."""

    file: _File
    key: Key
    offset: int
    length: int
    checksum: int
    stamp: int
    probe: Probe


class Store:
    """The records of one version in a folder. `now_s` is a wall clock in seconds. Nothing here raises."""

    def __init__(self, folder: Path, tag: bytes, now_s: Callable[[], float], limit: int = LIMIT) -> None:
        self.folder, self.tag, self.limit = folder, tag, limit
        self.hits = 0
        self._now_s = now_s
        self._root = self._fd = -1
        self._files: list[_File] = []
        self._index: dict[Key, list[_Entry]] = {}  # newest last
        self._complained = False
        try:
            self._root = open_folder(folder, None)
            self._fd = open_folder(Path(tag.hex()[:32]), self._root)
            for name in sorted(n for n in os.listdir(self._fd) if n.endswith(SUFFIX)):
                self._open(name)
        except (OSError, Refused) as error:
            self._complain(f"{error}; translations are not kept")
            self.close()

    @property
    def usable(self) -> bool:
        return self._fd >= 0

    def close(self) -> None:
        """Note which files were of use, and let go."""
        for file in self._files:
            if file.used:
                with contextlib.suppress(OSError):
                    os.utime(file.fd)
            os.close(file.fd)
        self._files.clear()
        self._index.clear()
        for fd in (self._fd, self._root):
            if fd >= 0:
                os.close(fd)
        self._fd = self._root = -1

    # ---- reading

    def find(self, line: Line) -> Kept | None:
        """A record that fits the line's bytes as they are."""
        code = line.code
        for entry in self._index.get(key_of(line), ())[: -MOST_ALIKE - 1 : -1]:
            offset, length, crc = entry.probe
            if zlib.crc32(code[offset : offset + length]) != crc:
                continue
            kept = self._kept(entry)
            if kept is not None and kept.fits(line):
                self.hits += 1
                entry.file.used = True
                entry.stamp = int(self._now_s())
                return kept
        return None

    def _kept(self, entry: _Entry) -> Kept | None:
        try:
            kept = unpack(self._record(entry))
            if kept.key != entry.key:
                raise Refused(f"{entry.file.name}: a record that isn't the index's")
        except (OSError, Refused, ValueError) as error:
            self._complain(f"{error}; translated anew")
            self._index[entry.key].remove(entry)
            return None
        return kept

    def _record(self, entry: _Entry) -> bytes:
        record = os.pread(entry.file.fd, entry.length, entry.offset)
        if len(record) != entry.length or zlib.crc32(record) != entry.checksum:
            raise Refused(f"{entry.file.name}: a record is damaged")
        return record

    def _open(self, name: str) -> None:
        """Take a file's index in; one that is damaged, or gone by now, is left out."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._complain(f"{name}: {error.strerror}; not used")
            return
        try:
            status = os.fstat(fd)
            check_owner(status, name)
            if not stat.S_ISREG(status.st_mode):
                raise Refused(f"{name} is no file")
            file = _File(name, fd, status.st_size)
            for entry in _read_index(file, self.tag):
                self._index.setdefault(entry.key, []).append(entry)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            self._files.append(file)
        except (OSError, Refused) as error:
            os.close(fd)
            self._complain(f"{error}; not used")

    # ---- writing

    def add(self, records: list[bytes], tidy: bool = True) -> None:
        """Keep records of kept.pack, and know them from now on. tidy: also make one file of many."""
        if not self.usable or not records:
            return
        stamp = int(self._now_s())
        try:
            with self._lock() as alone:
                if alone and tidy and len(self._files) >= MOST_FILES:
                    self._merge(records, stamp)
                else:
                    self._open(self._write([(record, stamp) for record in records]))
                if alone:
                    self._shrink()
        except OSError as error:
            self._complain(f"{error.strerror}; translations are not kept")

    def _write(self, records: list[tuple[bytes, int]]) -> str:
        """One new file; its name."""
        name = f"{int(self._now_s()):012x}-{os.getpid():x}-{next(_serial):x}"
        at, entries = _HEADER.size, []
        for record, stamp in records:
            key, probe = label(record)
            entries.append(_ENTRY.pack(*key, at, len(record), zlib.crc32(record), stamp, *probe))
            at += len(record)
        index = b"".join(entries)
        header = _HEADER.pack(_MAGIC, self.tag, at, len(entries), zlib.crc32(index))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name + ".new", flags, 0o600, dir_fd=self._fd)
        try:
            with open(fd, "wb", buffering=1 << 20) as out:
                out.writelines((header, *[record for record, _ in records], index))
            os.rename(name + ".new", name + SUFFIX, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name + ".new", dir_fd=self._fd)
            raise
        return name + SUFFIX

    def _merge(self, records: list[bytes], stamp: int) -> None:
        """All files and these records become one file, without what is there twice or too old."""
        known: dict[Key, list[tuple[Kept, bytes, int]]] = {}
        newest_first = [(unpack(record), record, stamp) for record in records]
        for entry in sorted((e for entries in self._index.values() for e in entries), key=lambda e: -e.stamp):
            with contextlib.suppress(OSError, Refused, ValueError):
                record = self._record(entry)
                newest_first.append((unpack(record), record, entry.stamp))
        left = self.limit // 2
        for kept, record, last_use in newest_first:
            alike = known.setdefault(kept.key, [])
            if left > len(record) and not any(other.covers(kept) for other, _, _ in alike):
                alike.append((kept, record, last_use))
                left -= len(record)
        merged = [(record, last_use) for alike in known.values() for _, record, last_use in reversed(alike)]
        name = self._write(merged)
        for file in self._files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name, dir_fd=self._fd)
            os.close(file.fd)
        self._files.clear()
        self._index.clear()
        self._open(name)

    def _shrink(self) -> None:
        """Remove files of any version, those used longest ago first, until all are within the limit."""
        files, total = [], 0
        for folder in os.listdir(self._root):
            with contextlib.suppress(OSError, Refused):
                fd = open_folder(Path(folder), self._root, make=False)
                try:
                    files += [(os.stat(name, dir_fd=fd, follow_symlinks=False), folder, name)
                              for name in os.listdir(fd)]
                finally:
                    os.close(fd)
        newest = self._files[-1].name if self._files else ""
        for status, folder, name in sorted(files, key=lambda f: -f[0].st_mtime_ns):
            total += status.st_size
            if total > self.limit and name != newest:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name), dir_fd=self._root)
        for folder in os.listdir(self._root):
            with contextlib.suppress(OSError):
                if os.stat(folder, dir_fd=self._root).st_mtime < self._now_s() - _A_DAY:
                    os.rmdir(folder, dir_fd=self._root)  # refused unless it is empty

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """True for one of several machines at a time; the others don't wait."""
        fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._root)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            yield alone
        finally:
            os.close(fd)

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("kept translations, %s: %s", self.folder, text)


def _read_index(file: _File, tag: bytes) -> list[_Entry]:
    """A file's entries. Raises Refused."""
    header = os.pread(file.fd, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        raise Refused(f"{file.name} is too short")
    magic, found, start, count, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or found != tag:
        raise Refused(f"{file.name} is of another version")
    if start + count * _ENTRY.size != file.size:
        raise Refused(f"{file.name} has the wrong length")
    index = os.pread(file.fd, count * _ENTRY.size, start)
    if zlib.crc32(index) != checksum or len(index) != count * _ENTRY.size:
        raise Refused(f"{file.name}: its index is damaged")
    return [_Entry(file, (va, mode, kind), offset, length, crc, stamp, (first, size, probe))
            for va, mode, kind, offset, length, crc, stamp, first, size, probe in _ENTRY.iter_unpack(index)]

"""Trace files: what rings held, as it was, in chunks with checksums.

  8 bytes   "BPTRACE" and the version, 1
  chunks    length of the body (32), CRC-32 of all that follows it (32), kind (8), zero (8), ring (16),
            position (64), body

  META      body: msgpack of what is to be known about the machine, see Meta; the first chunk
  PIECE     records of a ring, of one block, from this position on; compressed by zstd
  END       nothing; a file without it was cut short, or its writer ended

Pieces of one ring come in order of their positions; what lies between two was lost, since the ring was
overwritten before it was read. Little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from zlib import crc32

import msgspec
import zstandard

from bus.recorder import BLOCK, BLOCK_BEGINS
from tracing.meta import Meta
from tracing.records import Damage, Reader, Record

MAGIC = b"BPTRACE\x01"
META, PIECE, END = 1, 2, 3
HEAD = struct.Struct("<IIBBHQ")
BODY_MAX = 1 << 26
LEVEL = 1  # of zstd; records shrink to a fifth, at 200 MB/s and more


class BadTrace(ValueError):
    """No trace file, or one of another version."""


class Writer:
    """Writes chunks; OSError is the caller's. Not closed by `END` if that isn't said."""

    def __init__(self, file: IO[bytes], meta: Meta) -> None:
        self._file = file
        self._compress = zstandard.ZstdCompressor(level=LEVEL).compress
        file.write(MAGIC)
        self._chunk(META, 0, 0, msgspec.msgpack.encode(meta))

    def piece(self, ring: int, position: int, data: bytes) -> None:
        self._chunk(PIECE, ring, position, self._compress(data))

    def end(self) -> None:
        self._chunk(END, 0, 0, b"")
        self._file.flush()

    def _chunk(self, kind: int, ring: int, position: int, body: bytes) -> None:
        head = HEAD.pack(len(body), 0, kind, 0, ring, position)
        check = crc32(body, crc32(head[8:]))
        self._file.write(HEAD.pack(len(body), check, kind, 0, ring, position) + body)


class Trace:
    """A trace file that is read.

    `complaints`: after records() has ended, a line for what was wrong: the file is read up to the damage.
    `lost`: records that were overwritten in a ring before they were read, by ring number.
    """

    def __init__(self, path: Path) -> None:
        """Raises BadTrace, OSError."""
        self.path = path
        self._file = path.open("rb")
        self.complaints: list[str] = []
        self.lost: dict[int, int] = {}
        if self._file.read(len(MAGIC)) != MAGIC:
            what = f"no trace file of version {MAGIC[-1]}; `launcher trace --out` writes such"
            raise BadTrace(f"{path}: {what}")
        try:
            first = self._next(zstandard.ZstdDecompressor())
            if first is None or first[0] != META:
                raise BadTrace(f"{path}: the trace file has no beginning")
            self.meta = msgspec.msgpack.decode(first[3], type=Meta)
            self._begin = self._file.tell()
        except (Damage, msgspec.DecodeError) as error:
            raise BadTrace(f"{path}: the trace file's beginning is damaged: {error}") from error

    def records(self) -> Iterator[tuple[int, Record]]:
        """(number of the ring, record), in the order of the file: by ring in order, not by time."""
        self._file.seek(self._begin)
        decompressor = zstandard.ZstdDecompressor()
        readers = [Reader() for _ in self.meta.rings]
        ends: dict[int, int] = {}  # position behind the last piece, by ring
        counted: dict[int, int] = {}  # records read so far, those lost included
        try:
            while True:
                at = self._file.tell()
                chunk = self._next(decompressor)
                if chunk is None:
                    self.complaints.append(f"{self.path}: ends at byte {at} without its end: cut short")
                    break
                kind, ring, position, body = chunk
                if kind == END:
                    break
                if kind != PIECE or ring >= len(readers):
                    raise Damage(f"a chunk of kind {kind} for ring {ring}", at)
                if position != ends.get(ring, position) and position % BLOCK:
                    raise Damage(f"a piece of ring {ring} begins in the middle of a block", at)
                ends[ring] = position + len(body)
                try:
                    for record in readers[ring].records(body):
                        if record.kind != BLOCK_BEGINS:
                            counted[ring] = counted.get(ring, 0) + 1
                            yield ring, record
                        elif lost := record.one - counted.get(ring, 0):
                            self.lost[ring] = self.lost.get(ring, 0) + lost
                            counted[ring] = record.one
                except Damage as damage:
                    raise Damage(f"{damage} (ring {self.meta.rings[ring]})", at) from damage
        except Damage as damage:
            self.complaints.append(f"{self.path}: damaged at byte {damage.at}: {damage}; read up to there")

    def rings(self) -> list[Iterator[Record]]:
        """The records of each ring, read piece by piece as they are asked for: for who merges them by time.

        Where records are lost comes a BLOCK_BEGINS, and its `number` says how many. `complaints` and `lost`
        as with records().
        """
        self._file.seek(self._begin)
        self.complaints.clear()
        self.lost.clear()
        pieces: list[list[int]] = [[] for _ in self.meta.rings]  # places in the file
        try:
            while True:
                at = self._file.tell()
                chunk = self._next(None)
                if chunk is None:
                    self.complaints.append(f"{self.path}: ends at byte {at} without its end: cut short")
                    break
                kind, ring, _, _ = chunk
                if kind == END:
                    break
                if kind != PIECE or ring >= len(pieces):
                    raise Damage(f"a chunk of kind {kind} for ring {ring}", at)
                pieces[ring].append(at)
        except Damage as damage:
            self.complaints.append(f"{self.path}: damaged at byte {damage.at}: {damage}; read up to there")
        return [self._ring(number, places) for number, places in enumerate(pieces)]

    def _ring(self, ring: int, places: list[int]) -> Iterator[Record]:
        reader, decompressor = Reader(), zstandard.ZstdDecompressor()
        end = counted = 0
        for at in places:
            try:
                self._file.seek(at)
                chunk = self._next(decompressor)
                assert chunk is not None
                position, body = chunk[2:]
                if position != end and position % BLOCK:
                    raise Damage(f"a piece of ring {ring} begins in the middle of a block", at)
                end = position + len(body)
                for record in reader.records(body):
                    if record.kind != BLOCK_BEGINS:
                        counted += 1
                        yield record
                    elif (lost := record.one - counted) > 0:
                        counted = record.one
                        self.lost[ring] = self.lost.get(ring, 0) + lost
                        yield record._replace(number=lost)
            except Damage as damage:
                what = f"{damage} (ring {self.meta.rings[ring]})"
                self.complaints.append(f"{self.path}: damaged at byte {at}: {what}; read up to there")
                return

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self, decompressor: zstandard.ZstdDecompressor | None) -> tuple[int, int, int, bytes] | None:
        """(kind, ring, position, body) of the next chunk; None where the file ends. Without a decompressor
        the body stays as it is."""
        at = self._file.tell()
        head = self._file.read(HEAD.size)
        if not head:
            return None
        if len(head) < HEAD.size:
            raise Damage("a chunk is cut short", at)
        length, check, kind, _, ring, position = HEAD.unpack(head)
        if length > BODY_MAX:
            raise Damage(f"a chunk of {length} bytes", at)
        body = self._file.read(length)
        if len(body) < length:
            raise Damage("a chunk is cut short", at)
        if crc32(body, crc32(head[8:])) != check:
            raise Damage("a chunk's checksum is wrong", at)
        if kind == PIECE and decompressor is not None:
            try:
                body = decompressor.decompress(body, max_output_size=BLOCK)
            except zstandard.ZstdError as error:
                raise Damage(f"a piece that does not decompress: {error}", at) from error
        return kind, ring, position, body

"""Memory as part of a snapshot file: pieces of 1 MiB, each its pages that aren't zero, compressed.

A piece is one zstd frame with a checksum of its own: several threads pack and unpack (zstandard lets go of
the interpreter lock), and damage is found piece by piece. What was never written is not looked at. The same
memory gives the same bytes.
Left out: pages shared between snapshots; huge pages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import zstandard

from memory_node.store import data_extents

PIECE = 1 << 20
PAGE = 4096
LEVEL = 1  # zstd's; 3 makes a booted Linux 6 % smaller in twice the time
DIGEST = 16  # bytes
THREADS = 2
_ZERO = bytes(PAGE)


class Piece(NamedTuple):
    """`number` of its MiB, place in the file, bit n of `pages` for page n of it, checksum of the frame."""

    number: int
    offset: int
    length: int
    pages: bytes
    digest: bytes


class Damaged(ValueError):
    """Bytes of a snapshot aren't what was written; one line."""


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(data)


def decompress(data: bytes, size: int, what: str) -> bytes:
    """The inverse; Damaged if it is not `size` bytes."""
    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise Damaged(f"{what} can't be unpacked: {error}") from error
    if len(plain) != size:
        raise Damaged(f"{what} has {len(plain)} bytes, not {size}")
    return plain


def pieces_of(memory: int, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, pages, frame) of all of a memory file that isn't zero, ascending."""
    numbers = _numbers(data_extents(memory, size))
    with ThreadPoolExecutor(THREADS, "snapshot") as pool:
        for number, pages, frame in pool.map(lambda n: _pack(memory, n, size), numbers):
            if frame:
                yield number, pages, frame


def restore(memory: int, size: int, file: int, pieces: Iterable[Piece]) -> None:
    """Fill a memory file that is all zeros from a snapshot. Raises Damaged, OSError."""
    with ThreadPoolExecutor(THREADS, "restore") as pool:
        for _ in pool.map(lambda piece: _unpack(memory, size, file, piece), pieces):
            pass


def read(file: int, offset: int, length: int, wanted: bytes, what: str) -> bytes:
    """Bytes of a snapshot, their checksum being right; else Damaged."""
    data = os.pread(file, length, offset)
    if len(data) != length or digest(data) != wanted:
        raise Damaged(f"the checksum of {what} is wrong")
    return data


def _numbers(extents: Iterable[tuple[int, int]]) -> list[int]:
    found = {n for start, end in extents for n in range(start // PIECE, (end - 1) // PIECE + 1)}
    return sorted(found)


def _pack(memory: int, number: int, size: int) -> tuple[int, bytes, bytes]:
    at = number * PIECE
    data = os.pread(memory, min(PIECE, size - at), at)
    bits, kept = 0, []
    for n in range(len(data) // PAGE):
        page = data[n * PAGE : (n + 1) * PAGE]
        if page != _ZERO:
            bits |= 1 << n
            kept.append(page)
    frame = compress(b"".join(kept)) if kept else b""
    return number, bits.to_bytes(PIECE // PAGE // 8, "little"), frame


def _unpack(memory: int, size: int, file: int, piece: Piece) -> None:
    what = f"the memory at {piece.number * PIECE:#x}"
    bits = int.from_bytes(piece.pages, "little")
    frame = read(file, piece.offset, piece.length, piece.digest, what)
    view = memoryview(decompress(frame, bits.bit_count() * PAGE, what))
    at = piece.number * PIECE
    if at + bits.bit_length() * PAGE > size:
        raise Damaged(f"{what} lies beyond {size:#x}")
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits, at = bits >> skip, at + skip * PAGE
        run = (~bits & bits + 1).bit_length() - 1
        done = os.pwrite(memory, view[: run * PAGE], at)
        if done != run * PAGE:
            raise Damaged(f"{what}: only {done} bytes could be put into memory")
        bits, at, view = bits >> run, at + run * PAGE, view[run * PAGE :]

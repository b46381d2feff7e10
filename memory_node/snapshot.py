"""Memory as part of a snapshot file: pieces of 1 MiB, each its pages that aren't zero, compressed.

A piece is one zstd frame with a checksum of its own: several threads may pack and unpack (zstandard lets go
of the interpreter lock), and damage is found piece by piece. What was never written is not looked at. The
same memory gives the same bytes.
Left out: pages shared between snapshots; huge pages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from bus.checksum import blake2b
from memory_node.store import data_extents

PIECE = 1 << 20
PAGE = 4096
LEVEL = 1  # zstd's; 3 makes a booted Linux 6 % smaller in twice the time
DIGEST = 16  # bytes
THREADS = 2
PER_THREAD = 128  # pieces for which another one pays: they take the cores that processes start on
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


def digest(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=DIGEST).digest()


def compress(data: bytes) -> bytes:
    import zstandard  # here, because who only reads an index needs none of it

    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(data)


def decompress(data: bytes, size: int, what: str) -> bytes:
    """The inverse; Damaged if it is not `size` bytes."""
    import zstandard

    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise Damaged(f"{what} can't be unpacked: {error}") from error
    if len(plain) != size:
        raise Damaged(f"{what} has {len(plain)} bytes, not {size}")
    return plain


def pieces_of(memory: int, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, pages, frame) of all of a memory file that isn't zero, ascending."""
    from concurrent.futures import ThreadPoolExecutor

    numbers = _numbers(data_extents(memory, size))
    with ThreadPoolExecutor(THREADS, "snapshot") as pool:
        for number, pages, frame in pool.map(lambda n: _pack(memory, n, size), numbers):
            if frame:
                yield number, pages, frame


def restore(memory: int, size: int, file: int, pieces: Sequence[Piece]) -> None:
    """Fill a memory file that is all zeros from a snapshot. Raises Damaged, OSError."""
    left, failed = iter(pieces), list[Exception]()

    def work() -> None:
        try:
            unpacker = _Unpacker(memory, size, file)
            for piece in left:
                if failed:
                    return
                unpacker.unpack(piece)
        except (Damaged, OSError) as error:
            failed.append(error)

    others = [threading.Thread(target=work) for _ in range(min(THREADS - 1, len(pieces) // PER_THREAD))]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]


def read(file: int, offset: int, length: int, wanted: bytes, what: str) -> bytes:
    """Bytes of a snapshot, their checksum being right; else Damaged."""
    data = os.pread(file, length, offset)
    if len(data) != length or digest(data) != wanted:
        raise _wrong(what)
    return data


def _wrong(what: str) -> Damaged:
    return Damaged(f"the checksum of {what} is wrong")


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


class _Unpacker:
    """One thread's. Its buffers are made once: a page's first touch costs as much as unpacking it."""

    def __init__(self, memory: int, size: int, file: int) -> None:
        import zstandard

        self._memory, self._size, self._file = memory, size, file
        self._packed, self._plain = memoryview(bytearray(2 * PIECE)), memoryview(bytearray(PIECE + 1))
        self._zstd, self._zstd_error = zstandard.ZstdDecompressor(), zstandard.ZstdError

    def unpack(self, piece: Piece) -> None:
        what = f"the memory at {piece.number * PIECE:#x}"
        bits = int.from_bytes(piece.pages, "little")
        frame = self._packed[: piece.length]
        if os.preadv(self._file, [frame], piece.offset) != piece.length or digest(frame) != piece.digest:
            raise _wrong(what)
        wanted = bits.bit_count() * PAGE
        try:
            found = self._zstd.stream_reader(frame).readinto(self._plain[: wanted + 1])
        except self._zstd_error as error:
            raise Damaged(f"{what} can't be unpacked: {error}") from error
        if found != wanted:
            raise Damaged(f"{what} has {'more' if found > wanted else found} bytes, not {wanted}")
        view, at = self._plain, piece.number * PIECE
        if at + bits.bit_length() * PAGE > self._size:
            raise Damaged(f"{what} lies beyond {self._size:#x}")
        while bits:
            skip = (bits & -bits).bit_length() - 1
            bits, at = bits >> skip, at + skip * PAGE
            run = (~bits & bits + 1).bit_length() - 1
            done = os.pwrite(self._memory, view[: run * PAGE], at)
            if done != run * PAGE:
                raise Damaged(f"{what}: only {done} bytes could be put into memory")
            bits, at, view = bits >> run, at + run * PAGE, view[run * PAGE :]

"""Memory in a snapshot: what is kept of it, that it comes back, and that damage is found."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_node.snapshot import PAGE, PIECE, Damaged, Piece, digest, pieces_of, restore
from memory_node.store import open_memfd

SIZE = 5 * PIECE + 3 * PAGE


@pytest.fixture
def memory() -> Iterator[int]:
    """Pages here and there, one of them of zeros that were written; the last piece is a short one."""
    fd = open_memfd("test", SIZE)
    rng = random.Random(3)
    for page in [0, 1, 2, 5, 255, 256, 3 * 256 - 1, *range(4 * 256, 5 * 256), 5 * 256 + 2]:
        os.pwrite(fd, rng.randbytes(1 + rng.randrange(PAGE)), page * PAGE)
    os.pwrite(fd, bytes(PAGE), 2 * PIECE)
    yield fd
    os.close(fd)


def _save(memory: int, path: Path) -> list[Piece]:
    pieces, at = [], 100
    with path.open("wb") as file:
        file.write(bytes(at))
        for number, pages, frame in pieces_of(memory, SIZE):
            pieces.append(Piece(number, at, len(frame), pages, digest(frame)))
            file.write(frame)
            at += len(frame)
    return pieces


def _load(path: Path, pieces: list[Piece], size: int = SIZE) -> bytes:
    target, file = open_memfd("test", size), os.open(path, os.O_RDONLY)
    try:
        restore(target, size, file, pieces)
        assert os.fstat(target).st_blocks * 512 <= 280 * PAGE  # zeros take nothing
        return os.pread(target, size, 0)
    finally:
        os.close(target)
        os.close(file)


def test_memory_comes_back_and_zeros_are_not_kept(memory: int, tmp_path: Path) -> None:
    pieces = _save(memory, tmp_path / "a")
    assert [piece.number for piece in pieces] == [0, 1, 2, 4, 5]
    kept = [int.from_bytes(piece.pages, "little") for piece in pieces]
    assert kept == [1 << 255 | 0b100111, 1, 1 << 255, (1 << 256) - 1, 0b100]
    assert _load(tmp_path / "a", pieces) == os.pread(memory, SIZE, 0)


def test_the_same_memory_gives_the_same_bytes(memory: int, tmp_path: Path) -> None:
    assert _save(memory, tmp_path / "a") == _save(memory, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_empty_memory_has_no_pieces(tmp_path: Path) -> None:
    fd = open_memfd("test", SIZE)
    assert list(pieces_of(fd, SIZE)) == []
    os.close(fd)


@pytest.mark.parametrize("piece", range(5))
def test_a_changed_byte_is_found(memory: int, tmp_path: Path, piece: int) -> None:
    pieces = _save(memory, tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[pieces[piece].offset + pieces[piece].length // 2] ^= 1
    (tmp_path / "a").write_bytes(data)
    where = f"the checksum of the memory at {pieces[piece].number * PIECE:#x} is wrong"
    with pytest.raises(Damaged, match=where):
        _load(tmp_path / "a", pieces)


def test_a_missing_end_is_found(memory: int, tmp_path: Path) -> None:
    pieces = _save(memory, tmp_path / "a")
    os.truncate(tmp_path / "a", pieces[-1].offset + 1)
    with pytest.raises(Damaged):
        _load(tmp_path / "a", pieces)


def test_an_index_that_does_not_fit_is_found(memory: int, tmp_path: Path) -> None:
    """With checksums that are right: as of a program that writes nonsense."""
    pieces = _save(memory, tmp_path / "a")
    more = pieces[0]._replace(pages=(0b1111111).to_bytes(32, "little"))
    with pytest.raises(Damaged, match="bytes, not"):
        _load(tmp_path / "a", [more])
    with pytest.raises(Damaged, match="beyond"):
        _load(tmp_path / "a", [pieces[3]._replace(number=5)])
    (tmp_path / "b").write_bytes(b"no zstd")
    with pytest.raises(Damaged, match="can't be unpacked"):
        _load(tmp_path / "b", [Piece(0, 0, 7, pieces[1].pages, digest(b"no zstd"))])

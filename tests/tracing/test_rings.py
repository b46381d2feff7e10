"""Rings and trace files: what was noted is read, what was overwritten is counted, damage is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus import recorder
from bus.recorder import ACCESS, BLOCK, FRAME, PROCESS, WRITE, Recorder
from tracing.file import HEAD, BadTrace, Trace, Writer
from tracing.meta import meta_of
from tracing.records import Reader, Record
from tracing.rings import Ring

BLOCKS = 4


class Cpu:
    cr3 = 0x1000


class Place:
    at = 0xC0001234
    cpu = Cpu()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = recorder.make("test", BLOCKS)
    yield fd
    os.close(fd)


def save(fd: int, path: Path, begin: int = 0) -> None:
    ring = Ring("test", fd)
    with path.open("wb") as file:
        writer = Writer(file, meta_of("m", ["test"]))
        for position, data in ring.pieces(begin, ring.tail):
            writer.piece(0, position, data)
        writer.end()


def read(path: Path) -> tuple[list[Record], Trace]:
    with Trace(path) as trace:
        return [record for _, record in trace.records()], trace


def test_what_is_noted_is_read(fd: int, tmp_path: Path) -> None:
    noted = Recorder(fd, "first")
    noted.access(1 | WRITE, Place(), 0x3F8, 65)
    place = noted.frame(b"cpu0.io", b"frame", 2)
    noted.value(noted.access(1, Place(), 0x3FD, 0), 0x60)
    noted.dma([(0x1000, 512, True), (0x2000, 16, False)])
    noted.done(place)
    noted.long(recorder.MARK, 0, "queue", 3, 99)
    noted.step(recorder.DISK, 4096, "disk", 7, 123 << 2 | 1)
    noted.short(recorder.VECTOR, 0x30, 0xC0000000)
    Recorder(fd, "second").frame(b"pit", b"x" * (recorder.DATA_MAX + 9), 5)
    save(fd, tmp_path / "t.bptrace")
    records, trace = read(tmp_path / "t.bptrace")
    assert not trace.complaints
    assert not trace.lost
    first, access, frame, read_access, dma, mark, disk, vector, second, cut = records
    assert (first.kind, first.name, first.number) == (PROCESS, "first", os.getpid())
    assert (access.number, access.one, access.two, access.cr3) == (0xC0001234, 0x3F8, 65, 0x1000)
    assert (frame.kind, frame.name, frame.data, frame.time_ns) == (FRAME, "cpu0.io", b"frame", 2)
    assert frame.done_ns > 0
    assert (read_access.one, read_access.two) == (0x3FD, 0x60)
    assert [int.from_bytes(dma.data[at : at + 8], "little") for at in range(0, 32, 8)] == [
        0x1000, 512 << 1 | 1, 0x2000, 16 << 1,
    ]  # fmt: skip
    assert (mark.name, mark.time_ns, mark.one) == ("queue", 3, 99)
    assert (disk.number, disk.one, disk.two, disk.done_ns) == (4096, 7, 123 << 2 | 1, 0)
    assert (vector.flags, vector.number, vector.cr3) == (0x30, 0xC0000000, 0x1000)
    assert second.name == "second"
    assert (cut.number, len(cut.data)) == (recorder.DATA_MAX + 9, recorder.DATA_MAX)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_overwritten_is_counted(fd: int, tmp_path: Path, seed: int) -> None:
    count, sizes = 1, [7 + seed, 300, 5000, 40, 16_000]
    noted = Recorder(fd, "writer")
    for number in range(4000):
        if number % 500 == 499:
            noted = Recorder(fd, "writer")
            count += 1
        if number % 3:
            noted.access(1, Place(), 0x60, number)
        else:
            noted.frame(b"a", bytes(sizes[number % len(sizes)]), number)
        count += 1
    save(fd, tmp_path / "t.bptrace")
    records, trace = read(tmp_path / "t.bptrace")
    assert trace.lost[0] > 0
    assert len(records) + trace.lost[0] == count
    numbers = [r.two if r.kind == ACCESS else r.time_ns for r in records if r.kind in (ACCESS, FRAME)]
    assert numbers == list(range(numbers[0], 4000))


def test_recording_goes_on_where_a_killed_process_was(fd: int) -> None:
    noted = Recorder(fd, "killed")
    noted.frame(b"a", b"whole", 1)
    tail = Ring("test", fd).tail
    noted.frame(b"a", b"half", 2)
    os.pwrite(fd, tail.to_bytes(8, "little"), 8 * recorder.H_TAIL)  # it ended before it could say so
    Recorder(fd, "next")
    ring = Ring("test", fd)
    names = [r.name for _, data in ring.pieces(0, ring.tail) for r in Reader().records(data)]
    assert names == ["", "killed", "a", "next"]


def test_it_is_switched_from_outside(fd: int) -> None:
    noted = Recorder(fd, "p")
    assert noted.on
    Ring("test", fd, writable=True).switch(False)
    assert noted.on
    assert not noted.look()
    assert not Recorder(fd, "q").on


def written(fd: int, path: Path) -> bytes:
    noted = Recorder(fd, "writer")
    for number in range(6000):
        noted.access(1, Place(), 0x60, number)
    save(fd, path)
    return path.read_bytes()


def test_a_file_that_was_cut_is_read_up_to_there(fd: int, tmp_path: Path) -> None:
    path = tmp_path / "t.bptrace"
    data = written(fd, path)
    whole = len(read(path)[0])
    for length in (len(data) - 1, len(data) - HEAD.size, len(data) // 2, len(data) // 3):
        path.write_bytes(data[:length])
        records, trace = read(path)
        assert len(trace.complaints) == 1
        assert str(path) in trace.complaints[0]
        assert "cut short" in trace.complaints[0]
        assert len(records) <= whole


def test_a_file_that_was_altered_is_read_up_to_there(fd: int, tmp_path: Path) -> None:
    path = tmp_path / "t.bptrace"
    data = written(fd, path)
    first = data.index(b"(\xb5/\xfd")  # a zstd frame's magic number: the first piece
    for at in range(first, len(data), 997):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        _, trace = read(path)
        assert len(trace.complaints) == 1, at
        assert "byte" in trace.complaints[0]


def test_records_that_make_no_sense_are_damage(fd: int, tmp_path: Path) -> None:
    path = tmp_path / "t.bptrace"
    good = (2 | recorder.VECTOR << 16).to_bytes(8, "little") + bytes(8)
    too_long, unknown = b"\xff\xff\x07\0" + bytes(4), b"\x02\0\x63\0" + bytes(12)
    for bad in (too_long, unknown, b"\x02\0", b"\x01\0\x02\0" + bytes(4)):
        with path.open("wb") as file:
            writer = Writer(file, meta_of("m", ["r"]))
            writer.piece(0, 0, good + bad)
            writer.end()
        records, trace = read(path)
        assert len(records) == 1
        assert len(trace.complaints) == 1
        assert "ring r" in trace.complaints[0]


NO_TRACES = [b"", b"BPTRACE\x02", b"BPTRACE\x01", b"BPTRACE\x01" + bytes(40), bytes(100)]


@pytest.mark.parametrize("data", NO_TRACES)
def test_what_is_no_trace_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.bptrace"
    path.write_bytes(data)
    with pytest.raises(BadTrace, match=r"t\.bptrace"):
        Trace(path)


def test_a_block_holds_the_longest_record() -> None:
    assert 24 + 255 + recorder.DATA_MAX < BLOCK - 16

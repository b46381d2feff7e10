"""The memory files: sizes, grants, loading, dumps, marks."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_node.marks import HALVES, Marks, make_marks
from memory_node.regions import Kind, Region
from memory_node.store import BadAccess, Store, data_extents

PAGE, MIB = 4096, 1 << 20


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(
        "test",
        [
            Region("ram", Kind.RAM, 0, 16 * MIB),
            Region("bios", Kind.ROM, 0xFFFF0000, 0x10000),
            Region("hole", Kind.RESERVED, 0xA0000, 0x60000),
            Region("mirror", Kind.MIRROR, 0, 2 * PAGE),
        ],
    )
    yield store
    store.close()


def test_writes_through_a_grant_are_seen(store: Store) -> None:
    fd = store.grant("ram", writable=True)
    with mmap.mmap(fd, 16 * MIB) as view:
        view[0x1234:0x1238] = b"abcd"
    os.close(fd)
    assert store.read("ram", 0x1233, 6) == b"\0abcd\0"


def test_a_reading_grant_cannot_be_mapped_writable(store: Store) -> None:
    fd = store.grant("ram", writable=False)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE)
    with mmap.mmap(fd, PAGE, prot=mmap.PROT_READ) as view:
        assert view[:4] == bytes(4)
    os.close(fd)


def test_rom_is_granted_for_reading_only_and_still_loads(store: Store) -> None:
    store.write("bios", 0xFFF0, b"\xea")
    with pytest.raises(BadAccess, match="ROM"):
        store.grant("bios", writable=True)
    fd = store.grant("bios", writable=False)
    assert os.pread(fd, 1, 0xFFF0) == b"\xea"
    os.close(fd)


def test_no_holder_can_change_the_size(store: Store) -> None:
    fd = store.grant("ram", writable=True)
    for size in (0, 32 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


@pytest.mark.parametrize(("offset", "size"), [(16 * MIB, 1), (16 * MIB - 1, 2), (-1, 1), (0, 17 * MIB)])
def test_accesses_beyond_a_region_are_refused(store: Store, offset: int, size: int) -> None:
    with pytest.raises(BadAccess, match="beyond"):
        store.read("ram", offset, size)
    with pytest.raises(BadAccess, match="beyond"):
        store.write("ram", offset, bytes(size))


def test_unknown_and_empty_regions_are_refused(store: Store) -> None:
    with pytest.raises(BadAccess, match="no region 'rma', there are: ram, bios, hole, mirror"):
        store.fd("rma")
    with pytest.raises(BadAccess, match="has no bytes"):
        store.grant("hole", writable=False)


def test_load_file_and_dump(store: Store, tmp_path: Path) -> None:
    image = os.urandom(3 * MIB + 17)
    (tmp_path / "image").write_bytes(image)
    assert store.load_file("ram", MIB + 5, tmp_path / "image") == len(image)
    assert store.dump("ram", tmp_path / "dump") == 16 * MIB
    dump = (tmp_path / "dump").read_bytes()
    assert dump == bytes(MIB + 5) + image + bytes(16 * MIB - MIB - 5 - len(image))
    assert (tmp_path / "dump").stat().st_blocks * 512 < 4 * MIB, "the dump has no holes"
    with pytest.raises(FileExistsError):
        store.dump("ram", tmp_path / "dump")
    with pytest.raises(BadAccess):
        store.load_file("ram", 14 * MIB, tmp_path / "image")


def test_a_named_file_is_emptied_locked_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "ram.img"
    region = Region("ram", Kind.RAM, 0, 16 * MIB, str(file))
    first = Store("a", [region])
    first.write("ram", 100, b"xyz")
    with pytest.raises(BadAccess, match="another machine's memory"):
        Store("b", [region])
    first.close()
    assert file.read_bytes()[100:103] == b"xyz"
    second = Store("b", [region])
    assert second.read("ram", 0, 16 * MIB) == bytes(16 * MIB)
    second.close()


def test_use_is_counted(store: Store) -> None:
    assert store.bytes_in_use("ram") == 0
    store.write("ram", 5 * PAGE, b"x")
    assert store.bytes_in_use("ram") == PAGE


def bits(bitmap: bytes) -> set[int]:
    return {n for n in range(len(bitmap) * 8) if bitmap[n // 8] >> n % 8 & 1}


writes = st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=9)), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(before=writes, after=writes)
def test_written_since_a_mark(
    store: Store, before: list[tuple[int, bytes]], after: list[tuple[int, bytes]]
) -> None:
    for page, data in before:
        store.write("ram", page * PAGE, data)
    marks = Marks(store)
    marks.set_mark("m", "ram")
    old = store.read("ram", 0, MIB)
    for page, data in after:
        store.write("ram", page * PAGE, data)
    new = store.read("ram", 0, MIB)
    changed = {n for n in range(256) if old[n * PAGE : (n + 1) * PAGE] != new[n * PAGE : (n + 1) * PAGE]}
    assert bits(marks.written_since("m", "ram")) == changed


def test_a_punched_hole_counts_as_zeros(store: Store) -> None:
    store.write("ram", 0, b"x" * 3 * PAGE)
    marks = Marks(store)
    marks.set_mark("m", "ram")
    store.write("ram", PAGE, bytes(PAGE))
    store.write("ram", 9 * PAGE, bytes(PAGE))  # zeros where a hole was: no change
    assert bits(marks.written_since("m", "ram")) == {1}
    marks.drop_mark("m", "ram")
    with pytest.raises(BadAccess, match="no mark 'm'"):
        marks.written_since("m", "ram")


def test_marks_are_found_by_another_process(store: Store) -> None:
    fd = make_marks("m")
    marks = Marks(store, fd)
    marks.set_mark("one", "ram")
    store.write("ram", 3 * PAGE, b"x")
    marks.set_mark("two", "ram")
    store.write("ram", 4 * PAGE, b"x")
    for half in HALVES:  # one that ended while it wrote: the half that is in force is another
        if half != HALVES[int.from_bytes(os.pread(fd, 8, 0), "little") & 1]:
            os.pwrite(fd, b"nonsense" * 9, half)
    later = Marks(store, fd)
    assert bits(later.written_since("one", "ram")) == {3, 4}
    assert bits(later.written_since("two", "ram")) == {4}
    later.drop_mark("one", "ram")
    with pytest.raises(BadAccess, match="no mark 'one'"):
        Marks(store, fd).written_since("one", "ram")
    assert bits(Marks(store, fd).written_since("two", "ram")) == {4}
    os.close(fd)


def test_extents_are_whole_pages_whatever_the_file_system_counts_in(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as f:
        f.truncate(MIB)
        os.pwrite(f.fileno(), b"x", 70000)
        extents = list(data_extents(f.fileno(), MIB))
    assert all(start % PAGE == 0 and end % PAGE == 0 for start, end in extents)
    assert any(start <= 70000 < end for start, end in extents)


def test_seals_are_in_force(store: Store) -> None:
    assert fcntl.fcntl(store.fd("ram"), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK

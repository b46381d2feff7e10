"""Watch: what changed in page tables since something was derived from them."""

from __future__ import annotations

import mmap

import pytest

from cpu_node.paging import PS, RW, US, A, D, P, PhysicalMemory
from cpu_node.watch import Watch

DIRECTORY, TABLE, OTHER = 0x1000, 0x2000, 0x3000
ALL = P | RW | US
VA = 0x0080_5000  # directory entry 2, table entry 5
PDE, PTE = DIRECTORY + 8, TABLE + 20


@pytest.fixture
def memory() -> PhysicalMemory:
    made = PhysicalMemory(mmap.mmap(-1, 1 << 20))
    _poke(made, PDE, TABLE | ALL)
    _poke(made, PTE, 0x9000 | ALL | A)
    return made


def _poke(memory: PhysicalMemory, pa: int, value: int) -> None:
    memory.dwords[pa >> 2] = value


def _watch(memory: PhysicalMemory) -> Watch:
    watch = Watch(memory)
    watch.add(VA, PTE, DIRECTORY)
    assert watch.changes(DIRECTORY) == ([], [])
    return watch


def test_nothing_changed(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    assert watch.changes(DIRECTORY) == ([], [])


@pytest.mark.parametrize("entry", [0, 0xA000 | ALL, 0x9000 | P | US | A, 0x9000 | ALL, 0x9000 | ALL | A | D])
def test_changed_entry_is_told_once(memory: PhysicalMemory, entry: int) -> None:
    watch = _watch(memory)
    _poke(memory, PTE, entry)
    assert watch.changes(DIRECTORY) == ([(VA >> 12, entry)], [])
    assert watch.changes(DIRECTORY) == ([], [])


def test_there_and_back_without_use_is_no_change(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    _poke(memory, PTE, 0)
    _poke(memory, PTE, 0x9000 | ALL | A)
    assert watch.changes(DIRECTORY) == ([], [])


def test_there_used_and_back_is_a_change(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    _poke(memory, PTE, 0xA000 | ALL | A)
    watch.add(VA, PTE, DIRECTORY)
    _poke(memory, PTE, 0x9000 | ALL | A)
    assert watch.changes(DIRECTORY) == ([(VA >> 12, 0x9000 | ALL | A)], [])


def test_replaced_and_used_is_told_for_what_was_derived_before(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    _poke(memory, PTE, 0xA000 | ALL | A)
    watch.add(VA, PTE, DIRECTORY)
    assert watch.changes(DIRECTORY) == ([(VA >> 12, 0xA000 | ALL | A)], [])


def test_bits_gained_by_use_are_no_change(memory: PhysicalMemory) -> None:
    """A and D set by the walk that leads to `add`."""
    watch = _watch(memory)
    _poke(memory, PTE, 0x9000 | ALL | A | D)
    watch.add(VA, PTE, DIRECTORY)
    assert watch.changes(DIRECTORY) == ([], [])


def test_neighbours_are_measured_too(memory: PhysicalMemory) -> None:
    for n in range(4):
        _poke(memory, PTE + 4 * n, 0x9000 + 0x1000 * n | ALL | A)
    watch = Watch(memory)
    watch.add(VA, PTE, DIRECTORY, 4)
    watch.changes(DIRECTORY)
    _poke(memory, PTE + 12, 0)
    assert watch.changes(DIRECTORY) == ([((VA >> 12) + 3, 0)], [])


def test_table_under_two_directory_entries(memory: PhysicalMemory) -> None:
    _poke(memory, PDE + 4, TABLE | ALL)
    watch = _watch(memory)
    watch.add(VA + (4 << 20), PTE, DIRECTORY)
    watch.changes(DIRECTORY)
    _poke(memory, PTE, 0)
    pages, bigs = watch.changes(DIRECTORY)
    assert sorted(pages) == [(VA >> 12, 0), ((VA >> 12) + 1024, 0)]
    assert bigs == []


@pytest.mark.parametrize("entry", [0, OTHER | ALL, TABLE | P | US, TABLE | P | RW, 0x0040_0000 | PS | ALL])
def test_directory_entry(memory: PhysicalMemory, entry: int) -> None:
    watch = _watch(memory)
    _poke(memory, PDE, entry)
    assert watch.changes(DIRECTORY) == ([], [VA >> 22])
    _poke(memory, PTE, 0)
    assert watch.changes(DIRECTORY) == ([], []), "nothing of it is watched any more"


def test_directory_entry_accessed_bit_is_no_change(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    _poke(memory, PDE, TABLE | ALL | A)
    assert watch.changes(DIRECTORY) == ([], [])


@pytest.mark.parametrize(("old", "new", "changed"), [
    (A | D, A | D, False), (A, A | D, False), (A | D, A, True), (A | D, D, True), (0, A, False),
])
def test_bits_of_a_4_mib_page(memory: PhysicalMemory, old: int, new: int, changed: bool) -> None:
    _poke(memory, PDE, 0x0040_0000 | PS | ALL | old)
    watch = _watch(memory)
    _poke(memory, PDE, 0x0040_0000 | PS | ALL | new)
    assert watch.changes(DIRECTORY)[1] == ([VA >> 22] if changed else [])


def test_another_directory(memory: PhysicalMemory) -> None:
    """Seen through a directory that maps the same table nothing changed; through another it is gone."""
    same, different = 0x5000, 0x6000
    _poke(memory, same + 8, TABLE | ALL)
    watch = _watch(memory)
    assert watch.changes(same) == ([], [])
    assert watch.changes(different) == ([], [VA >> 22])
    assert watch.changes(DIRECTORY) == ([], [])


def test_directory_entry_replaced_and_used(memory: PhysicalMemory) -> None:
    """What was derived through the old table must go, although the entry is now what was last used."""
    watch = _watch(memory)
    _poke(memory, PDE, OTHER | ALL)
    _poke(memory, OTHER + 24, 0xB000 | ALL)
    watch.add(VA + 0x1000, OTHER + 24, DIRECTORY)
    assert watch.changes(DIRECTORY)[1] == [VA >> 22]


def test_clear(memory: PhysicalMemory) -> None:
    watch = _watch(memory)
    watch.clear()
    _poke(memory, PTE, 0)
    _poke(memory, PDE, 0)
    assert watch.changes(DIRECTORY) == ([], [])


def test_directories_in_turn(memory: PhysicalMemory) -> None:
    """What agreed once is not compared entry by entry again, until a directory or what is derived changes."""
    other = 0x5000
    _poke(memory, other + 8, TABLE | ALL)
    watch = _watch(memory)
    for _ in range(2):
        assert watch.changes(other) == watch.changes(DIRECTORY) == ([], [])
    _poke(memory, PDE + 4, OTHER | ALL)
    _poke(memory, OTHER, 0xB000 | ALL)
    watch.add(VA + 0x40_0000, OTHER, DIRECTORY)
    assert watch.changes(DIRECTORY) == ([], [])
    assert watch.changes(other) == ([], [(VA >> 22) + 1])
    assert watch.changes(DIRECTORY) == ([], [])
    _poke(memory, other + 8, OTHER | ALL)
    assert watch.changes(DIRECTORY) == ([], [])
    assert watch.changes(other) == ([], [VA >> 22])

"""What the writer publishes is what the reader sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.mirror import (
    PAGE_SIZE,
    RECORD_WORDS,
    SLOT_BYTE,
    SLOT_FORMULA,
    SLOTS,
    Counter,
    MirrorReader,
    MirrorWriter,
    Step,
    page_of,
    slots,
)
from bus.ranges import BadRange, PortRange

RANGE = PortRange("r", 16, widths=(1, 2, 4), mirrored=frozenset(range(16)))


def pair() -> tuple[MirrorWriter, MirrorReader, memoryview]:
    page = memoryview(bytearray(PAGE_SIZE))
    return MirrorWriter(page, slots([RANGE])), MirrorReader(page), page


def test_nothing_published_means_read_synchronously() -> None:
    _, reader, _ = pair()
    assert list(reader.slots[:16]) == [0] * 16


def test_bytes_come_and_go() -> None:
    writer, reader, _ = pair()
    writer.publish({("r", 3): 0xAB, ("r", 4): 0})
    assert reader.slots[3] == SLOT_BYTE | 0xAB
    assert reader.slots[4] == SLOT_BYTE
    writer.publish({("r", 4): 1})
    assert (reader.slots[3], reader.slots[4]) == (0, SLOT_BYTE | 1)


def test_a_new_writer_starts_with_nothing_shown() -> None:
    writer, reader, page = pair()
    writer.publish({("r", 3): 1})
    MirrorWriter(page, slots([RANGE]))
    assert reader.slots[3] == 0


@given(
    start=st.integers(0, 2**32 - 1),
    base=st.integers(0, 2**62),
    freq=st.integers(1, 10**10),
    later=st.integers(0, 10**12),
)
def test_a_counter(start: int, base: int, freq: int, later: int) -> None:
    writer, reader, _ = pair()
    writer.publish({("r", 8): Counter(base, freq, 0xFF_FFFF, 4, start)})
    expected = (start + later * freq // 10**9) & 0xFF_FFFF
    entry = reader.slots[8]
    assert entry & SLOT_FORMULA
    assert not entry & SLOT_BYTE
    assert reader.formula(entry, 4, base + later) == expected
    assert reader.formula(reader.slots[9], 1, base + later) == expected >> 8 & 0xFF
    assert reader.formula(reader.slots[10], 2, base + later) == expected >> 16
    assert reader.formula(reader.slots[10], 4, base + later) is None  # beyond its four bytes


def test_a_step() -> None:
    writer, reader, _ = pair()
    writer.publish({("r", 1): Step(0x10, 0x30, at_ns=500)})
    assert [reader.formula(reader.slots[1], 1, now) for now in (0, 499, 500, 501)] == [0x10, 0x10, 0x30, 0x30]


def test_a_formula_that_changes_is_seen_and_one_that_is_replaced_by_a_byte_too() -> None:
    writer, reader, _ = pair()
    writer.publish({("r", 1): Step(1, 2, 500)})
    assert reader.formula(reader.slots[1], 1, 0) == 1
    writer.publish({("r", 1): Step(3, 4, 500)})
    assert reader.formula(reader.slots[1], 1, 0) == 3
    writer.publish({("r", 1): 9})
    assert reader.slots[1] == SLOT_BYTE | 9


def test_a_formula_that_is_being_written_is_read_synchronously() -> None:
    writer, reader, page = pair()
    writer.publish({("r", 1): Step(1, 2, 500)})
    words = page[SLOTS * 2 :].cast("Q")
    words[0] += 1
    assert reader.formula(reader.slots[1], 1, 0) is None
    assert RECORD_WORDS * 8 * 32 == PAGE_SIZE - SLOTS * 2


def test_two_formulas_have_two_records() -> None:
    writer, reader, _ = pair()
    writer.publish({("r", 1): Step(1, 2, 500), ("r", 2): Step(3, 4, 500)})
    assert reader.formula(reader.slots[1], 1, 0) == 1
    assert reader.formula(reader.slots[2], 1, 0) == 3


def test_a_device_that_publishes_nonsense_is_told_so() -> None:
    writer, _, _ = pair()
    with pytest.raises(ValueError, match="not a byte"):
        writer.publish({("r", 1): 256})
    with pytest.raises(ValueError, match="not declared"):
        writer.publish({("q", 1): 0})
    with pytest.raises(ValueError, match="not declared"):
        writer.publish({("r", 14): Counter(0, 1, 1, 4)})


def test_pages_do_not_touch_each_other() -> None:
    region = memoryview(bytearray(2 * PAGE_SIZE))
    MirrorWriter(page_of(region, 1), slots([RANGE])).publish({("r", 0): 7})
    assert not any(page_of(region, 0))
    assert MirrorReader(page_of(region, 1)).slots[0] == SLOT_BYTE | 7


def test_too_many_registers() -> None:
    with pytest.raises(BadRange, match="slots"):
        slots([PortRange("r", 2000, mirrored=frozenset(range(2000)))])

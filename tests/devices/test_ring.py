"""Rings against a plain bytearray; what a process does again must change nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.ring import HEADER, INPUT, OUTPUT, PIECES, BadRing, ChannelRings, Ring, make_wake, wake, woken

SIZE = 64


def ring(size: int = SIZE) -> Ring:
    return Ring(memoryview(bytearray(HEADER + size)))


@pytest.fixture
def fd() -> Iterator[int]:
    fd = ChannelRings.make("uart0.tx")
    yield fd
    os.close(fd)


def put_all(r: Ring, data: bytes) -> None:
    while data:
        data = r.put(data)


def test_bytes_come_out_in_order_over_the_end() -> None:
    r = ring()
    put_all(r, b"x" * 60)
    r.head += 60
    put_all(r, b"0123456789")
    assert (r.head, r.tail, r.room(), r.peek(100), r.peek(3)) == (60, 70, 54, b"0123456789", b"012")
    assert (r.head, r.used()) == (60, 10)  # to peek takes nothing


def test_a_piece_is_at_most_a_fourth_and_what_has_room() -> None:
    r = ring()
    data = bytes(range(70))
    left = [len(data)]
    while len(rest := r.put(data[-left[-1] :])) < left[-1]:
        left.append(len(rest))
    assert left == [70, 54, 38, 22, 6]
    assert (r.room(), r.peek(SIZE)) == (0, data[:64])


def test_the_last_write_again_changes_nothing() -> None:
    r = ring()
    put_all(r, b"a" * 50)
    r.head = 50
    before, data = r.tail, b"0123456789abcdefghij"
    for _ in range(3):
        r.write_at(before, data)
        assert r.tail == before or r.tail == before + len(data)
        r.tail = before + len(data)
        assert r.peek(SIZE) == data


def test_bytes_count_only_when_the_tail_is_set() -> None:
    r = ring()
    r.write_at(0, b"half")
    assert r.peek(10) == b""
    r.write_at(0, b"whole")
    r.tail = 5
    assert r.peek(10) == b"whole"


def test_bytes_written_in_place_count_when_the_tail_is_set() -> None:
    r = ring()
    put_all(r, bytes(50))
    r.head = 40
    area = r.area()
    assert len(area) == SIZE - 50  # up to the end of the memory
    area[:3] = b"abc"
    assert r.peek(99) == bytes(10)
    r.tail += 3
    assert r.peek(99) == bytes(10) + b"abc"
    r.tail += SIZE - 53
    assert len(r.area()) == r.room() == 40
    r.tail += 40
    assert len(r.area()) == 0


def test_who_is_lazy_is_woken_when_half_is_used() -> None:
    r = ring()
    assert r.hurries()
    r.lazy = True
    put_all(r, bytes(SIZE // 2))
    assert not r.hurries()
    put_all(r, b"x")
    assert r.hurries()


@given(st.integers(0, 1 << 30), st.sampled_from([4, 8, 36, 64]))
def test_as_a_plain_bytearray(seed: int, size: int) -> None:
    rng = random.Random(seed)
    r, said, taken = ring(size), bytearray(), 0
    for _ in range(60):
        match rng.randrange(4):
            case 0:
                data = rng.randbytes(rng.randrange(2 * size))
                said += data[: len(data) - len(r.put(data))]
            case 1:  # a process that is killed anywhere in its write, and another that does it again
                data = rng.randbytes(rng.randrange(min(r.room(), size // PIECES) + 1))
                start = len(said)
                r.write_at(start, data[: rng.randrange(len(data) + 1)])
                r.write_at(start, data)
                r.tail = start + len(data)
                said += data
            case 2:
                data = r.peek(rng.randrange(2 * size))
                assert data == said[taken : taken + len(data)]
                taken += len(data)
                r.head = taken
            case _:
                area = r.area()
                data = rng.randbytes(rng.randrange(len(area) + 1))
                area[: len(data)] = data
                r.tail += len(data)
                said += data
        assert (r.head, r.tail, r.used() + r.room()) == (taken, len(said), size)
    assert r.peek(size) == said[taken:]


def test_both_rings_of_a_channel_are_seen_by_another_mapping(fd: int) -> None:
    mine, others = ChannelRings(fd), ChannelRings(fd)
    assert (mine.output.size, mine.input.size) == (OUTPUT, INPUT)
    put_all(mine.output, b"said")
    put_all(others.input, b"typed")
    assert (others.output.peek(9), mine.input.peek(9)) == (b"said", b"typed")
    assert (mine.input.tail, mine.output.head) == (5, 0)
    mine.output.waiting = True
    assert others.output.waiting
    assert not others.input.waiting


def test_positions_that_cannot_be(fd: int) -> None:
    r = ring()
    for head, tail in ((0, SIZE + 1), (5, 4)):
        r.head, r.tail = head, tail
        with pytest.raises(BadRing, match=f"head {head}, tail {tail} in a ring of 64 bytes"):
            r.peek(1)
    os.ftruncate(fd, 4096)
    with pytest.raises(BadRing, match="size is wrong"):
        ChannelRings(fd)
    with pytest.raises(BadRing, match="version and size"):
        Ring(memoryview(bytearray(b"something else".ljust(HEADER + SIZE))))


def test_wake_ups_add_up_to_one() -> None:
    fd = make_wake()
    woken(fd)  # none
    wake(fd)
    wake(fd)
    assert os.eventfd_read(fd) == 2
    woken(fd)
    os.close(fd)

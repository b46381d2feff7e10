"""Sequence numbers: losses and duplicates are counted; duplicates are dropped. Latency histogram."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.codec import BadFrame
from bus.counters import Counters, Histogram
from bus.frames import Ping
from bus.stream import Stream, id_source


def wire(n: int) -> list[bytes]:
    out = Stream(Counters(), lambda: 0)
    return [out.encode(Ping(), 0, i) for i in range(n)]


def feed(order: list[int]) -> tuple[list[int], Counters]:
    counters = Counters()
    stream, frames = Stream(counters, lambda: 0), wire(max(order) + 1)
    spans = [decoded[0].span for i in order if (decoded := stream.decode(frames[i])) is not None]
    return spans, counters


@pytest.mark.parametrize(
    ("order", "spans", "lost", "duplicated"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 0, 0),
        ([0, 3, 4], [0, 3, 4], 2, 0),
        ([0, 1, 1, 2], [0, 1, 2], 0, 1),
        ([0, 1, 2, 1, 3], [0, 1, 2, 3], 0, 1),
        ([0, 1, 2, 0, 1], [0, 1, 2, 0, 1], 0, 0),  # number 1 again: the peer has started anew
    ],
)
def test_order(order: list[int], spans: list[int], lost: int, duplicated: int) -> None:
    seen, counters = feed(order)
    assert seen == spans
    assert (counters.lost, counters.duplicated) == (lost, duplicated)
    assert counters.frames_in == len(order)


def test_a_bad_frame_is_counted() -> None:
    counters = Counters()
    stream = Stream(counters, lambda: 0)
    with pytest.raises(BadFrame):
        stream.decode(b"\xc1")
    assert (counters.bad_frames, counters.frames_in) == (1, 1)


def test_ids_of_two_nodes_and_of_two_lives_differ() -> None:
    def first(name: str, now: int) -> list[int]:
        ids = id_source(name, now)
        return [next(ids) for _ in range(100)]

    lives = [first("cpu0", 10**9), first("cpu0", 10**9 + 1000), first("uart0", 10**9)]
    assert len({i for life in lives for i in life}) == 300
    assert all(0 < i < 2**64 for life in lives for i in life)


@given(times=st.lists(st.integers(0, 10**12), min_size=1, max_size=200), q=st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_at_most_a_quarter_too_high(times: list[int], q: float) -> None:
    histogram = Histogram()
    for ns in times:
        histogram.add(ns)
    rank = next(i for i in range(1, len(times) + 1) if i >= q * len(times))
    exact = sorted(times)[rank - 1]
    assert exact <= histogram.quantile_ns(q) <= exact * 1.25 + 1


def test_an_empty_histogram_and_a_clock_that_is_behind() -> None:
    histogram = Histogram()
    assert histogram.quantile_ns(0.99) == 0
    histogram.add(-5)
    assert histogram.quantile_ns(0.99) == 0
    assert histogram.count == 1

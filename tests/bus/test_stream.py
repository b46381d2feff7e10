"""Streams: what is dropped, counted, retained, repeated and acknowledged. Latency histogram."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.codec import BadFrame, decode, encode
from bus.counters import Counters, Histogram
from bus.frames import KIND_OF, Ack, Ping
from bus.stream import ACK_EVERY, WINDOW, Need, Stream, id_source


def stream() -> Stream:
    return Stream(Counters(), lambda: 0)


def wire(out: Stream, n: int) -> list[bytes]:
    return [data for i in range(n) if (data := out.encode(Ping(), 0, i)) is not None]


def feed(order: list[int]) -> tuple[list[int | Need], Counters]:
    counters = Counters()
    into, frames = Stream(counters, lambda: 0), wire(stream(), max(order) + 1)
    decoded = [into.decode(frames[i]) for i in order]
    return [d[0].span if isinstance(d, tuple) else d for d in decoded if d is not None], counters


@pytest.mark.parametrize(
    ("order", "results", "lost", "duplicated"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 0, 0),
        ([0, 3, 4], [0, Need.RESUME], 2, 0),  # asked for once
        ([0, 2, 1, 2], [0, Need.RESUME, 1, 2], 1, 0),
        ([0, 2, 1, 3], [0, Need.RESUME, 1, Need.RESUME], 2, 0),
        ([0, 1, 1, 2], [0, 1, 2], 0, 1),
        ([0, 1, 2, 1, 3], [0, 1, 2, 3], 0, 1),
        ([0, 1, 2, 0, 1], [0, 1, 2], 0, 2),
    ],
)
def test_order(order: list[int], results: list[int | Need], lost: int, duplicated: int) -> None:
    seen, counters = feed(order)
    assert seen == results
    assert (counters.lost, counters.duplicated) == (lost, duplicated)
    assert counters.frames_in == len(order)


def test_a_frame_is_retained_until_any_frame_of_the_other_side_acknowledges_it() -> None:
    a, b = stream(), stream()
    for data in wire(a, 3):
        b.decode(data)
    assert a.unacknowledged == 3
    answer = b.encode(Ping(), 0, 7)
    assert answer is not None
    a.decode(answer)
    assert (a.unacknowledged, b.unacknowledged) == (0, 1)
    assert [b.decode(data) for data in a.repeat()] == [None]  # no frame, only an Ack
    assert b.unacknowledged == 0


def test_resume_asks_for_what_was_not_taken_and_for_nothing_else() -> None:
    a, b = stream(), stream()
    frames = wire(a, 5)
    for data in frames[:2]:
        b.decode(data)
    assert a.decode(b.resume()) is Need.REPEAT
    first, *again = a.repeat()
    assert again == frames[2:]
    assert decode(first)[1] == Ack(3)


def test_an_acknowledgement_is_due_when_nothing_else_went_back() -> None:
    a, b = stream(), stream()
    frames = wire(a, 2 * ACK_EVERY)
    due = 0
    for data in frames:
        b.decode(data)
        if (ack := b.acknowledgement()) is not None:
            due += 1
            assert a.decode(ack) is None
    assert (due, a.unacknowledged) == (2, 0)


def test_beyond_the_window_frames_wait_and_go_in_order() -> None:
    a, b = stream(), stream()
    under_way = wire(a, WINDOW + 10)
    assert (len(under_way), a.full) == (WINDOW, True)
    for data in under_way[:4]:
        b.decode(data)
    assert a.decode(b.resume()) is Need.REPEAT
    _, *again = a.repeat()
    assert (len(again), again[:3]) == (WINDOW, under_way[4:7])
    for data in again:
        b.decode(data)
    a.decode(b.resume())
    rest = list(a.take_waiting())
    assert [b.decode(data) is not None for data in rest] == [True] * 6
    assert b.seen == WINDOW + 10


def test_a_stream_goes_on_in_a_new_process() -> None:
    a, b = stream(), stream()
    frames = wire(a, 4)
    b.decode(frames[0])
    again, taker = stream(), stream()
    again.load(a.to_plain())
    taker.load(b.to_plain())
    assert again.decode(taker.resume()) is Need.REPEAT
    assert [taker.decode(data) is not None for data in again.repeat()] == [False, True, True, True]
    more = again.encode(Ping(), 0, 9)
    assert more is not None
    assert taker.decode(more) is not None


def test_what_is_put_off_is_acknowledged_once_it_is_committed() -> None:
    a, b = stream(), stream()
    frames = wire(a, ACK_EVERY + 2)
    for data in frames[:2]:
        b.decode(data)
    b.put_off()
    for data in frames[2:]:
        b.decode(data)
        b.put_off()
    assert b.acknowledgement() is None
    answer = b.encode(Ping(), 0, 9)
    assert answer is not None
    for data in (b.resume(), answer):
        a.decode(data)
    assert a.unacknowledged == ACK_EVERY + 1
    b.caught_up()
    due = b.acknowledgement()
    assert due is not None
    a.decode(due)
    assert (a.unacknowledged, b.acknowledgement()) == (0, None)


def test_a_malformed_frame_behind_what_is_put_off_acknowledges_nothing() -> None:
    a, b = stream(), stream()
    first, _ = wire(a, 2)
    b.decode(first)
    b.put_off()
    with pytest.raises(BadFrame):
        b.decode(encode(Ping(), 2, 0, 0, 0, 0).replace(bytes([KIND_OF[Ping]]), b"\x7f", 1))
    a.decode(b.resume())
    assert (b.seen, a.unacknowledged) == (2, 2)


def test_an_acknowledgement_of_what_was_never_sent_is_no_acknowledgement() -> None:
    a, b = stream(), stream()
    wire(a, 2)
    b.seen = 3
    a.decode(b.resume())
    assert a.unacknowledged == 2


def test_a_bad_frame_is_counted() -> None:
    counters = Counters()
    with pytest.raises(BadFrame):
        Stream(counters, lambda: 0).decode(b"\xc1")
    assert (counters.bad_frames, counters.frames_in) == (1, 1)


def test_a_malformed_frame_is_reported_when_its_turn_comes_and_once() -> None:
    a, b = stream(), stream()
    first, second = wire(a, 2)
    bad = second + b"\xc1"
    spoilt = encode(Ping(), 2, 0, 0, 0, 0).replace(bytes([KIND_OF[Ping]]), b"\x7f", 1)  # an unknown kind
    assert b.decode(spoilt) is Need.RESUME
    assert isinstance(b.decode(first), tuple)
    for _ in range(2):
        with pytest.raises(BadFrame):
            b.decode(bad)  # not even a header: whose turn it is nobody knows
    with pytest.raises(BadFrame):
        b.decode(spoilt)
    assert b.decode(spoilt) is None
    assert b.seen == 2


def test_an_ack_that_was_lost_is_said_again_on_the_next_connection() -> None:
    a, b = stream(), stream()
    for data in wire(a, WINDOW):
        b.decode(data)
        b.acknowledgement()  # lost
    assert a.full
    assert b.decode(a.resume()) is Need.REPEAT
    for data in b.repeat():
        a.decode(data)
    assert not a.full


def test_where_both_windows_are_shut_an_ack_is_due_all_the_same() -> None:
    a, b = stream(), stream()
    there, back = wire(a, WINDOW), wire(b, WINDOW)
    for data in there:
        b.decode(data)
    assert b.encode(Ping(), 0, 0) is None
    for data in back:
        a.decode(data)
    assert a.encode(Ping(), 0, 0) is None
    ack = b.acknowledgement()
    assert ack is not None
    a.decode(ack)
    assert len(list(a.take_waiting())) == 1


def test_a_repetition_that_lacks_its_beginning_is_asked_for_again() -> None:
    a, b = stream(), stream()
    wire(a, 3)
    first, _, last, *_ = a.repeat()
    for data in (first, last):
        needed = b.decode(data)
    assert needed is Need.RESUME
    wire(a, 2)
    first, *_, last = a.repeat()
    assert [b.decode(data) for data in (first, last)] == [None, Need.RESUME]


def test_who_begins_anew_takes_what_is_retained_and_is_taken_for_no_repetition() -> None:
    peer, old = stream(), stream()
    for data in wire(peer, 5):
        old.decode(data)
    wire(old, 2)
    late = list(old.repeat())
    for data in late[:2]:
        peer.decode(data)  # an Ack and a frame; another is under way
    wire(peer, 2)  # not seen by the old one
    new = Stream(Counters(), lambda: 0, base=1000)
    for data in peer.repeat():
        new.decode(data)
    assert new.seen == 7
    assert new.encode(Ping(), 0, 77) is not None
    begin, frame = new.repeat()
    peer.decode(begin)
    assert peer.decode(late[2]) is None  # late
    decoded = peer.decode(frame)
    assert isinstance(decoded, tuple)
    assert decoded[0].span == 77
    new.decode(peer.resume())
    peer.decode(new.resume())
    assert (new.unacknowledged, peer.unacknowledged) == (0, 0)


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

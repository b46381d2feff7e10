"""One direction pair between two nodes: numbers what goes out, checks the numbers of what comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from zlib import crc32

from bus.codec import BadFrame, decode, encode
from bus.counters import Counters
from bus.frames import Frame, Header

Positions = dict[str, tuple[int, int]]  # by connection ("who>whom"): last frames sent and taken, by number


class Stream:
    """Frames to and from one peer. The counters belong to the endpoint."""

    __slots__ = ("_counters", "_now_ns", "_seen", "_sent")

    def __init__(self, counters: Counters, now_ns: Callable[[], int]) -> None:
        self._counters = counters
        self._now_ns = now_ns
        self._sent = 0
        self._seen = 0

    def positions(self) -> tuple[int, int]:
        """Numbers of the last frames sent and taken."""
        return self._sent, self._seen

    def encode(self, frame: Frame, trace: int, span: int) -> bytes:
        self._sent += 1
        self._counters.frames_out += 1
        return encode(frame, self._sent, trace, span, self._now_ns())

    def decode(self, data: bytes) -> tuple[Header, Frame] | None:
        """The frame; None if it is a duplicate, which is dropped. Raises BadFrame. Both are counted."""
        counters = self._counters
        counters.frames_in += 1
        try:
            header, frame = decode(data)
        except BadFrame as error:
            counters.bad_frames += 1
            if error.header is not None:
                self._fresh(error.header.seq)
            raise
        return (header, frame) if self._fresh(header.seq) else None

    def _fresh(self, seq: int) -> bool:
        expected = self._seen + 1
        if seq == expected:
            self._seen = seq
            return True
        if seq == 1:  # the peer has started anew
            self._seen = 1
            return True
        if seq < expected:
            self._counters.duplicated += 1
            return False
        self._counters.lost += seq - expected
        self._seen = seq
        return True


def id_source(node: str, now_ns: int) -> Iterator[int]:
    """Trace and span ids of one node: 24 bits for its name, 40 bits that start at the clock, so that
    neither another node nor a later life of this one allocates the same."""
    return count(((crc32(node.encode()) & 0xFF_FFFF) << 40) + (now_ns & 0x7F_FFFF_FFFF) + 1)

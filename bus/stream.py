"""The protocol by which no frame is lost, doubled or reordered, whatever process ends: one Stream per pair
of nodes.

A state machine without sockets or clocks; who uses it carries its frames. docs/live-swap.md has its rules and
invariants, tests/bus/test_protocol.py explores them.

- Who sends numbers its frames from 1 and retains each until the other side acknowledges it. Every frame
  carries `ack`: the highest number that its sender has committed of the other direction.
- Who receives takes the next number only. A lower one is a duplicate. A higher one is a gap: dropped, and
  answered by Resume. Ack and Resume have number 0: they are in no stream, and repeating them harms nothing.
- When the two are connected (anew), the bound side says Resume, and repeats what it retains; Resume makes
  the other side repeat what it retains. Before a repetition comes an Ack (at a connection that Resume), which
  says which frame is its `first`: so it is noticed if the next ones are lacking, and who is new knows where
  to begin.
- A node without a journal that begins anew under its name numbers its frames from a `base` on that is above
  all that its predecessor sent. With the first repetition, each side goes on where the other one begins.
- No more than WINDOW frames are under way; what comes after them waits among the retained.
- Who commits later what it has taken says so (`put_off`), and acknowledges nothing of that until it has.
- `to_plain` is what must survive a process: a node that commits it together with its state, before any
  frame that the state caused is sent, may end at any point and be started again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum, auto
from itertools import count
from typing import Any
from zlib import crc32

from bus.codec import BadFrame, decode, encode
from bus.counters import Counters
from bus.frames import Ack, Frame, Header, Resume

WINDOW = 400  # frames under way; below HIGH_WATER, so that a socket that is connected takes them all
ACK_EVERY = 32  # frames received without any sent back, then an Ack is due

Plain = tuple[int, int, int, list[bytes]]  # sent, acked, seen, retained


class Need(Enum):
    """What a frame that came asks of the transport."""

    REPEAT = auto()  # send repeat(): the other side has said Resume
    RESUME = auto()  # send resume(): a frame is missing

Positions = dict[str, tuple[int, int]]  # by connection ("who>whom"): last frames sent and taken, by number


class Stream:
    """Frames to and from one peer. The counters belong to the endpoint; the first frame is `base` + 1."""

    __slots__ = ("_acked", "_asked", "_counters", "_now_ns", "_put_off", "_retained", "_sent", "_told",
                 "_under_way", "seen")  # fmt: skip

    def __init__(self, counters: Counters, now_ns: Callable[[], int], base: int = 0) -> None:
        self._counters = counters
        self._now_ns = now_ns
        self._sent = base  # number of the last frame encoded
        self._acked = base  # the other side has committed all up to this
        self._retained: deque[bytes] = deque()  # those after _acked, the last is _sent
        self._under_way = 0  # how many of the retained the transport was given
        self.seen = 0  # number of the last frame taken
        self._put_off: int | None = None  # if what is taken is not all committed: the last frame that is
        self._told = 0  # the last `ack` sent
        self._asked = False  # Resume was said, and the repetition has not come

    def positions(self) -> tuple[int, int]:
        """Numbers of the last frames sent and taken."""
        return self._sent, self.seen

    # --- sending

    def encode(self, frame: Frame, trace: int, span: int) -> bytes | None:
        """Number and retain a frame; the bytes to send, None while the window is full: see take_waiting."""
        self._sent += 1
        self._counters.frames_out += 1
        ack = self._committed
        data = encode(frame, self._sent, ack, trace, span, self._now_ns())
        self._retained.append(data)
        if self._under_way >= WINDOW:
            return None
        self._told = ack  # not by one that waits: where both windows are shut, only an Ack opens them
        self._under_way += 1
        return data

    def take_waiting(self) -> Iterator[bytes]:
        """What the window kept back and now has room for, to be sent."""
        while self._under_way < min(WINDOW, len(self._retained)):
            self._under_way += 1
            yield self._retained[self._under_way - 1]

    def repeat(self) -> Iterator[bytes]:
        """What is retained, from the oldest on, as far as the window goes; to be sent (again). Before it an
        Ack: earlier ones may be lost, and the other side's window be shut for good."""
        yield self._position(Ack(self._acked + 1))
        self._under_way = 0
        yield from self.take_waiting()

    def connected(self) -> Iterator[bytes]:
        """What the bound side says on a new connection: as repeat(), but Resume instead of Ack."""
        yield self._position(Resume(self._acked + 1))
        self._under_way = 0
        yield from self.take_waiting()

    @property
    def full(self) -> bool:
        """The next frame would have to wait for the window."""
        return self._under_way >= WINDOW

    @property
    def unacknowledged(self) -> int:
        """Frames that the other side has not said to have committed."""
        return len(self._retained)

    def resume(self) -> bytes:
        """Resume, encoded: say where the other side's frames are expected from."""
        return self._position(Resume())

    def acknowledgement(self, every: int | None = None) -> bytes | None:
        """An Ack, encoded, if one is due: `every` (ACK_EVERY) frames came with nothing sent back."""
        if self._committed - self._told < (ACK_EVERY if every is None else every):
            return None
        return self._position(Ack())

    def _position(self, frame: Ack | Resume) -> bytes:
        """Encoded: its header says up to where the other side's frames are taken."""
        self._told = self._committed
        return encode(frame, 0, self._told, 0, 0, self._now_ns())

    # --- receiving

    def decode(self, data: bytes) -> tuple[Header, Frame] | Need | None:
        """The frame if it is the next one; None where nothing is left to be done.

        Raises BadFrame, for a frame with a number when it is the next one. What is dropped, and what is
        malformed, is counted.
        """
        counters = self._counters
        counters.frames_in += 1
        bad: BadFrame | None = None
        frame: Frame | None = None
        try:
            header, frame = decode(data)
        except BadFrame as error:
            counters.bad_frames += 1
            if error.header is None or error.header.seq == 0:
                raise
            header, bad = error.header, error
        self._acknowledged(header.ack)
        if header.seq == 0:
            counters.frames_in -= 1  # of the protocol's own
            if isinstance(frame, Ack | Resume) and frame.first:
                self._repetition_from(frame.first)
            if type(frame) is not Resume:
                return None
            self._told = 0  # what was said on an earlier connection may be lost
            return Need.REPEAT
        if self._judge(header.seq):
            if frame is not None:
                return header, frame
            assert bad is not None
            raise bad
        if header.seq <= self.seen:
            return None
        asked, self._asked = self._asked, True
        return None if asked else Need.RESUME

    def _repetition_from(self, first: int) -> None:
        """What comes now begins with this number. What is before it was acknowledged, or is of somebody who
        had the other side's name before it, or is for somebody who had ours: it will not come."""
        self._asked = False
        self.seen = max(self.seen, first - 1)

    def _judge(self, seq: int) -> bool:
        """Is it the next one?"""
        if seq == self.seen + 1:
            self.seen = seq
            self._asked = False
            return True
        if 0 < seq <= self.seen:
            self._counters.duplicated += 1
        elif seq:
            self._counters.lost += 1
        return False

    def _acknowledged(self, ack: int) -> None:
        if self._acked < ack <= self._sent:
            for _ in range(ack - self._acked):
                self._retained.popleft()
            self._under_way = max(0, self._under_way - (ack - self._acked))
            self._acked = ack

    # --- surviving

    @property
    def _committed(self) -> int:
        return self.seen if self._put_off is None else self._put_off

    def put_off(self) -> None:
        """The frame taken last is not committed yet, nor is any after it, until caught_up()."""
        if self._put_off is None:
            self._put_off = self.seen - 1

    def caught_up(self) -> None:
        """All that was taken is committed, or will be before anything more is sent."""
        self._put_off = None

    def to_plain(self) -> Plain:
        return self._sent, self._acked, self.seen, list(self._retained)

    def load(self, plain: Plain | list[Any]) -> None:
        """Go on where a Stream of an earlier process was; everything retained counts as not sent yet."""
        self._sent, self._acked, self.seen, retained = plain
        self._retained = deque(retained)
        self._under_way = 0
        self._told = 0
        self._asked = False
        self._put_off = None


def id_source(node: str, now_ns: int) -> Iterator[int]:
    """Trace and span ids of one node: 24 bits for its name, 40 bits that start at the clock, so that
    neither another node nor a later life of this one allocates the same."""
    return count(((crc32(node.encode()) & 0xFF_FFFF) << 40) + (now_ns & 0x7F_FFFF_FFFF) + 1)

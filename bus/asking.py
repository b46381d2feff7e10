"""The CPU thread's messages: one Target per device it accesses, and what they share.

A Target keeps the posted writes that wait for it and makes synchronous accesses; Asking holds what is
common to all targets of one IoClient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from bus.codec import BadFrame
from bus.counters import Counters
from bus.frames import Frame, Ping, PostedBatch, PostedWrite, Read, Refused
from bus.link import Link
from bus.recorder import ASK, BATCH, Instruction, Recorder
from bus.stream import Need, Stream, id_source

BATCH_WRITES = 64
BATCH_AGE_NS = 2_000_000

OnLate = Callable[[str, Frame, int], None]  # node, what it was asked, time waited in ns
R = TypeVar("R", bound=Frame)

log = logging.getLogger(__name__)


class DeviceGone(RuntimeError):
    """A device has not answered, or not taken a frame, within the deadline."""


class AccessRefused(RuntimeError):
    """A device answered an access with Refused, or with a frame that is no answer to it."""


class Asking:
    """Clock, ids, counters and the list of targets with pending writes."""

    def __init__(
        self, name: str, now_ns: Callable[[], int], deadline_ns: int, on_late: OnLate | None
    ) -> None:
        self.now_ns = now_ns
        self.ids = id_source(name, now_ns())
        self.counters = Counters()
        self.waiting: list[Target] = []  # those whose batch isn't empty
        self.deadline_ns = deadline_ns
        self.deadline_ms = max(1, deadline_ns // 1_000_000)
        self._on_late = on_late
        self.recorder: Recorder | None = None  # while what is asked is to be noted
        self.instruction: Instruction  # set with it
        self.synchronous = self.posted = self.batches = self.refused = 0

    def flush(self) -> None:
        while self.waiting:
            self.waiting[-1].send_batch()

    def late(self, node: str, frame: Frame, waited_ns: int) -> None:
        if self._on_late is None:
            what = type(frame).__name__
            raise DeviceGone(f"{node} has not answered {what} within {waited_ns / 1e9:g} s: {frame}")
        self._on_late(node, frame, waited_ns)


class LatchState:
    """What the CPU thread's own posted operations have made of a register that a read clears (mirror.Latch).

    Operations are counted from 1 on: `known_at` is the last that set or cleared it, and left it as
    `is_set`; `unknown_at` the last whose effect on it only the device knows.
    """

    __slots__ = ("is_set", "known_at", "setter", "unknown_at", "where")

    def __init__(self, region: str, offset: int, setter: int) -> None:
        self.where = region, offset
        self.setter = region, setter
        self.is_set = False
        self.known_at = self.unknown_at = 0


class Target:
    """One device as the CPU thread sees it."""

    __slots__ = ("_asking", "_link", "_live", "_looked", "_name", "_resumes", "_stream", "asked", "batch",
                 "batch_sizes", "dirty", "last", "latches", "mirrored", "node", "oldest_ns",
                 "posted")  # fmt: skip

    def __init__(self, node: str, link: Link, asking: Asking) -> None:
        self.node = node
        self._name = node.encode()
        self.batch: list[PostedWrite] = []  # always this list: writers hold its append
        self.oldest_ns = 0  # when the first write entered the batch
        self.dirty = False  # posted writes may not have taken effect yet
        self.latches: list[LatchState] = []
        self.last: dict[tuple[str, int], int] = {}  # for registers declared `own`: the last posted write
        self.asked = self.mirrored = 0  # accesses
        self.batch_sizes = [0] * (BATCH_WRITES + 1)  # how many batches had so many writes
        self.posted = 0  # operations so far, counted only if there are such
        self._asking = asking
        self._link = link
        self._stream = Stream(asking.counters, asking.now_ns)
        self._live = False  # the device has answered our connection
        self._resumes = self._looked = 0

    def poster(self, region: str, offset: int, width: int, prompt: bool) -> Callable[[int], None]:
        """A function that posts a write of this register."""
        asking, batch, append, now_ns = self._asking, self.batch, self.batch.append, self._asking.now_ns

        def post(value: int) -> None:
            if not batch:
                self.dirty = True
                self.oldest_ns = now_ns()
                asking.waiting.append(self)
                append((region, offset, width, value))
                return
            append((region, offset, width, value))
            if len(batch) >= BATCH_WRITES or now_ns() - self.oldest_ns >= BATCH_AGE_NS:
                self.send_batch()

        def post_and_note(value: int) -> None:
            post(value)
            self.posted = number = self.posted + 1
            for latch in set_by_this:
                latch.is_set, latch.known_at = True, number
            for latch in others:
                latch.unknown_at = number
            if own:
                last[region, offset] = number

        last = self.last
        own = (region, offset) in last and width
        set_by_this = [latch for latch in self.latches if latch.setter == (region, offset) and width]
        others = [latch for latch in self.latches if latch not in set_by_this and width]
        put = post_and_note if self.latches or last else post

        def post_promptly(value: int) -> None:
            put(value)
            asking.flush()  # what it is to start may wait for what was posted to another device

        return post_promptly if prompt else put

    def noter(self, latch: LatchState) -> Callable[[int], None]:
        """A function that posts what the CPU has read from the mirror, which clears the latch."""
        asking = self._asking
        region, offset = latch.where
        post = self.poster(region, offset, 0, False)

        def note(value: int) -> None:
            if asking.recorder is not None:
                asking.recorder.told()
            post(value)
            latch.is_set, latch.known_at = False, self.posted

        return note

    def send_batch(self) -> None:
        """Send the batch, which must not be empty."""
        asking, writes = self._asking, self._take_batch()
        span = next(asking.ids)
        for _ in writes[1:]:  # every write has a span: the batch's and those after it
            next(asking.ids)
        if asking.recorder is not None:
            asking.recorder.long(BATCH, len(writes), self.node, asking.now_ns(), span)
        self._send(PostedBatch(writes), span)
        self._take_all(0)

    def _take_batch(self) -> tuple[PostedWrite, ...]:
        asking, writes = self._asking, tuple(self.batch)
        self.batch.clear()
        asking.waiting.remove(self)
        asking.posted += len(writes)
        asking.batches += 1
        self.batch_sizes[len(writes)] += 1
        return writes

    def tell(self, frame: Frame) -> None:
        """A one-way frame, after what was posted."""
        if self.batch:
            self.send_batch()
        self.dirty = True
        self._send(frame, next(self._asking.ids))
        self._take_all(0)

    def ask(self, frame: Frame, answer: type[R]) -> R:
        """A synchronous access, after everything posted to any device. A Read takes along what waits for
        its own: that is one message, and one operation of the device."""
        asking = self._asking
        carried: tuple[PostedWrite, ...] = ()
        if asking.waiting:
            if self.batch and type(frame) is Read:
                carried = self._take_batch()
                frame = Read(frame.region, frame.offset, frame.width, carried)
            asking.flush()
        asking.synchronous += 1
        self.asked += 1
        span = next(asking.ids)
        for _ in carried:
            next(asking.ids)
        started_ns = asking.now_ns()
        if asking.recorder is not None:
            if carried:
                asking.recorder.long(BATCH, len(carried), self.node, started_ns, span)
            asking.recorder.long(ASK, asking.instruction.at, self.node, started_ns, span)
        self._send(frame, span)
        reply = self._await(frame, span, started_ns)
        asking.counters.latency.add(asking.now_ns() - started_ns)
        self.dirty = False
        if type(reply) is answer:
            return reply
        if isinstance(reply, Refused):
            asking.refused += 1
            raise AccessRefused(f"{self.node} refused {frame}: {reply.reason}")
        raise AccessRefused(f"{self.node} answered {frame} with {reply}")

    def stats(self) -> dict[str, int]:
        """Accesses of this device by class, and its batches."""
        sizes = [(size, count) for size, count in enumerate(self.batch_sizes) if count]
        batches, median, seen = sum(count for _, count in sizes), 0, 0
        for size, count in sizes:
            seen += count
            if 2 * seen >= batches:
                median = size
                break
        return {
            "synchronous": self.asked,
            "posted": sum(size * count for size, count in sizes),
            "mirrored": self.mirrored,
            "batches": batches,
            "batch_p50": median,
            "batch_max": sizes[-1][0] if sizes else 0,
        }

    def positions(self) -> tuple[int, int]:
        """Numbers of the last frames to and from the device, everything that has arrived taken."""
        self._take_all(0)
        return self._stream.positions()

    def close(self, until_ns: int) -> None:
        """Stay until the device has committed what was sent, or until then."""
        asking, span = self._asking, next(self._asking.ids)
        if self._stream.unacknowledged:
            data = self._stream.encode(Ping(), span, span)  # Pong comes behind all that was sent before
            if data is not None and self._live:
                self._link.send(data)
            while asking.now_ns() < until_ns:
                answer = self._link.receive(1)
                if answer is not None and self._take(answer, span) is not None:
                    break
                for waiting in self._stream.take_waiting() if self._live else ():  # the Ping, perhaps
                    self._link.send(waiting)
        self._link.close()

    def attend(self) -> bool:
        """Read what the device says unasked; whether it has said Resume since it was looked at last."""
        self._take_all(0)
        before, self._looked = self._looked, self._resumes
        return self._resumes != before

    def _send(self, frame: Frame, span: int) -> None:
        """Begin a trace with `frame`; waits while the device is far behind."""
        asking, started_ns = self._asking, self._asking.now_ns()
        if not self._live:
            self._take_all(0)
        while self._stream.full and self._stream.unacknowledged:
            data = self._link.receive(asking.deadline_ms)
            if data is None:
                asking.late(self.node, frame, asking.now_ns() - started_ns)
            else:
                self._take(data, 0)
        encoded = self._stream.encode(frame, span, span)
        if encoded is not None and self._live:  # else it goes when the device says Resume
            self._link.send(encoded)

    def _take_all(self, timeout_ms: int) -> None:
        """Take what comes while nothing is asked, before it fills the device's way to us."""
        while (stray := self._link.receive(timeout_ms)) is not None:
            self._take(stray, 0)

    def _await(self, frame: Frame, span: int, started_ns: int) -> Frame:
        asking = self._asking
        while True:
            data = self._link.receive(asking.deadline_ms)
            if data is None:
                asking.late(self.node, frame, asking.now_ns() - started_ns)
            elif (reply := self._take(data, span)) is not None:
                return reply

    def _take(self, data: bytes, span: int) -> Frame | None:
        """The frame if it answers `span`; anything else is logged: a refused batch, a late answer."""
        stream = self._stream
        try:
            decoded = stream.decode(data)
        except BadFrame as error:
            log.warning("%s sent a bad frame: %s", self.node, error)
            return None
        if decoded is None:
            return None
        if isinstance(decoded, Need):
            if decoded is Need.RESUME:
                self._link.send(stream.resume())
            else:
                self._live = True
                self._resumes += 1
                for again in stream.repeat():
                    self._link.send(again)
            return None
        header, frame = decoded
        if self._asking.recorder is not None:
            self._asking.recorder.frame(self._name, data, self._asking.now_ns())
        if header.span == span:
            return frame
        if (acknowledgement := stream.acknowledgement()) is not None:
            self._link.send(acknowledgement)  # the device's window may be shut, with no frame of ours to come
        if isinstance(frame, Refused):
            self._asking.refused += 1
        log.warning("%s sent %s, which answers nothing that waits", self.node, frame)
        return None

"""What a process does while it stands by, so that taking over is nothing new to it.

A process that was just forked shares its memory with others, and copies each page when it first writes there
(a page of Python's objects is written to when it is used). So it does once, with the present state and where
nobody sees it, what it will do first. Left out: devices with DMA, whose step may have left some to be done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bus.counters import Counters
from bus.endpoint import Endpoint, Received
from bus.frames import ApicMessage, Event, Frame, Intr, Line, Ping, Pong
from bus.stream import Stream
from devices.base import Device
from devices.journal import Journal, Record
from devices.outside import Immediately
from devices.slot import Slot


def talk(run_dir: str, node: str) -> None:
    """Have an endpoint, which talks to itself."""
    itself = f"~{node}"
    endpoint = Endpoint(run_dir, itself)
    try:
        endpoint.prepare([itself])
        endpoint.bind()
        endpoint.connect(itself)
        endpoint.send(itself, Ping())
        while not any(isinstance(received.frame, Pong) for received in _taken(endpoint)):
            pass
    finally:
        endpoint.close(0)


def _taken(endpoint: Endpoint) -> Iterator[Received]:
    endpoint.wait(None)
    for received in endpoint.receive():
        if received.asked:
            endpoint.hold()
            endpoint.reply(received, Pong())
            endpoint.release()
        yield received


def step(node: str, cls: type[Device[Any]], settings: Any, irqs: dict[str, int], record: Record) -> None:
    """Make a device with the state of the record, and have it answer a frame.

    Raises StateMismatch, and whatever the class raises.
    """
    fd = Journal.make(f"{node}.rehearsal")
    try:
        outside = _Nobody(Journal(fd))
        slot = Slot(node, cls, settings, irqs, outside, lambda: 0, None,
                    kept=(record.device(), record.slot))  # fmt: skip
        for _ in range(2):
            outside.begin(node, 1)
            slot.handle(Ping())
            outside.journal.latest()
    finally:
        os.close(fd)


class _Nobody(Immediately):
    """An Outside that ends where a process does."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._stream = Stream(Counters(), lambda: 0)
        self._other = Stream(Counters(), lambda: 0)

    def to_controllers(self, frame: Line) -> None:
        self._say(frame)

    def to_boot_cpu(self, frame: Intr) -> None:
        self._say(frame)

    def to_cpus(self, frame: ApicMessage) -> None:
        self._say(frame)

    def to_launcher(self, frame: Event) -> None:
        self._say(frame)

    def output(self, channel: str, data: bytes) -> None:
        pass

    def begin(self, source: str, number: int) -> bool:
        return bool(self.journal.begin(source, number))

    def commit(self, slot: Slot, effects: Sequence[Callable[[], None]], answer: Frame | None) -> None:
        super().commit(slot, effects, answer)
        if answer is not None:
            self._say(answer)
        state = slot.device.state
        streams = {"rehearsal": self._stream.to_plain()}, {"rehearsal": self._other.to_plain()}
        self.journal.commit((type(state).__name__, state.VERSION, state, slot.to_plain(), streams, {}, [], {},
                             (0, None)))  # fmt: skip

    def _say(self, frame: Frame) -> None:
        data = self._stream.encode(frame, 1, 1)
        if data is not None:
            self._other.decode(data)
            self._stream.decode(self._other.resume())

"""Registers that a read clears, and registers that only writes of themselves change: what the CPU thread
knows without asking is what a device that does each access at once would say, however late the device is.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

from bus.addressmap import AddressMap
from bus.fake import LocalLink
from bus.frames import Frame, PostedBatch, PostedWrite, Read, ReadReply, Write, WriteReply
from bus.io import IoClient
from bus.mirror import PAGE_SIZE, Latch, MirrorWriter, slots
from bus.ranges import BadRange, PortRange

DATA, ENABLE, CAUSE, OTHER = range(4)
REGS = PortRange(
    "regs",
    4,
    posted=frozenset({DATA, ENABLE}),
    prompt=frozenset({ENABLE}),
    mirrored=frozenset({ENABLE}),
    own=frozenset({ENABLE}),
    latched=((CAUSE, DATA),),
)
HIGH, LOW = 0xC2, 0xC1


class Logic:
    """Reading CAUSE clears the latch that writing DATA sets, or enabling."""

    def __init__(self) -> None:
        self.enable, self.latch, self.disturbed = 0, False, False

    def write(self, offset: int, value: int) -> None:
        if offset == DATA:
            self.latch = True
        elif offset == ENABLE:
            self.latch |= bool(value and not self.enable)
            self.enable = value
        else:
            self.disturbed = bool(value)

    def read(self, offset: int) -> int:
        if offset != CAUSE:
            return self.enable if offset == ENABLE else 0
        if self.disturbed:
            return 0xC4
        value = HIGH if self.latch and self.enable else LOW
        self.latch &= not self.enable
        return value


class Device:
    """A Logic on the bus, which does what was posted when `serve_some` says so, or when it is asked."""

    def __init__(self, page: memoryview) -> None:
        self.logic, self.writer, self.done = Logic(), MirrorWriter(page, slots([REGS])), 0
        self.waiting: deque[PostedWrite] = deque()
        self.asked = 0
        self.publish()

    def publish(self) -> None:
        logic = self.logic
        values: dict[tuple[str, int], int | Latch] = {("regs", ENABLE): logic.enable}
        if not logic.disturbed:
            values["regs", CAUSE] = Latch(HIGH, LOW, logic.latch) if logic.enable else LOW
        self.writer.publish(values, self.done)

    def serve_some(self, count: int) -> None:
        for _ in range(min(count, len(self.waiting))):
            _, offset, width, value = self.waiting.popleft()
            self.done += 1
            if width:
                self.logic.write(offset, value)
            else:
                self.logic.latch = False
        self.publish()

    def serve(self, frame: Frame) -> Frame | None:
        match frame:
            case PostedBatch(writes):
                self.waiting += writes
                return None
            case Read(_, offset, _, writes):
                self.asked += 1
                self.waiting += writes
                self.serve_some(len(self.waiting))
                answer: Frame = ReadReply(self.logic.read(offset))
            case Write(_, offset, _, value):
                self.serve_some(len(self.waiting))
                self.logic.write(offset, value)
                answer = WriteReply()
            case _:
                raise AssertionError(frame)
        self.publish()
        return answer


def machine() -> tuple[IoClient, Device]:
    page = memoryview(bytearray(PAGE_SIZE))
    device = Device(page)
    amap = AddressMap()
    amap.add_device("dev", (REGS,), {"regs": 0x100}, 0)
    amap = AddressMap.from_plain(amap.to_plain())
    io = IoClient("/nonexistent", "cpu0", amap, page, lambda: 0, lambda *access: None, pic=None, ioapics=[],
                  make_link=lambda peer: LocalLink(device.serve, lambda: 0))
    return io, device


@pytest.mark.parametrize("seed", range(40))
def test_a_late_device_reads_as_one_that_is_never_late(seed: int) -> None:
    rng = random.Random(seed)
    io, device = machine()
    plain = Logic()
    for _ in range(500):
        match rng.choice("dddercccco   "):
            case "d":
                io.port_write(0x100 + DATA, 1, 7)
                plain.write(DATA, 7)
            case "e":
                value = rng.randrange(2)
                io.port_write(0x100 + ENABLE, 1, value)
                plain.write(ENABLE, value)
            case "o":
                value = rng.randrange(2)
                io.port_write(0x100 + OTHER, 1, value)
                plain.write(OTHER, value)
            case "r":
                assert io.port_read(0x100 + ENABLE, 1) == plain.read(ENABLE)
            case "c":
                assert io.port_read(0x100 + CAUSE, 1) == plain.read(CAUSE)
            case _:
                device.serve_some(rng.randrange(4))


def test_sending_a_text_asks_nothing() -> None:
    """As a driver does: cause, 16 characters, and again; the writes and what was read leave in one batch."""
    io, device = machine()
    io.port_write(0x100 + ENABLE, 1, 1)
    device.serve_some(1)
    for _ in range(3):
        assert io.port_read(0x100 + CAUSE, 1) == HIGH
        for character in range(16):
            io.port_write(0x100 + DATA, 1, character)
    assert io.port_read(0x100 + ENABLE, 1) == 1
    assert not device.asked
    assert not device.waiting
    io.flush()
    assert [offset for _, offset, width, _ in device.waiting if not width] == [CAUSE] * 3
    assert io.port_read(0x100 + CAUSE, 1) == HIGH
    assert io.port_read(0x100 + CAUSE, 1) == LOW
    assert not device.asked


def test_what_was_written_to_another_register_is_asked_for() -> None:
    io, device = machine()
    io.port_write(0x100 + ENABLE, 1, 1)
    assert io.port_read(0x100 + CAUSE, 1) == HIGH
    assert device.asked == 1


@pytest.mark.parametrize(
    ("latched", "words"),
    [(((9, 0),), "or outside"), (((1, 0),), "is mirrored"), (((2, 3),), "isn't posted")],
)
def test_declarations_that_make_no_sense(latched: tuple[tuple[int, int], ...], words: str) -> None:
    with pytest.raises(BadRange, match=words):
        PortRange("a", 4, posted=frozenset({0}), mirrored=frozenset({1}), latched=latched)

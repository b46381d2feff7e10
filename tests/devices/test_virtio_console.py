"""The console, by a driver: bytes both ways, as far as there is room, and rule breakers."""

from __future__ import annotations

import struct

from devices.virtio_console import VirtioConsole
from tests.devices.virtio_driver import VERSION_1, Driver

RECEIVE, TRANSMIT = 0, 1
BUFFERS = 0x40000


class Console(Driver):
    def __init__(self, start: bool = True) -> None:
        super().__init__(VirtioConsole, {"backend": "console"})
        if start:
            self.start(VERSION_1, (8, 8))

    def buffer(self, *sizes: int, first: int = 0) -> int:
        """A buffer to receive into, of these parts."""
        pieces = [(BUFFERS + 0x100 * (first + n), size, True) for n, size in enumerate(sizes)]
        head = self.chain(RECEIVE, first, pieces)
        self.offer(RECEIVE, head)
        return head

    def transmit(self, *texts: bytes) -> int:
        for n, text in enumerate(texts):
            self.ram[BUFFERS + 0x1000 + 0x100 * n : BUFFERS + 0x1000 + 0x100 * n + len(text)] = text
        pieces = [(BUFFERS + 0x1000 + 0x100 * n, len(text), False) for n, text in enumerate(texts)]
        head = self.chain(TRANSMIT, 0, pieces)
        self.offer(TRANSMIT, head)
        return head


def test_what_the_registers_say() -> None:
    console = Console(start=False)
    assert [console.r(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 3]
    assert console.features() == VERSION_1 | 1 << 28
    assert console.board.type_in("dev", "in", b"early") == 0


def test_transmit_is_done_when_the_doorbell_returns() -> None:
    console = Console()
    for texts in ((b"hello ",), (b"wor", b"ld"), (b"",)):
        head = console.transmit(*texts)
        assert console.used(TRANSMIT) == [(head, 0)]
        assert console.acknowledge() == 1
    assert console.board.output["dev"] == b"hello world"


def test_receive_takes_what_there_is_room_for() -> None:
    console = Console()
    assert console.board.type_in("dev", "in", b"abc") == 0
    first, second = console.buffer(2, 3, first=0), console.buffer(4, first=2)
    assert console.slot.device.room("in") == 9
    assert console.board.type_in("dev", "in", b"abcd") == 4
    assert console.used(RECEIVE) == [(first, 4)]
    assert console.line
    assert console.ram[BUFFERS : BUFFERS + 2] == b"ab"
    assert console.ram[BUFFERS + 0x100 : BUFFERS + 0x103] == b"cd\0"
    assert console.board.type_in("dev", "in", b"efghij") == 4
    assert console.used(RECEIVE) == [(second, 4)]
    assert console.ram[BUFFERS + 0x200 : BUFFERS + 0x204] == b"efgh"
    assert console.slot.device.room("in") == 0


def test_one_piece_of_input_in_several_buffers() -> None:
    console = Console()
    heads = [console.buffer(3, first=n) for n in range(3)]
    assert console.board.type_in("dev", "in", b"abcdefg") == 7
    assert console.used(RECEIVE) == [(heads[0], 3), (heads[1], 3), (heads[2], 1)]


def test_a_reset_takes_the_buffers_away() -> None:
    console = Console()
    console.buffer(3)
    console.w(0x70, 0)
    assert console.slot.device.room("in") == 0
    assert console.r(0x70) == 0


def test_rule_breakers_get_needs_reset_and_a_second_chance() -> None:
    for queue in (RECEIVE, TRANSMIT):
        console = Console()
        struct.pack_into("<H", console.ram, console.rings[queue].available + 2, 9)
        assert console.slot.device.room("in") == 0
        console.w(0x50, queue)
        assert console.r(0x70) == 0x4F
        assert console.events() == [
            "virtio_console: 9 buffers are available in a queue of 8: "
            "the device waits for a reset by its driver"
        ]
        console.start(VERSION_1, (8, 8))
        console.transmit(b"again")
        assert console.board.output["dev"] == b"again"


def test_a_ring_that_breaks_after_it_was_asked_for_room() -> None:
    console = Console()
    console.buffer(3)
    room = console.slot.device.room("in")
    console.describe(RECEIVE, 0, 1 << 40, 3, 2)
    console.slot.receive("in", b"abc"[:room])
    assert console.r(0x70) == 0x4F
    assert len(console.events()) == 1

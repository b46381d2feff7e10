"""The block device, by a driver: requests of all kinds and shapes, rings that wrap, resets, rule breakers."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from bus.frames import Load, LoadReply, Save, SaveReply
from devices.virtio_blk import F_FLUSH, QUEUE_SIZE, S_IOERR, S_OK, S_UNSUPP, SEG_MAX, VirtioBlk
from devices.virtio_mmio import F_INDIRECT_DESC
from tests.devices.virtio_driver import VERSION_1, Driver, Piece

SECTORS = 64
CONTENT = bytes(n * 31 + (n >> 8) & 0xFF for n in range(SECTORS * 512))
HEADER, DATA, STATUS, TABLE = 0x4000, 0x50000, 0x4800, 0x4900
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8


class Blk(Driver):
    def __init__(self, start: bool = True, features: int = VERSION_1 | F_FLUSH, size: int = 8, **settings: Any
                 ) -> None:  # fmt: skip
        super().__init__(VirtioBlk, {"file": "/images/disk.img", **settings}, {"disk": CONTENT})
        self.disk = self.board.disks["dev"]
        if start:
            self.start(features, (size,))

    def header(self, kind: int, sector: int = 0, n: int = 0) -> Piece:
        struct.pack_into("<IIQ", self.ram, HEADER + 16 * n, kind, 0, sector)
        self.ram[STATUS + n] = 0xEE
        return HEADER + 16 * n, 16, False

    def status(self, n: int = 0) -> Piece:
        return STATUS + n, 1, True

    def request(self, kind: int, sector: int, *data: Piece, first: int = 0, n: int = 0) -> int:
        """A chain; its head."""
        return self.chain(0, first, [self.header(kind, sector, n), *data, self.status(n)])

    def do(self, kind: int, sector: int, *data: Piece) -> tuple[int, int]:
        """One request alone: (status, length)."""
        head = self.request(kind, sector, *data)
        self.offer(0, head)
        ((used, length),) = self.used(0)
        assert used == head
        return self.ram[STATUS], length


def test_what_the_registers_say() -> None:
    blk = Blk(start=False)
    assert [blk.r(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 2]
    assert blk.features() == VERSION_1 | F_INDIRECT_DESC | 1 << 1 | 1 << 2 | 1 << 6 | F_FLUSH
    assert blk.r(0x100) | blk.r(0x104) << 32 == SECTORS
    assert (blk.r(0x10C), blk.r(0x114), blk.r(0x114, 1), blk.r(0x116, 2)) == (SEG_MAX, 512, 0, 0)
    assert [blk.r(offset) for offset in (0x34, 0x60, 0x70, 0xFC, 0xB0)] == [QUEUE_SIZE, 0, 0, 0, 0xFFFFFFFF]
    blk.w(0x30, 1)
    assert (blk.r(0x34), blk.r(0x44)) == (0, 0)
    blk.w(0x14, 2)
    assert blk.r(0x10) == 0
    assert Blk(start=False, read_only=True).features() & 1 << 5


@pytest.mark.parametrize("features", [0, 1 << 28, VERSION_1 | 1 << 13, VERSION_1 | 1 << 34])
def test_features_that_are_not_offered_or_too_few_are_not_ok(features: int) -> None:
    assert not Blk(start=False).negotiate(features)


def test_in_and_out() -> None:
    blk = Blk()
    assert blk.do(IN, 3, (DATA, 512, True), (DATA + 0x1000, 1024, True)) == (S_OK, 1537)
    assert blk.ram[DATA : DATA + 512] + blk.ram[DATA + 0x1000 : DATA + 0x1400] == CONTENT[1536:3072]
    blk.ram[DATA : DATA + 1024] = b"x" * 1024
    assert blk.do(OUT, SECTORS - 2, (DATA, 1024, False)) == (S_OK, 1)
    assert blk.disk.contents["disk"] == CONTENT[:-1024] + b"x" * 1024
    assert [r.kind for r in blk.disk.done] == ["read", "write"]


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 511])
def test_header_data_and_status_may_be_cut_anywhere(cut: int) -> None:
    """[2.7.4.1]: a device must not rely on how descriptors are used."""
    blk = Blk(size=64)
    blk.header(OUT, 5)
    blk.ram[HEADER + 16 : HEADER + 16 + 512] = b"y" * 512
    whole = 16 + 512
    parts = [(HEADER + at, min(cut, whole - at), False) for at in range(0, whole, cut)]
    if cut == 1:
        parts = [(HEADER, 1, False), (HEADER + 1, 15, False), (HEADER + 16, 512, False)]
    blk.offer(0, blk.chain(0, 0, [*parts, blk.status()]))
    assert (blk.used(0), blk.ram[STATUS]) == ([(0, 1)], S_OK)
    assert blk.disk.contents["disk"][5 * 512 : 6 * 512] == b"y" * 512
    blk.header(IN, 5)
    blk.offer(0, blk.chain(0, 0, [(HEADER, 16, False), (DATA, cut, True), (DATA + cut, 513 - cut, True)]))
    assert (blk.used(0), blk.ram[DATA + 512]) == ([(0, 513)], S_OK)
    assert blk.ram[DATA : DATA + 512] == b"y" * 512


def test_flush_and_writes_without_it() -> None:
    blk = Blk()
    assert blk.do(FLUSH, 0) == (S_OK, 1)
    assert [r.kind for r in blk.disk.done] == ["flush"]
    through = Blk(features=VERSION_1)  # a driver that does not know FLUSH [5.2.6.2]
    assert through.do(OUT, 0, (DATA, 512, False)) == (S_OK, 1)
    assert [r.kind for r in through.disk.done] == ["write", "flush"]


def test_get_id() -> None:
    blk = Blk()
    assert blk.do(GET_ID, 0, (DATA, 20, True)) == (S_OK, 21)
    assert blk.ram[DATA : DATA + 20] == b"disk.img".ljust(20, b"\0")
    named = Blk(id="a name that is longer than twenty")
    assert named.do(GET_ID, 0, (DATA, 8, True), (DATA + 8, 20, True)) == (S_OK, 21)
    assert named.ram[DATA : DATA + 21] == b"a name that is longe\0"


def test_what_the_device_does_not_do() -> None:
    blk = Blk()
    assert blk.do(11, 0, (DATA, 16, False)) == (S_UNSUPP, 1)  # discard
    assert blk.do(99, 0) == (S_UNSUPP, 1)
    assert blk.do(IN, SECTORS, (DATA, 512, True)) == (S_IOERR, 1)
    assert blk.do(IN, 1 << 63, (DATA, 512, True)) == (S_IOERR, 1)
    assert blk.do(OUT, SECTORS - 1, (DATA, 1024, False)) == (S_IOERR, 1)
    assert blk.do(IN, 0, (DATA, 100, True)) == (S_IOERR, 1)
    assert blk.disk.done == []
    assert blk.disk.contents["disk"] == CONTENT
    assert blk.events() == []


def test_a_disk_that_may_only_be_read() -> None:
    blk = Blk(read_only=True)
    assert blk.do(OUT, 0, (DATA, 512, False)) == (S_IOERR, 1)
    assert blk.do(IN, 0, (DATA, 512, True)) == (S_OK, 513)
    assert blk.disk.contents["disk"] == CONTENT


@pytest.mark.parametrize("kind", [IN, OUT, FLUSH])
def test_an_error_of_the_host_is_the_drivers_and_the_users(kind: int) -> None:
    blk = Blk(features=VERSION_1 | (F_FLUSH if kind != OUT else 0))
    blk.disk.errors["disk"].append("write of /images/disk.img: No space left on device")
    data = () if kind == FLUSH else ((DATA, 512, kind == IN),)
    assert blk.do(kind, 0, *data)[0] == S_IOERR
    assert blk.events() == ["virtio_blk: write of /images/disk.img: No space left on device"]
    assert blk.do(kind, 0, *data)[0] == S_OK
    assert blk.r(0x70) == 0xF


def test_indirect_descriptors() -> None:
    blk = Blk(features=VERSION_1 | F_FLUSH | F_INDIRECT_DESC)
    parts = [blk.header(IN, 0), *((DATA + 512 * n, 512, True) for n in range(20)), blk.status()]
    for n, (pa, size, writable) in enumerate(parts):
        more = n + 1 < len(parts)
        struct.pack_into("<QIHH", blk.ram, TABLE + 16 * n, pa, size, 2 * writable | more, n + 1)
    blk.describe(0, 7, TABLE, 16 * len(parts), 4)
    blk.offer(0, 7)
    assert blk.used(0) == [(7, 20 * 512 + 1)]
    assert blk.ram[DATA : DATA + 20 * 512] == CONTENT[: 20 * 512]


def test_rings_and_indices_wrap() -> None:
    """Indices are 16 bits [2.7.6]: the device has used 65,530 buffers, and goes on."""
    blk = Blk()
    saved = blk.slot.handle(Save())
    assert isinstance(saved, SaveReply)
    (queue,) = saved.state["device"]["fields"]["queues"]
    queue["next_avail"] = queue["next_used"] = 65530
    assert blk.slot.handle(Load(saved.state)) == LoadReply()
    ring = blk.rings[0]
    ring.offered = ring.seen = 65530
    struct.pack_into("<H", blk.ram, ring.used + 2, 65530)
    rng = random.Random(7)
    for first in range(30):  # the ring of 8 wraps, too
        sectors = [rng.randrange(SECTORS) for _ in range(rng.randrange(3))]
        heads = [blk.request(IN, sector, (DATA + 512 * n, 512, True), first=first + 3 * n, n=n)
                 for n, sector in enumerate(sectors)]  # fmt: skip
        blk.offer(0, *heads)
        assert blk.used(0) == [(head, 513) for head in heads]
        for n, sector in enumerate(sectors):
            got = blk.ram[DATA + 512 * n : DATA + 512 * n + 512]
            assert got == CONTENT[512 * sector : 512 * sector + 512]
    assert 10 < ring.offered < 100
    assert struct.unpack_from("<H", blk.ram, ring.used + 2) == (ring.offered,)


def test_many_requests_at_once_one_interrupt() -> None:
    blk = Blk(size=64)
    heads = [blk.request(IN, n, (DATA + 512 * n, 512, True), first=3 * n, n=n) for n in range(20)]
    lines: list[bool] = []
    blk.slot._outside.to_controllers = lambda frame: lines.append(frame.level)  # type: ignore[method-assign]
    blk.offer(0, *heads)
    assert [head for head, _ in blk.used(0)] == heads
    assert blk.ram[DATA : DATA + 20 * 512] == CONTENT[: 20 * 512]
    assert lines == [True]
    assert blk.acknowledge() == 1
    assert lines == [True, False, True]  # more was used since the line rose: an edge for that
    assert blk.acknowledge() == 1
    assert lines == [True, False, True, False]
    assert blk.acknowledge() == 0


def test_a_driver_that_wants_no_interrupts_gets_none_until_it_does() -> None:
    blk = Blk()
    blk.no_interrupts(0, True)
    blk.do(IN, 0, (DATA, 512, True))
    assert (blk.line, blk.r(0x60)) == (False, 0)
    blk.no_interrupts(0, False)
    blk.do(IN, 0, (DATA, 512, True))
    assert (blk.line, blk.acknowledge(), blk.line) == (True, 1, False)


def test_a_driver_that_changes_its_mind_while_the_request_is_done() -> None:
    """It says yes after the device has looked, but looks at the ring before the element is there: no hang."""
    blk = Blk()
    blk.no_interrupts(0, True)
    head = blk.request(IN, 0, (DATA, 512, True))
    blk.offer(0, head, notify=False)
    blk.w(0x50, 0)
    blk.io.flush()
    blk.no_interrupts(0, False)  # before the device looks again
    blk.board.advance(0)
    assert blk.line
    assert blk.used(0) == [(head, 513)]


def test_reset_in_the_middle() -> None:
    """Completions that come after the reset belong to nobody, also when the same buffer is in use again."""
    blk = Blk()
    device, wiring = blk.slot.device, blk.slot
    asked: list[Any] = []
    wiring.ask_disk = asked.append  # type: ignore[method-assign]
    for n in range(2):
        blk.offer(0, blk.request(IN, n, (DATA, 512, True), first=3 * n, n=n))
    blk.start(VERSION_1 | F_FLUSH)
    blk.offer(0, blk.request(IN, 7, (DATA, 512, True)))
    before = blk.slot.handle(Save())
    device.disk_done("disk", asked[0].tag, "")
    device.disk_done("disk", asked[1].tag, "")
    assert blk.slot.handle(Save()) == before
    assert blk.used(0) == []
    device.disk_done("disk", asked[2].tag, "")
    blk.slot._settle()
    assert blk.used(0) == [(0, 513)]
    assert (blk.line, blk.r(0x60)) == (True, 1)
    blk.w(0x70, 0)
    assert (blk.line, blk.r(0x60), blk.r(0x70), blk.r(0x44)) == (False, 0, 0, 0)


def broken_index(blk: Blk) -> None:
    struct.pack_into("<H", blk.ram, blk.rings[0].available + 2, 9)


def broken_head(blk: Blk) -> None:
    blk.offer(0, 8, notify=False)


def broken_loop(blk: Blk) -> None:
    for n in range(8):
        blk.describe(0, n, DATA, 1, 1, (n + 1) % 8)
    blk.offer(0, 0, notify=False)


def broken_next(blk: Blk) -> None:
    blk.describe(0, 0, DATA, 16, 1, 999)
    blk.offer(0, 0, notify=False)


def broken_order(blk: Blk) -> None:
    blk.offer(0, blk.chain(0, 0, [blk.status(), blk.header(IN)]), notify=False)


def broken_memory(blk: Blk) -> None:
    blk.offer(0, blk.request(IN, 0, (1 << 62, 512, True)), notify=False)


def broken_header(blk: Blk) -> None:
    blk.offer(0, blk.chain(0, 0, [(HEADER, 15, False), blk.status()]), notify=False)


def broken_no_status(blk: Blk) -> None:
    blk.offer(0, blk.chain(0, 0, [blk.header(OUT)]), notify=False)


def broken_empty_status(blk: Blk) -> None:
    blk.offer(0, blk.chain(0, 0, [blk.header(OUT), (STATUS, 0, True)]), notify=False)


def broken_indirect_not_negotiated(blk: Blk) -> None:
    blk.describe(0, 0, TABLE, 32, 4)
    blk.offer(0, 0, notify=False)


def broken_twice(blk: Blk) -> None:
    blk.slot.ask_disk = lambda request: None  # type: ignore[method-assign]
    head = blk.request(IN, 0, (DATA, 512, True))
    blk.offer(0, head, head, notify=False)


def broken_ring_place(blk: Blk) -> None:
    blk.w(0x44, 0)
    blk.w(0x94, 1)
    blk.w(0x44, 1)


BREAKERS = [value for name, value in dict(globals()).items() if name.startswith("broken_")]


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda breaker: breaker.__name__)
def test_rule_breakers_get_needs_reset_and_a_second_chance(breaker: Callable[[Blk], None]) -> None:
    blk = Blk()
    ask = blk.slot.ask_disk
    breaker(blk)
    blk.w(0x50, 0)
    blk.flush()
    (text,) = blk.events()
    assert text.startswith("virtio_blk: ")
    assert text.endswith(": the device waits for a reset by its driver")
    assert blk.r(0x70) == 0x4F
    assert (blk.line, blk.r(0x60)) == (True, 2)  # a change of configuration: look at the status [2.1.2]
    blk.w(0x50, 0)  # nothing more comes of it
    blk.flush()
    assert (blk.events(), blk.disk.done) == ([], [])
    blk.slot.ask_disk = ask  # type: ignore[method-assign]
    blk.start(VERSION_1 | F_FLUSH)
    assert blk.do(IN, 1, (DATA, 512, True)) == (S_OK, 513)
    assert blk.ram[DATA : DATA + 512] == CONTENT[512:1024]


@pytest.mark.parametrize("size", [0, 3, 512])
def test_queue_sizes_that_cannot_be(size: int) -> None:
    blk = Blk(start=False)
    assert blk.negotiate(VERSION_1)
    blk.w(0x38, size)
    blk.w(0x44, 1)
    assert blk.r(0x44) == 0
    assert blk.r(0x70) & 0x40


def test_another_disk_of_another_size_is_a_change_of_configuration() -> None:
    blk = Blk()
    saved = blk.slot.handle(Save())
    assert isinstance(saved, SaveReply)
    other = Driver(VirtioBlk, {"file": "b"}, {"disk": CONTENT[:-512]})
    assert other.slot.handle(Load(saved.state)) == LoadReply()
    assert (other.r(0x100), other.r(0x60), other.r(0xFC), other.line) == (SECTORS - 1, 2, 1, True)
    same = Driver(VirtioBlk, {"file": "b"}, {"disk": CONTENT})
    assert same.slot.handle(Load(saved.state)) == LoadReply()
    assert (same.r(0x100), same.r(0x60), same.r(0xFC), same.line) == (SECTORS, 0, 0, False)

"""IoClient: which frames an access becomes, in which order, and what it returns."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from itertools import count

import pytest

from bus.addressmap import AddressMap
from bus.asking import BATCH_AGE_NS, BATCH_WRITES, Asking, Target
from bus.counters import Counters
from bus.fake import LocalLink
from bus.frames import (
    Eoi,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    Ping,
    Pong,
    PostedBatch,
    Read,
    ReadReply,
    Refused,
    StringIn,
    StringInReply,
    StringOut,
    StringOutReply,
    Write,
    WriteReply,
)
from bus.io import STRING_BYTES, AccessRefused, DeviceGone, IoClient
from bus.mirror import PAGE_SIZE, Counter, MirrorWriter, page_of, slots
from bus.ranges import IoRange, MmioRange, PortRange
from bus.stream import WINDOW as UNDER_WAY
from bus.stream import Stream

REGS = PortRange(
    "regs",
    16,
    widths=(1, 2, 4),
    posted=frozenset({0, 1, 2, 3}),
    prompt=frozenset({3}),
    mirrored=frozenset({4, 5, 6, 8, 9, 10, 11}),
    relaxed=frozenset({6}),
)
BYTES = PortRange("regs", 4)
WINDOW = MmioRange("window", 0x20, widths=(4,))


class Device:
    """Serves frames from a dictionary of register bytes and publishes them, as a host would."""

    def __init__(self, ranges: tuple[IoRange, ...], mirror: memoryview) -> None:
        self.ranges = {r.name: r for r in ranges}
        self.registers: dict[tuple[str, int], int] = {}
        self.writer = MirrorWriter(mirror, slots(ranges))
        self.vector: int | None = 0x30
        self.counter: Counter | None = None
        self.publish()

    def serve(self, frame: Frame) -> Frame | None:
        answer = self._serve(frame)
        self.publish()
        return answer

    def publish(self) -> None:
        values: dict[tuple[str, int], int | Counter] = {
            (r.name, offset): self.registers.get((r.name, offset), 0)
            for r in self.ranges.values()
            for offset in r.mirrored
        }
        if self.counter:
            values = {key: value for key, value in values.items() if key[1] < 8}
            values["regs", 8] = self.counter
        self.writer.publish(values)

    def _get(self, region: str, offset: int, width: int) -> int:
        assert self.ranges[region].accepts(offset, width)
        return sum(self.registers.get((region, offset + i), 0) << 8 * i for i in range(width))

    def _put(self, region: str, offset: int, width: int, value: int) -> None:
        assert self.ranges[region].accepts(offset, width)
        for i in range(width):
            self.registers[region, offset + i] = value >> 8 * i & 0xFF

    def _serve(self, frame: Frame) -> Frame | None:
        match frame:
            case Read(region, offset, width, writes):
                self._serve(PostedBatch(writes))
                return ReadReply(self._get(region, offset, width))
            case Write(region, offset, width, value):
                self._put(region, offset, width, value)
                return WriteReply()
            case PostedBatch(writes):
                for region, offset, width, value in writes:
                    self._put(region, offset, width, value)
                return None
            case StringIn(region, offset, width, count):
                return StringInReply(self._get(region, offset, width).to_bytes(width, "little") * count)
            case StringOut(region, offset, width, data):
                self._put(region, offset, width, int.from_bytes(data[-width:], "little"))
                return StringOutReply()
            case IntAck():
                return IntAckReply(self.vector)
            case Eoi():
                return None
        return Refused("what?")


class Rig:
    """`a` has REGS at 0x100, `b` BYTES at 0x110 and WINDOW at 0xF000_0000."""

    def __init__(self, on_late: Callable[[str, Frame, int], None] | None = None) -> None:
        self.now = 1000
        self.open_bus: list[tuple[str, int, int, bool, int]] = []
        mirror = memoryview(bytearray(2 * PAGE_SIZE))
        self.a = Device((REGS,), page_of(mirror, 0))
        self.b = Device((BYTES, WINDOW), page_of(mirror, 1))
        amap = AddressMap()
        amap.add_device("a", (REGS,), {"regs": 0x100}, 0)
        amap.add_device("b", (BYTES, WINDOW), {"regs": 0x110, "window": 0xF000_0000}, 1)
        self.links: dict[str, LocalLink] = {}
        self.io = IoClient(
            "/nonexistent",
            "cpu0",
            amap,
            mirror,
            lambda: self.now,
            lambda *access: self.open_bus.append(access),
            pic="b",
            ioapics=["a"],
            on_late=on_late,
            make_link=self._link,
        )

    def _link(self, peer: str) -> LocalLink:
        self.links[peer] = LocalLink({"a": self.a, "b": self.b}[peer].serve, lambda: self.now)
        return self.links[peer]

    def sent(self, peer: str) -> list[Frame]:
        frames = list(self.links[peer].sent)
        self.links[peer].sent.clear()
        return frames


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_posted_write_waits_for_flush(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 0xAA)
    rig.io.port_write(0x100, 2, 0xBBCC)
    assert rig.sent("a") == []
    assert rig.io.pending
    rig.io.flush()
    assert rig.sent("a") == [PostedBatch((("regs", 0, 1, 0xAA), ("regs", 0, 2, 0xBBCC)))]
    assert not rig.io.pending
    rig.io.flush()
    assert rig.sent("a") == []


def test_every_batch_goes_before_a_synchronous_access_to_anyone(rig: Rig) -> None:
    rig.io.port_write(0x101, 1, 1)
    assert rig.io.port_read(0x110, 1) == 0
    assert rig.sent("a") == [PostedBatch((("regs", 1, 1, 1),))]
    rig.io.port_write(0x101, 1, 2)
    rig.io.port_write(0x10C, 1, 3)  # offset 12 is synchronous
    assert rig.sent("a") == [PostedBatch((("regs", 1, 1, 2),)), Write("regs", 12, 1, 3)]


def test_a_full_batch_leaves_by_itself(rig: Rig) -> None:
    for i in range(BATCH_WRITES + 1):
        rig.io.port_write(0x100, 1, i)
    (batch,) = rig.sent("a")
    assert isinstance(batch, PostedBatch)
    assert [w[3] for w in batch.writes] == list(range(BATCH_WRITES))
    assert rig.io.pending


def test_an_old_batch_leaves_with_the_next_write(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 1)
    rig.now += BATCH_AGE_NS - 1
    rig.io.port_write(0x100, 1, 2)
    assert rig.sent("a") == []
    rig.now += 1
    rig.io.port_write(0x100, 1, 3)
    (batch,) = rig.sent("a")
    assert isinstance(batch, PostedBatch)
    assert len(batch.writes) == 3


def test_a_prompt_write_takes_the_batch_along(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 1)
    rig.io.port_write(0x103, 1, 2)
    assert rig.sent("a") == [PostedBatch((("regs", 0, 1, 1), ("regs", 3, 1, 2)))]
    assert not rig.io.pending


def test_a_mirrored_read_sends_nothing(rig: Rig) -> None:
    rig.a.registers["regs", 4] = 0x5A
    rig.a.publish()
    assert rig.io.port_read(0x104, 1) == 0x5A
    assert rig.sent("a") == []


def test_a_mirrored_read_after_a_posted_write_is_synchronous_until_one_answer_came(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 1)
    rig.io.flush()
    rig.sent("a")
    assert rig.io.port_read(0x104, 1) == 0
    assert rig.sent("a") == [Read("regs", 4, 1)]
    assert rig.io.port_read(0x104, 1) == 0
    assert rig.sent("a") == []


def test_a_relaxed_read_does_not_wait_for_posted_writes(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 1)
    assert rig.io.port_read(0x106, 1) == 0
    assert rig.sent("a") == []
    assert rig.io.pending


def test_wide_mirrored_reads(rig: Rig) -> None:
    rig.a.registers |= {("regs", 4): 0x11, ("regs", 5): 0x22, ("regs", 8): 1, ("regs", 11): 0x80}
    rig.a.publish()
    assert rig.io.port_read(0x104, 2) == 0x2211
    assert rig.io.port_read(0x108, 4) == 0x8000_0001
    assert rig.sent("a") == []
    assert rig.io.port_read(0x104, 4) == 0x2211  # offset 7 is not mirrored
    assert rig.sent("a") == [Read("regs", 4, 4)]


def test_a_counter_is_computed_here(rig: Rig) -> None:
    rig.a.counter = Counter(base_ns=1000, freq_hz=10**9, mask=0xFFFF_FFFF, width=4, start=5)
    rig.a.publish()
    rig.now = 1000 + 0x1234
    assert rig.io.port_read(0x108, 4) == 0x1239
    assert rig.io.port_read(0x109, 1) == 0x12
    assert rig.sent("a") == []


def test_a_register_that_is_not_shown_is_read_synchronously(rig: Rig) -> None:
    rig.a.writer.publish({})
    assert rig.io.port_read(0x104, 1) == 0
    assert rig.sent("a") == [Read("regs", 4, 1)]


def test_without_a_mirror_all_is_synchronous(rig: Rig) -> None:
    amap = AddressMap()
    amap.add_device("a", (REGS,), {"regs": 0x100}, 0)
    link = LocalLink(rig.a.serve, lambda: 0)
    io = IoClient(
        "/", "cpu0", amap, None, lambda: 0, lambda *a: None, pic=None, ioapics=(), make_link=lambda _: link
    )
    io.port_read(0x104, 1)
    assert link.sent == [Read("regs", 4, 1)]


def test_wide_accesses_are_split_for_narrow_devices(rig: Rig) -> None:
    rig.io.port_write(0x110, 4, 0x44332211)
    assert rig.sent("b") == [Write("regs", i, 1, 0x11 * (i + 1)) for i in range(4)]
    assert rig.io.port_read(0x110, 4) == 0x44332211
    assert rig.io.port_read(0x111, 2) == 0x3322


def test_misaligned_accesses_are_split(rig: Rig) -> None:
    rig.io.port_write(0x10D, 2, 0x2211)
    assert rig.sent("a") == [Write("regs", 13, 1, 0x11), Write("regs", 14, 1, 0x22)]


def test_an_access_across_two_devices(rig: Rig) -> None:
    rig.io.port_write(0x10E, 4, 0x44332211)
    assert rig.sent("a") == [Write("regs", 14, 2, 0x2211)]
    assert rig.sent("b") == [Write("regs", 0, 1, 0x33), Write("regs", 1, 1, 0x44)]
    assert rig.open_bus == []


def test_open_bus(rig: Rig) -> None:
    assert rig.io.port_read(0x200, 1) == 0xFF
    assert rig.io.port_read(0x200, 4) == 0xFFFF_FFFF
    rig.io.port_write(0x200, 2, 0x1234)
    rig.io.mmio_write(0xE000_0000, 4, 7)
    assert rig.io.mmio_read(0xE000_0000, 2) == 0xFFFF
    assert rig.open_bus == [
        ("port", 0x200, 1, False, 0xFF),
        ("port", 0x200, 4, False, 0xFFFF_FFFF),
        ("port", 0x200, 2, True, 0x1234),
        ("mmio", 0xE000_0000, 4, True, 7),
        ("mmio", 0xE000_0000, 2, False, 0xFFFF),
    ]


def test_half_owned_and_half_open(rig: Rig) -> None:
    rig.b.registers["regs", 3] = 0x77
    assert rig.io.port_read(0x113, 2) == 0xFF77
    assert rig.open_bus == [("port", 0x114, 1, False, 0xFF)]


def test_mmio(rig: Rig) -> None:
    rig.io.mmio_write(0xF000_0010, 4, 0x1020_3040)
    assert rig.io.mmio_read(0xF000_0010, 4) == 0x1020_3040
    assert rig.sent("b") == [Write("window", 0x10, 4, 0x1020_3040), Read("window", 0x10, 4)]
    assert rig.io.owns_mmio(0xF000_001F)
    assert not rig.io.owns_mmio(0xF000_0020)
    assert rig.io.mmio_read(0xF000_0010, 1) == 0xFF  # narrower than anything it takes
    assert rig.open_bus == [("mmio", 0xF000_0010, 1, False, 0xFF)]


def test_open_bus_in_memory_is_not_remembered(rig: Rig) -> None:
    for pa in range(0xE000_0000, 0xE000_1000, 4):
        rig.io.mmio_read(pa, 4)
    assert len(rig.io._mmio_readers) == 0


def test_strings(rig: Rig) -> None:
    rig.b.registers["regs", 0] = 0x42
    assert rig.io.port_in_string(0x110, 1, 5) == b"BBBBB"
    rig.io.port_out_string(0x110, 1, b"xyz")
    assert rig.sent("b") == [StringIn("regs", 0, 1, 5), StringOut("regs", 0, 1, b"xyz")]
    assert rig.b.registers["regs", 0] == ord("z")


def test_long_strings_travel_in_parts_and_empty_ones_not_at_all(rig: Rig) -> None:
    assert len(rig.io.port_in_string(0x110, 1, STRING_BYTES + 1)) == STRING_BYTES + 1
    assert [f.count for f in rig.sent("b") if isinstance(f, StringIn)] == [STRING_BYTES, 1]
    rig.io.port_out_string(0x110, 1, bytes(2 * STRING_BYTES))
    assert len(rig.sent("b")) == 2
    assert rig.io.port_in_string(0x110, 1, 0) == b""
    rig.io.port_out_string(0x110, 1, b"")
    assert rig.sent("b") == []


def test_strings_that_the_device_does_not_take_whole_are_single_accesses(rig: Rig) -> None:
    assert rig.io.port_in_string(0x110, 2, 3) == bytes(6)
    assert rig.sent("b") == [Read("regs", 0, 1), Read("regs", 1, 1)] * 3
    rig.io.port_out_string(0x200, 2, b"\x01\x02\x03\x04")
    assert rig.open_bus == [("port", 0x200, 2, True, 0x0201), ("port", 0x200, 2, True, 0x0403)]


def test_a_string_goes_after_what_was_posted(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 9)
    rig.io.port_out_string(0x100, 1, b"ab")
    assert [type(f) for f in rig.sent("a")] == [PostedBatch, StringOut]


def test_int_ack(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 9)
    assert rig.io.int_ack() == 0x30
    assert rig.sent("b") == [IntAck()]
    assert not rig.io.pending  # what was posted went first
    rig.b.vector = None
    assert rig.io.int_ack() is None


def test_eoi_goes_to_the_io_apic_after_what_was_posted_to_it(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 9)
    rig.io.eoi(0x31)
    assert rig.sent("a") == [PostedBatch((("regs", 0, 1, 9),)), Eoi(0x31)]
    assert rig.io.port_read(0x104, 1) == 0
    assert rig.sent("a") == [Read("regs", 4, 1)]  # an EOI may change what is mirrored


def test_refused(rig: Rig) -> None:
    rig.b.serve = lambda frame: Refused("no such thing")  # type: ignore[method-assign]
    rig.links["b"]._serve = rig.b.serve
    with pytest.raises(AccessRefused, match=r"b refused Read.*no such thing"):
        rig.io.port_read(0x110, 1)
    rig.links["b"]._serve = lambda frame: Intr(True)
    with pytest.raises(AccessRefused, match="answered"):
        rig.io.port_read(0x110, 1)


def test_a_refused_batch_is_counted_and_disturbs_no_later_answer(rig: Rig) -> None:
    serve = rig.a.serve
    rig.links["a"]._serve = lambda f: Refused("no") if isinstance(f, PostedBatch) else serve(f)
    rig.io.port_write(0x100, 1, 9)
    rig.io.flush()
    assert rig.io.port_read(0x10C, 1) == 0
    assert rig.io.stats()["refused"] == 1


def test_a_device_that_is_silent() -> None:
    rig = Rig()
    rig.links["b"]._serve = lambda frame: None
    with pytest.raises(DeviceGone, match="b has not answered Read"):
        rig.io.port_read(0x110, 1)


def test_with_on_late_the_wait_goes_on_and_is_visible() -> None:
    waits: list[tuple[str, Frame]] = []

    def on_late(node: str, frame: Frame, waited_ns: int) -> None:
        waits.append((node, frame))
        if len(waits) == 3:
            link = rig.links["b"]
            link._answers.append(link._stream.encode(ReadReply(0x99), 0, span[0]))

    rig = Rig(on_late)
    span: list[int] = []
    ids = rig.io._asking.ids
    span.append(next(ids) + 1)
    rig.links["b"]._serve = lambda frame: None
    assert rig.io.port_read(0x110, 1) == 0x99
    assert waits == [("b", Read("regs", 0, 1))] * 3


def test_each_posted_write_has_a_span(rig: Rig) -> None:
    before = next(rig.io._asking.ids)
    for i in range(5):
        rig.io.port_write(0x100, 1, i)
    rig.io.flush()
    assert next(rig.io._asking.ids) == before + 6


def test_stats(rig: Rig) -> None:
    rig.io.port_write(0x100, 1, 1)
    rig.io.port_write(0x100, 1, 2)
    rig.io.port_read(0x110, 1)
    stats = rig.io.stats()
    assert {k: stats[k] for k in ("posted", "batches", "synchronous", "frames_out", "frames_in")} == {
        "posted": 2,
        "batches": 1,
        "synchronous": 1,
        "frames_out": 2,
        "frames_in": 1,
    }


@pytest.mark.parametrize("seed", range(20))
def test_classes_of_io_cannot_be_told_apart_by_what_is_read(seed: int) -> None:
    """The same random accesses give the same values as on a machine without batches and mirror."""
    rng = random.Random(seed)
    rig = Rig()
    plain: dict[int, int] = {}
    for _ in range(400):
        width = rng.choice((1, 2, 4))
        port = rng.randrange(0x100, 0x115 - width)
        if rng.random() < 0.5:
            value = rng.getrandbits(8 * width)
            rig.io.port_write(port, width, value)
            plain |= {port + i: value >> 8 * i & 0xFF for i in range(width)}
        elif not {port - 0x100 + i for i in range(width)} & REGS.relaxed:
            expected = sum(plain.get(port + i, 0) << 8 * i for i in range(width))
            assert rig.io.port_read(port, width) == expected
        rig.now += rng.randrange(BATCH_AGE_NS)


class SlowDevice:
    """A Link whose device begins to take frames when `begun` is set, one at each look for an answer."""

    def __init__(self) -> None:
        self.begun = False
        self.taken: list[Frame] = []
        self._stream = Stream(Counters(), lambda: 0)
        self._sent: deque[bytes] = deque()
        self._answers: deque[bytes | None] = deque([self._stream.resume()])

    def send(self, data: bytes) -> None:
        self._sent.append(data)

    def receive(self, timeout_ms: int) -> bytes | None:
        if self.begun and self._sent:
            decoded = self._stream.decode(self._sent.popleft())
            if decoded is None:  # the Ack before what is repeated
                return None
            assert isinstance(decoded, tuple)
            self.taken.append(decoded[1])
            if isinstance(decoded[1], Ping):
                self._answers.append(self._stream.encode(Pong(), decoded[0].trace, decoded[0].span))
            self._answers.append(self._stream.acknowledgement())
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        self.begun = False


def test_who_leaves_stays_until_a_device_behind_a_full_window_has_taken_everything() -> None:
    link, looks = SlowDevice(), count()
    target = Target("dev", link, Asking("cpu0.io", lambda: next(looks), 10**9, None))
    for n in range(UNDER_WAY):
        target.tell(Eoi(n & 0xFF))
    link.begun = True
    target.close(until_ns=100 * UNDER_WAY)
    assert [type(frame) for frame in link.taken] == [Eoi] * UNDER_WAY + [Ping]
    assert next(looks) < 50 * UNDER_WAY

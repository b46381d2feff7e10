"""One device plugged in, without sockets: what each frame does, and in which order effects leave."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from bus.frames import (
    ApicMessage,
    Eoi,
    Event,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    Line,
    Load,
    LoadReply,
    Ping,
    Pong,
    PostedBatch,
    Read,
    ReadReply,
    Refused,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    Shutdown,
    StringIn,
    StringInReply,
    StringOut,
    StringOutReply,
    Write,
    WriteReply,
)
from bus.mirror import PAGE_SIZE, SLOT_BYTE, MirrorReader, MirrorWriter, slots
from devices.base import Device
from devices.fake import Board, Part
from devices.outside import Immediately
from devices.slot import STRING_MAX, TIMERS_PER_TURN, Slot
from tests.devices.parts import Gadget, GadgetSettings, Hub


class Rig(Immediately):
    """A slot; `effects` holds what left it, each with the mirror byte of scratch register 8 at that time."""

    def __init__(self, cls: type[Device[Any]] = Gadget, settings: Any = None) -> None:
        self.now = 0
        self.effects: list[tuple[Any, int]] = []
        page = memoryview(bytearray(PAGE_SIZE))
        self.reader = MirrorReader(page)
        self.slot_of = slots((*cls.PORTS, *cls.MMIO))
        self.slot = Slot(
            "dev",
            cls,
            settings or cls.SETTINGS(),
            {"line": 5},
            self,
            lambda: self.now,
            MirrorWriter(page, self.slot_of),
        )

    def _note(self, what: Any) -> None:
        slot = self.slot_of.get(("regs", 8))
        self.effects.append((what, self.reader.slots[slot] & 0xFF if slot is not None else 0))

    def to_controllers(self, frame: Line) -> None:
        self._note(frame)

    def to_boot_cpu(self, frame: Intr) -> None:
        self._note(frame)

    def to_cpus(self, frame: ApicMessage) -> None:
        self._note(frame)

    def to_launcher(self, frame: Event) -> None:
        self._note(frame)

    def output(self, channel: str, data: bytes) -> None:
        self._note((channel, data))

    def took(self) -> list[Any]:
        effects = [what for what, _ in self.effects]
        self.effects.clear()
        return effects


def test_reads_and_writes() -> None:
    slot = Rig().slot
    assert slot.handle(Write("regs", 8, 4, 0x44332211)) == WriteReply()
    assert slot.handle(Read("regs", 10, 2)) == ReadReply(0x4433)
    assert slot.handle(Read("window", 8, 4)) == ReadReply(0x1234_0008)
    assert slot.handle(PostedBatch((("regs", 8, 1, 1), ("regs", 9, 1, 2)))) is None
    assert slot.handle(Read("regs", 8, 4)) == ReadReply(0x44330201)


def test_strings() -> None:
    rig = Rig(settings=GadgetSettings(depth=100))
    rig.slot.receive("in", b"hello")
    assert rig.slot.handle(StringIn("regs", 2, 1, 7)) == StringInReply(b"hello\0\0")
    assert rig.slot.handle(StringOut("regs", 1, 1, b"abc")) == StringOutReply()
    assert rig.took()[-1] == ("out", b"abc")
    assert rig.slot.handle(StringIn("window", 0, 4, 2)) == StringInReply(bytes.fromhex("0000341200003412"))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Read("nowhere", 0, 1), "no region 'nowhere'"),
        (Read("regs", 12, 1), "takes no 1-byte access at offset 12"),
        (Read("regs", 0, 3), "takes no 3-byte access"),
        (Read("regs", 1, 2), "takes no 2-byte access at offset 1"),
        (Read("window", 0, 1), "takes no 1-byte access"),
        (Write("regs", 0, 1, 256), "does not fit into 1 byte"),
        (PostedBatch((("regs", 8, 1, 1), ("regs", 99, 1, 1))), "takes no"),
        (StringIn("regs", 0, 1, STRING_MAX + 1), "too long"),
        (StringOut("regs", 8, 2, b"abc"), "no string of 2-byte values"),
        (Line(1, True, "x.y"), "not an interrupt controller"),
        (IntAck(), "not an interrupt controller"),
        (Eoi(3), "not an interrupt controller"),
        (Load({}), "not a saved device"),
        (Load({"device": {}, "inputs": []}), "no state record"),
        (Load({"device": {}, "inputs": 3}), "input lines"),
        (Pong(), "no use for Pong"),
        (Shutdown(), "no use for Shutdown"),
    ],
)
def test_refusals(frame: Frame, words: str) -> None:
    rig = Rig()
    before = rig.slot.handle(Save())
    answer = rig.slot.handle(frame)
    assert isinstance(answer, Refused)
    assert words in answer.reason
    assert rig.slot.handle(Save()) == before  # nothing of it was done


def test_effects_leave_in_order_after_the_mirror_shows_what_belongs_to_them() -> None:
    rig = Rig()
    rig.slot.handle(
        PostedBatch((("regs", 0, 1, 1), ("regs", 1, 1, 0x41), ("regs", 7, 1, 0), ("regs", 8, 1, 0x77)))
    )
    assert rig.effects == [
        (Line(5, True, "dev.line"), 0x77),
        (("out", b"A"), 0x77),
        (Event("log", "event 0"), 0x77),
    ]


def test_a_line_that_rises_and_falls_within_one_operation_has_not_moved() -> None:
    rig = Rig()
    high, low = ("regs", 0, 1, 1), ("regs", 0, 1, 0)
    rig.slot.handle(PostedBatch((high, ("regs", 1, 1, 0x41), low)))
    assert rig.took() == [("out", b"A")]
    rig.slot.handle(PostedBatch((high, low, high)))
    assert rig.took() == [Line(5, True, "dev.line")]
    rig.slot.handle(PostedBatch((low, high)))  # an edge
    assert rig.took() == [Line(5, False, "dev.line"), Line(5, True, "dev.line")]
    rig.slot.handle(PostedBatch((low, high, low)))
    assert rig.took() == [Line(5, False, "dev.line")]


def test_a_read_does_the_writes_it_carries_first() -> None:
    rig = Rig()
    assert rig.slot.handle(Read("regs", 8, 1, (("regs", 8, 1, 1), ("regs", 8, 1, 7)))) == ReadReply(7)
    answer = rig.slot.handle(Read("regs", 8, 1, (("regs", 8, 1, 3), ("regs", 99, 1, 1))))
    assert isinstance(answer, Refused)
    assert rig.slot.handle(Read("regs", 8, 1)) == ReadReply(7)


def test_a_line_is_sent_only_when_it_changes() -> None:
    rig = Rig()
    for level in (0, 1, 1, 1, 0, 0):
        rig.slot.handle(Write("regs", 0, 1, level))
    assert rig.took() == [Line(5, True, "dev.line"), Line(5, False, "dev.line")]


def test_the_mirror_follows_every_operation() -> None:
    rig = Rig()
    assert rig.reader.slots[rig.slot_of["regs", 8]] == SLOT_BYTE
    rig.slot.handle(Write("regs", 8, 1, 0xAB))
    assert rig.reader.slots[rig.slot_of["regs", 8]] == SLOT_BYTE | 0xAB
    rig.slot.receive("in", b"xy")
    assert rig.reader.slots[rig.slot_of["regs", 3]] == SLOT_BYTE | 2
    rig.slot.handle(Reset())
    assert rig.reader.slots[rig.slot_of["regs", 3]] == SLOT_BYTE


def test_timers() -> None:
    rig = Rig()
    assert rig.slot.next_deadline_ns() is None
    rig.slot.handle(Write("regs", 4, 1, 5))
    assert rig.slot.next_deadline_ns() == 5_000_000
    rig.now = 4_999_999
    rig.slot.run_timers()
    assert rig.took() == []
    rig.now = 5_000_000
    rig.slot.run_timers()
    assert rig.took() == [Line(5, True, "dev.line")]
    assert rig.slot.next_deadline_ns() is None
    rig.slot.handle(Write("regs", 4, 1, 5))
    rig.slot.handle(Write("regs", 4, 1, 0))
    assert rig.slot.next_deadline_ns() is None


def test_a_timer_that_is_always_due_does_not_shut_out_the_bus() -> None:
    class Eager(Gadget):
        def timer(self, name: str) -> None:
            self.state.ticks += 1

        def drive_lines(self) -> None:
            self.wiring.set_timer("due", 1)

    rig = Rig(Eager)
    rig.now = 10
    for _ in range(3 * TIMERS_PER_TURN):
        rig.slot.run_timers()
        rig.slot.device.drive_lines()
    assert rig.slot.handle(Read("regs", 5, 1)) == ReadReply(3 * TIMERS_PER_TURN)


def test_save_and_load_survive_the_wire_and_drive_everything_again() -> None:
    old = Rig(settings=GadgetSettings(depth=100))
    old.slot.handle(Write("regs", 0, 1, 1))
    old.slot.handle(Write("regs", 4, 1, 7))
    old.slot.handle(Write("regs", 8, 4, 0x01020304))
    old.slot.receive("in", b"abc")
    reply = old.slot.handle(Save())
    assert isinstance(reply, SaveReply)
    new = Rig(settings=GadgetSettings(depth=100))
    assert new.slot.handle(Load(msgpack.unpackb(msgpack.packb(reply.state)))) == LoadReply()
    assert new.slot.handle(Save()) == reply
    assert new.took() == [Line(5, True, "dev.line")]
    assert new.slot.next_deadline_ns() == 7_000_000
    assert new.reader.slots[new.slot_of["regs", 8]] == SLOT_BYTE | 4
    new.slot.handle(Load(reply.state))  # the same again: the lines are said again
    assert new.took() == [Line(5, True, "dev.line")]


@pytest.mark.parametrize("spoil", ["drop", "add", "type", "version", "kind"])
def test_a_foreign_state_is_refused_and_the_old_one_stays(spoil: str) -> None:
    rig = Rig()
    rig.slot.handle(Write("regs", 4, 1, 7))
    reply = rig.slot.handle(Save())
    assert isinstance(reply, SaveReply)
    state = msgpack.unpackb(msgpack.packb(reply.state))
    record = state["device"]
    match spoil:
        case "drop":
            del record["fields"]["ticks"]
        case "add":
            record["fields"]["more"] = 1
        case "type":
            record["fields"]["ticks"] = "many"
        case "version":
            record["version"] = 99
        case "kind":
            record["kind"] = "OtherState"
    answer = rig.slot.handle(Load(state))
    assert isinstance(answer, Refused)
    assert rig.took() == []
    assert rig.slot.handle(Save()) == reply
    assert rig.slot.next_deadline_ns() == 7_000_000


def test_a_controller_sees_the_or_of_the_drivers_of_a_line() -> None:
    rig = Rig(Hub)
    slot = rig.slot
    assert rig.took() == [Intr(False)]
    for frame in (
        Line(3, True, "a.x"),
        Line(3, True, "b.x"),
        Line(3, False, "a.x"),
        Line(3, True, "b.x"),
    ):
        assert slot.handle(frame) is None
    assert slot.line_level(3)
    assert rig.took() == [Intr(True)]
    slot.handle(Line(3, False, "b.x"))
    assert not slot.line_level(3)
    assert slot.device.state.seen == [[3, 1], [3, 0]]
    assert rig.took() == [Intr(False)]


class PuttingOff(Rig):
    """Takes what need not be committed at once."""

    put_offs = 0

    def put_off(self) -> bool:
        self.put_offs += 1
        return True


def test_only_a_frame_of_which_nothing_is_seen_is_put_off() -> None:
    rig = PuttingOff(Hub)
    slot, seen = rig.slot, []
    for frame in (Line(3, True, "a.x"), Line(4, True, "a.y"), Line(3, False, "a.x"), Ping(),
                  Eoi(1), Line(4, False, "a.y")):  # fmt: skip
        before = rig.put_offs
        slot.handle(frame)
        seen.append(rig.put_offs == before)
    assert seen == [True, False, False, True, True, True]
    assert slot.device.state.seen == [[3, 1], [4, 1], [3, 0], [4, 0]]


def test_a_change_of_the_mirror_is_seen_and_so_is_a_count_of_writes() -> None:
    rig = PuttingOff(settings=GadgetSettings(depth=100))
    rig.slot.handle(PostedBatch((("regs", 8, 1, 0),)))  # the page says how many were posted
    rig.slot.handle(PostedBatch((("regs", 8, 1, 7),)))
    rig.slot.receive("in", b"x")
    rig.slot.handle(Write("regs", 4, 1, 1))
    rig.now = 1 << 40
    rig.slot.run_timers()
    assert rig.put_offs == 0


def test_int_ack_happens_only_while_int_is_high() -> None:
    slot = Rig(Hub).slot
    assert slot.handle(IntAck()) == IntAckReply(None)
    slot.handle(Line(3, True, "a.x"))
    assert slot.handle(IntAck()) == IntAckReply(0x23)


def test_eoi_and_apic_messages() -> None:
    rig = Rig(Hub)
    rig.took()
    assert rig.slot.handle(Eoi(0x41)) is None
    assert rig.took() == [ApicMessage(0x41, 0, 0xFF, 0, True, True)]


def test_a_controllers_inputs_survive_reset_and_load() -> None:
    rig = Rig(Hub)
    rig.slot.handle(Line(3, True, "a.x"))
    assert rig.slot.handle(Reset()) == ResetReply()
    assert rig.slot.line_level(3)
    reply = rig.slot.handle(Save())
    assert isinstance(reply, SaveReply)
    new = Rig(Hub)
    new.took()
    new.slot.handle(Load(msgpack.unpackb(msgpack.packb(reply.state))))
    assert new.slot.line_level(3)
    assert new.took() == [Intr(True)]
    new.slot.handle(Line(3, True, "a.x"))  # the device drives it again: no change
    assert new.took() == []


def test_reset_and_ping() -> None:
    rig = Rig()
    rig.slot.handle(Write("regs", 0, 1, 1))
    assert rig.slot.handle(Reset()) == ResetReply()
    assert rig.took() == [Line(5, True, "dev.line"), Line(5, False, "dev.line")]
    assert rig.slot.handle(Ping()) == Pong()


def test_a_devices_own_exception_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        Rig().slot.handle(Read("regs", 6, 1))


def test_a_value_too_wide_for_the_access_is_the_devices_error() -> None:
    class Wide(Gadget):
        def read(self, region: str, offset: int, width: int) -> int:
            return 0x100

    with pytest.raises(ValueError, match="gave 0x100 for 1 bytes"):
        Rig(Wide).slot.handle(Read("regs", 0, 1))


def test_a_line_that_is_not_wired_leads_nowhere_and_an_unknown_one_is_an_error() -> None:
    class Typo(Gadget):
        def drive_lines(self) -> None:
            self.wiring.set_irq("lien", True)

    with pytest.raises(ValueError, match="no line 'lien'"):
        Rig(Typo)
    board = Board([Part("g", Gadget, {"regs": 0x300, "window": 0xF000_0000})])
    board.io.port_write(0x300, 1, 1)
    assert board.io.port_read(0x300, 1) == 1


def test_a_board() -> None:
    board = Board(
        [
            Part("g", Gadget, {"regs": 0x300, "window": 0xF000_0000}, {"line": 5}),
            Part("hub", Hub, {"regs": 0x20}),
        ],
        pic="hub",
        ioapics=["hub"],
    )
    board.io.port_write(0x301, 1, 0x41)
    assert board.output == {}
    board.io.port_write(0x304, 1, 3)
    assert board.output == {"g": b"A"}
    board.advance(2_999_999)
    assert not board.intr
    board.advance(1)
    assert board.intr
    assert board.io.int_ack() == 0x25
    board.io.port_write(0x300, 1, 0)
    assert not board.intr
    assert board.io.int_ack() is None
    assert board.type_in("g", "in", b"abcdef") == 4
    assert board.io.port_read(0x303, 1) == 4
    board.io.eoi(0x25)
    assert [m.vector for m in board.apic_messages] == [0x25]
    board.io.port_write(0x307, 1, 9)
    assert board.events == [Event("log", "event 9")]

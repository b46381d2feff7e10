"""The devices of a PC together, as a guest's CPU sees them through a real IoClient."""

from __future__ import annotations

from devices.acpi_pm import AcpiPm
from devices.fake import Board, Part
from devices.i8042 import I8042
from devices.ioapic import IoApic
from devices.pic8259 import Pic8259
from devices.pit8254 import Pit8254
from devices.postcode import PostCode
from devices.rtc_cmos import RtcCmos
from devices.uart16550 import Uart16550

COM1, PIC1, PIC2, IOAPIC, PM_TMR = 0x3F8, 0x20, 0xA0, 0xFEC0_0000, 0x608
NS = 1_000_000_000
START_NS = 5_000 * NS


def pc() -> Board:
    parts = [
        Part("uart0", Uart16550, {"regs": COM1}, {"intr": 4}),
        Part("pic", Pic8259, {"master": PIC1, "slave": PIC2, "elcr": 0x4D0}),
        Part("ioapic", IoApic, {"regs": IOAPIC}),
        Part("pit", Pit8254, {"counters": 0x40, "port_b": 0x61}, {"out0": 0}),
        Part("rtc", RtcCmos, {"regs": 0x70}, {"irq": 8}, {"wall_offset_ns": 0}),
        Part("kbd", I8042, {"data": 0x60, "command": 0x64, "port_a": 0x92}, {"kbd": 1}),
        Part("post", PostCode, {"post": 0x80, "debug": 0xE9}),
        Part("pm", AcpiPm, {"pm": 0x600}, {"sci": 9}),
    ]
    return Board(parts, pic="pic", ioapics=["ioapic"], now_ns=START_NS)


def out(board: Board, port: int, *values: int) -> None:
    for value in values:
        board.io.port_write(port, 1, value)


def init_pics(board: Board) -> None:
    out(board, PIC1, 0x11)
    out(board, PIC1 + 1, 0x30, 0x04, 0x01, 0x00)
    out(board, PIC2, 0x11)
    out(board, PIC2 + 1, 0x38, 0x02, 0x01, 0x00)
    board.io.flush()


def synchronous(board: Board) -> int:
    count: int = board.io.stats()["synchronous"]
    return count


def test_a_polled_console_needs_no_round_trip() -> None:
    """serial8250_console_putchar: LSR until empty, MSR, then THR."""
    board = pc()
    out(board, COM1 + 3, 0x03)
    board.io.port_read(COM1 + 6, 1)
    before = synchronous(board)
    for byte in b"x" * 1000:
        assert board.io.port_read(COM1 + 5, 1) & 0x20
        assert board.io.port_read(COM1 + 6, 1) & 0x10
        out(board, COM1, byte)
    board.io.flush()
    assert board.output["uart0"] == b"x" * 1000
    assert synchronous(board) == before
    assert board.io.stats()["batches"] <= 1000 // 64 + 5


def test_timer_tick_through_the_8259_costs_one_round_trip() -> None:
    board = pc()
    init_pics(board)
    out(board, 0x43, 0x34)
    out(board, 0x40, 4773 & 0xFF, 4773 >> 8)
    board.io.flush()
    assert board.io.int_ack() == 0x30  # OUT0 rose when the mode was set
    out(board, PIC1, 0x60)
    before = synchronous(board)
    for tick in range(1, 11):
        board.advance(4_002_000)
        assert board.intr
        assert board.io.int_ack() == 0x30
        mask = board.io.port_read(PIC1 + 1, 1)  # mask_and_ack_8259A
        out(board, PIC1 + 1, mask | 1)
        out(board, PIC1, 0x60)
        out(board, PIC1 + 1, mask)
        board.io.flush()
        assert not board.intr
        assert synchronous(board) == before + tick


def test_typing_reaches_the_guest_by_interrupt() -> None:
    board = pc()
    init_pics(board)
    out(board, COM1 + 3, 0x83)
    out(board, COM1, 1)
    out(board, COM1 + 1, 0)
    out(board, COM1 + 3, 0x03)
    out(board, COM1 + 2, 0xC7)
    out(board, COM1 + 4, 0x0B)
    out(board, COM1 + 1, 0x05)
    assert board.type_in("uart0", "rx", b"ls\r") == 3
    board.advance(1_000_000)
    assert board.io.int_ack() == 0x34
    assert board.io.port_read(COM1 + 2, 1) == 0xCC
    line = bytearray()
    while board.io.port_read(COM1 + 5, 1) & 0x01:
        line.append(board.io.port_read(COM1, 1))
    assert line == b"ls\r"
    assert board.io.port_read(COM1 + 2, 1) == 0xC1
    out(board, PIC1, 0x64)
    board.advance(NS)
    assert not board.intr


def test_keyboard_and_rtc_interrupt_through_both_chips() -> None:
    board = pc()
    init_pics(board)
    out(board, 0x70, 0x0B)
    out(board, 0x71, 0x12)
    out(board, 0x70, 0x0C)
    board.io.port_read(0x71, 1)
    board.type_in("kbd", "keys", b"\x1c")
    assert board.io.int_ack() == 0x31
    assert board.io.port_read(0x60, 1) == 0x1E
    out(board, PIC1, 0x61)
    board.advance(NS)
    assert board.io.int_ack() == 0x38


def test_the_same_lines_reach_the_io_apic() -> None:
    board = pc()
    out(board, PIC1 + 1, 0xFF)
    for pin, low in ((1, 0x31), (2, 0x30), (9, 0x8039)):
        board.io.mmio_write(IOAPIC, 4, 0x10 + 2 * pin)
        board.io.mmio_write(IOAPIC + 0x10, 4, low)
    out(board, 0x43, 0x34)
    out(board, 0x40, 4773 & 0xFF, 4773 >> 8)
    board.advance(8_002_000)
    board.type_in("kbd", "keys", b"\x1c")
    board.io.port_write(0x602, 2, 0x0100)
    board.type_in("pm", "buttons", b"p")
    assert [m.vector for m in board.apic_messages] == [0x30, 0x30, 0x30, 0x31, 0x39]
    board.io.eoi(0x39)
    assert board.apic_messages[-1].vector == 0x39, "the line is still high"
    board.io.port_write(0x600, 2, 0x0100)
    count = len(board.apic_messages)
    board.io.eoi(0x39)
    assert len(board.apic_messages) == count
    assert not board.intr


def test_clocks_are_read_without_a_message() -> None:
    board = pc()
    before = synchronous(board)
    ticks = []
    for _ in range(100):
        ticks.append(board.io.port_read(PM_TMR, 4))
        board.advance(1_000_000)
    assert synchronous(board) == before
    assert ticks == sorted(ticks)
    assert abs(ticks[-1] - 99 * 3_579_545 // 1000) <= 1


def test_tsc_calibration_polls_out2_without_messages() -> None:
    """pit_calibrate_tsc: gate off and on, 10 ms in mode 0, poll bit 5 of port 61h."""
    board = pc()
    out(board, 0x61, board.io.port_read(0x61, 1) & ~0x02 | 0x01)
    latch = 1_193_182 // 100
    out(board, 0x43, 0xB0)
    out(board, 0x42, latch & 0xFF, latch >> 8)
    board.io.port_read(0x61, 1)
    started_ns, before, polls = board.clock_ns, synchronous(board), 0
    while not board.io.port_read(0x61, 1) & 0x20:
        board.advance(2_000)
        polls += 1
    assert polls > 4_000
    assert synchronous(board) == before
    assert abs(board.clock_ns - started_ns - NS // 100) < 20_000


def test_power_off_and_reset_reach_the_launcher() -> None:
    board = pc()
    board.io.port_write(0x604, 2, 5 << 10 | 0x2000)
    out(board, 0x64, 0xFE)
    out(board, 0x60C, 1)
    assert [event.kind for event in board.events] == ["poweroff", "reset", "reset"]

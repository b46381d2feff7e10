"""8254 and port B against the data sheet's timing diagrams, in clocks."""

from __future__ import annotations

import pytest

from bus.mirror import Step
from devices.pit8254 import REFRESH_NS, Pit8254
from devices.pit_counter import CLOCK_HZ
from tests.devices.rig import START_NS, Rig

CONTROL = 3
NS = 1_000_000_000
START_CLOCK = START_NS * CLOCK_HZ // NS


def make() -> Rig[Pit8254]:
    return Rig(Pit8254, "counters")


def program(pit: Rig[Pit8254], counter: int, mode: int, count: int, bcd: int = 0) -> None:
    pit.w(CONTROL, counter << 6 | 0x30 | mode << 1 | bcd)
    pit.w(counter, count & 0xFF)
    pit.w(counter, count >> 8)


def at_clock(pit: Rig[Pit8254], clock: int) -> None:
    """Go past the clock-th CLK pulse since START_NS; the first one loads a count written then."""
    pit.advance((2 * (START_CLOCK + clock) + 1) * NS // (2 * CLOCK_HZ) - pit.wiring.clock_ns)


def value(pit: Rig[Pit8254], counter: int) -> int:
    pit.w(CONTROL, counter << 6)
    low = pit.r(counter)
    return low | pit.r(counter) << 8


def out(pit: Rig[Pit8254], counter: int) -> bool:
    """The OUT pin, through the read-back command."""
    pit.w(CONTROL, 0xE0 | 2 << counter)
    return bool(pit.r(counter) & 0x80)


def trace(pit: Rig[Pit8254], counter: int, clocks: range) -> list[tuple[int, bool]]:
    states = []
    for clock in clocks:
        at_clock(pit, clock)
        states.append((value(pit, counter), out(pit, counter)))
    return states


def gate2(pit: Rig[Pit8254], level: bool) -> None:
    pit.w(0, int(level), "port_b")


def test_mode_0() -> None:
    pit = make()
    program(pit, 0, 0, 4)
    states = trace(pit, 0, range(1, 7))  # OUT goes high N + 1 clocks after the count is written
    assert states == [(4, False), (3, False), (2, False), (1, False), (0, True), (0xFFFF, True)]


def test_mode_0_stops_at_the_first_byte_of_a_new_count() -> None:
    pit = make()
    program(pit, 0, 0, 3)
    at_clock(pit, 10)
    assert out(pit, 0)
    pit.w(0, 9)
    assert not out(pit, 0)
    at_clock(pit, 30)
    assert not out(pit, 0)


def test_mode_0_gate_suspends_counting() -> None:
    pit = make()
    gate2(pit, True)
    program(pit, 2, 0, 10)
    at_clock(pit, 4)
    gate2(pit, False)
    assert value(pit, 2) == 7
    at_clock(pit, 100)
    assert value(pit, 2) == 7
    gate2(pit, True)
    at_clock(pit, 106)
    assert not out(pit, 2)
    at_clock(pit, 107)
    assert out(pit, 2)


def test_mode_1_is_triggered_and_retriggered_by_the_gate() -> None:
    pit = make()
    gate2(pit, False)
    program(pit, 2, 1, 3)
    at_clock(pit, 5)
    assert out(pit, 2)
    gate2(pit, True)
    states = trace(pit, 2, range(6, 9))
    assert states == [(3, False), (2, False), (1, False)]
    gate2(pit, False)
    gate2(pit, True)
    assert [level for _, level in trace(pit, 2, range(9, 13))] == [False, False, False, True]


def test_mode_2() -> None:
    pit = make()
    program(pit, 0, 2, 3)
    states = trace(pit, 0, range(1, 8))
    assert states == [(3, True), (2, True), (1, False), (3, True), (2, True), (1, False), (3, True)]


def test_mode_2_takes_a_new_count_at_the_end_of_the_cycle() -> None:
    pit = make()
    program(pit, 0, 2, 4)
    at_clock(pit, 2)
    pit.w(0, 3)
    pit.w(0, 0)
    assert trace(pit, 0, range(3, 10)) == [
        (2, True), (1, False), (3, True), (2, True), (1, False), (3, True), (2, True),
    ]  # fmt: skip


def test_mode_2_gate_low_forces_out_high_and_restarts() -> None:
    pit = make()
    gate2(pit, True)
    program(pit, 2, 2, 3)
    at_clock(pit, 3)
    assert not out(pit, 2)
    gate2(pit, False)
    assert out(pit, 2)
    gate2(pit, True)
    assert [v for v, _ in trace(pit, 2, range(4, 7))] == [3, 2, 1]


@pytest.mark.parametrize(
    ("count", "cycle"),
    [
        (4, [(4, True), (2, True), (4, False), (2, False)]),
        (5, [(4, True), (2, True), (0, True), (4, False), (2, False)]),
    ],
)
def test_mode_3(count: int, cycle: list[tuple[int, bool]]) -> None:
    pit = make()
    program(pit, 0, 3, count)
    assert trace(pit, 0, range(1, 1 + 2 * count)) == cycle * 2


def test_mode_3_takes_a_new_count_at_the_end_of_the_half_cycle() -> None:
    pit = make()
    program(pit, 0, 3, 4)
    at_clock(pit, 1)
    pit.w(0, 6)
    pit.w(0, 0)
    levels = [level for _, level in trace(pit, 0, range(2, 12))]
    assert levels == [True, False, False, False, True, True, True, False, False, False]


def test_mode_4_strobes_once() -> None:
    pit = make()
    program(pit, 0, 4, 3)
    assert [level for _, level in trace(pit, 0, range(1, 7))] == [True, True, True, False, True, True]


def test_mode_5_strobes_after_a_trigger() -> None:
    pit = make()
    gate2(pit, False)
    program(pit, 2, 5, 2)
    at_clock(pit, 5)
    gate2(pit, True)
    assert [level for _, level in trace(pit, 2, range(6, 10))] == [True, True, False, True]


def test_zero_is_the_largest_count() -> None:
    pit = make()
    program(pit, 0, 0, 0)
    at_clock(pit, 0x10000)
    assert not out(pit, 0)
    at_clock(pit, 0x10001)
    assert out(pit, 0)


def test_bcd_counts_decimal() -> None:
    pit = make()
    program(pit, 0, 2, 0x0100, bcd=1)
    at_clock(pit, 2)
    assert value(pit, 0) == 0x0099
    program(pit, 2, 0, 0x0000, bcd=1)
    gate2(pit, True)
    pit.advance(NS * 9_999 // CLOCK_HZ)
    assert not out(pit, 2)
    pit.advance(NS * 3 // CLOCK_HZ)
    assert out(pit, 2)


def test_latched_count_stands_until_it_is_read() -> None:
    pit = make()
    program(pit, 0, 2, 0x1234)
    at_clock(pit, 1)
    pit.w(CONTROL, 0x00)
    at_clock(pit, 100)
    pit.w(CONTROL, 0x00)  # a second latch changes nothing
    assert (pit.r(0), pit.r(0)) == (0x34, 0x12)
    assert (pit.r(0), pit.r(0)) == (0xD1, 0x11), "then the counting element"


def test_read_back_status_and_count() -> None:
    pit = make()
    pit.w(CONTROL, 0x34)
    pit.w(CONTROL, 0xE2)
    assert pit.r(0) == 0xC0 | 0x34, "OUT high, null count, as programmed"
    pit.w(0, 0x10)
    pit.w(0, 0x00)
    at_clock(pit, 2)
    pit.w(CONTROL, 0xC2)  # both: the status comes first
    assert [pit.r(0) for _ in range(3)] == [0x80 | 0x34, 0x0F, 0x00]


def test_mode_bits_read_back_as_written() -> None:
    pit = make()
    pit.w(CONTROL, 0x3C)  # 6 means mode 2
    pit.w(CONTROL, 0xE2)
    assert pit.r(0) & 0x3F == 0x3C


def test_single_byte_access() -> None:
    pit = make()
    pit.w(CONTROL, 0x24)  # high byte only, mode 2
    pit.w(0, 0x12)
    at_clock(pit, 1)
    assert (pit.r(0), pit.r(0)) == (0x12, 0x12)
    pit.w(CONTROL, 0x14)  # low byte only
    pit.w(0, 0x34)
    pit.advance(NS // CLOCK_HZ + 1)
    assert (pit.r(0), pit.r(0)) == (0x34, 0x34)


def test_reading_the_control_register_floats() -> None:
    assert make().r(CONTROL) == 0xFF


# --- IRQ 0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_interrupts_do_not_drift(mode: int) -> None:
    pit = make()
    program(pit, 0, mode, 4773)  # 250 Hz, as Linux sets it
    pit.edges("out0")
    seconds = 100
    pit.advance(seconds * NS)
    assert pit.edges("out0") == seconds * CLOCK_HZ // 4773
    next_clock = START_CLOCK + 1 + (seconds * CLOCK_HZ // 4773 + 1) * 4773
    assert pit.wiring.timers["out0"] == -(-next_clock * NS // CLOCK_HZ)


def test_edges_missed_by_a_late_host_are_one_and_the_grid_stays() -> None:
    pit = make()
    program(pit, 0, 2, 4773)
    pit.edges("out0")
    pit.wiring.clock_ns += 10 * NS // 250 + 1_000_000
    pit.advance(0)
    assert pit.edges("out0") == 1
    assert pit.wiring.timers["out0"] == -(-(START_CLOCK + 1 + 11 * 4773) * NS // CLOCK_HZ)


@pytest.mark.parametrize(("mode", "before"), [(0, False), (4, True)])
def test_one_shot_interrupts_once(mode: int, before: bool) -> None:
    pit = make()
    program(pit, 0, mode, 1000)
    assert pit.wiring.irq["out0"] is before
    pit.edges("out0")
    pit.advance(990 * NS // CLOCK_HZ)
    assert pit.edges("out0") == 0
    pit.advance(NS)
    assert pit.edges("out0") == 1
    assert pit.wiring.timers == {}


def test_linux_pit_shutdown_stops_the_ticks() -> None:
    pit = make()
    program(pit, 0, 2, 4773)
    program(pit, 0, 0, 0)
    pit.edges("out0")
    pit.advance(NS)
    assert pit.edges("out0") == 1, "mode 0 with the largest count: one edge after 55 ms"


def test_a_fast_train_is_thinned() -> None:
    pit = make()
    program(pit, 0, 2, 2)
    pit.edges("out0")
    pit.advance(NS // 1000)
    assert pit.edges("out0") == 19


# --- port B -----------------------------------------------------------------------------------------


def test_port_b_bits() -> None:
    pit = make()
    pit.w(0, 0xFF, "port_b")
    assert pit.r(0, "port_b") & 0xCF == 0x0F
    pit.w(0, 0x00, "port_b")
    assert pit.r(0, "port_b") & 0xCF == 0


def test_refresh_bit_toggles() -> None:
    pit = make()
    bits = []
    for _ in range(6):
        bits.append(pit.r(0, "port_b") & 0x10)
        pit.advance(REFRESH_NS)
    assert bits in ([0, 0x10] * 3, [0x10, 0] * 3)


def test_out2_calibration_loop_needs_no_message() -> None:
    """pit_calibrate_tsc: counter 2 in mode 0, then port B is polled until OUT2 rises."""
    pit = make()
    pit.w(0, 0x01, "port_b")
    program(pit, 2, 0, CLOCK_HZ // 100)
    step = pit.device.mirror()["port_b", 0]
    assert isinstance(step, Step)
    rises_ns = START_NS + NS // 100
    assert step.at(rises_ns - 10_000) & 0x2F == 0x01
    assert step.at(rises_ns + 10_000) & 0x2F == 0x21
    assert abs(step.at_ns - rises_ns) < 2_000


def test_port_b_leaves_the_mirror_while_out2_is_a_square_wave() -> None:
    pit = make()
    pit.w(0, 0x03, "port_b")
    program(pit, 2, 3, 1193)
    assert pit.device.mirror() == {}

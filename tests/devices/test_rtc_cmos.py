"""MC146818 against its data sheet, with a wall clock set by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from devices.rtc_calendar import Calendar, alarm_delay
from devices.rtc_cmos import RtcCmos
from tests.devices.rig import START_NS, Rig

NS = 1_000_000_000
A, B, C, D = range(0x0A, 0x0E)


def make(wall: datetime = datetime(2024, 2, 28, 23, 59, 57), ns: int = 0, **settings: int) -> Rig[RtcCmos]:
    """A clock that shows `wall` plus `ns`."""
    wall_ns = int(wall.replace(tzinfo=UTC).timestamp()) * NS + ns
    return Rig(RtcCmos, "regs", wall_offset_ns=wall_ns - START_NS, **settings)


def get(rtc: Rig[RtcCmos], register: int) -> int:
    rtc.w(0, register)
    return rtc.r(1)


def put(rtc: Rig[RtcCmos], register: int, value: int) -> None:
    rtc.w(0, register)
    rtc.w(1, value)


def clock(rtc: Rig[RtcCmos]) -> list[int]:
    """Century, year, month, day, hour, minute, second."""
    return [get(rtc, register) for register in (0x32, 9, 8, 7, 4, 2, 0)]


def irq(rtc: Rig[RtcCmos]) -> bool:
    return rtc.wiring.irq["irq"]


def test_the_time_is_the_settings_and_goes_on() -> None:
    rtc = make()
    assert clock(rtc) == [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x57]
    assert get(rtc, 6) == 4, "a Wednesday; Sunday is 1"
    rtc.advance(3 * NS)
    assert clock(rtc) == [0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00]
    assert get(rtc, 6) == 5
    rtc.advance(400 * 86_400 * NS)
    assert clock(rtc)[:4] == [0x20, 0x25, 0x04, 0x04]


def test_updates_come_on_the_whole_second() -> None:
    rtc = make(ns=600_000_000)
    rtc.advance(399_999_999)
    assert get(rtc, 0) == 0x57
    rtc.advance(1)
    assert get(rtc, 0) == 0x58


def test_the_century_turns() -> None:
    rtc = make(datetime(1999, 12, 31, 23, 59, 59))
    rtc.advance(NS)
    assert clock(rtc) == [0x20, 0, 1, 1, 0, 0, 0]


def test_setting_the_time() -> None:
    """mc146818_set_time of Linux: SET, divider reset, registers, divider, SET off."""
    rtc = make()
    control, rate = get(rtc, B), get(rtc, A)
    put(rtc, B, control | 0x80)
    put(rtc, A, rate | 0x70)
    for register, value in ((9, 0x30), (8, 0x06), (7, 0x15), (4, 0x12), (2, 0x34), (0, 0x56), (0x32, 0x20)):
        put(rtc, register, value)
    rtc.advance(5 * NS)
    put(rtc, B, control)
    put(rtc, A, rate & 0x7F)
    assert clock(rtc) == [0x20, 0x30, 0x06, 0x15, 0x12, 0x34, 0x56]
    rtc.advance(499_000_000)
    assert get(rtc, 0) == 0x56
    rtc.advance(2_000_000)
    assert get(rtc, 0) == 0x57, "the first update comes half a second after the divider starts"


def test_set_stops_updates_and_clears_uie() -> None:
    rtc = make()
    put(rtc, B, 0x12)
    put(rtc, B, 0x92)
    assert get(rtc, B) == 0x82
    rtc.advance(10 * NS)
    assert get(rtc, 0) == 0x57
    assert get(rtc, C) == 0x40, "no update ended; the periodic flag goes on"


def test_binary_and_twelve_hours() -> None:
    rtc = make(datetime(2024, 2, 28, 13, 45, 59))
    put(rtc, B, 0x04)
    for register, value in ((9, 24), (8, 2), (7, 28), (4, 0x80 | 1), (2, 45), (0, 59), (0x32, 20)):
        put(rtc, register, value)
    rtc.advance(NS)
    assert clock(rtc) == [20, 24, 2, 28, 0x81, 46, 0]
    put(rtc, 4, 0x80 | 11)
    put(rtc, 2, 59)
    rtc.advance(60 * NS)
    assert clock(rtc) == [20, 24, 2, 29, 12, 0, 0], "midnight is 12 AM"


def test_update_in_progress_before_the_second() -> None:
    rtc = make()
    assert get(rtc, A) & 0x80 == 0
    rtc.advance(NS - 2_228_001)
    assert get(rtc, A) & 0x80 == 0
    rtc.advance(1)
    assert get(rtc, A) & 0x80
    assert get(rtc, 0) == 0x57
    rtc.advance(2_228_000)
    assert get(rtc, A) & 0x80 == 0
    assert get(rtc, 0) == 0x58


def test_update_ended_interrupt() -> None:
    rtc = make()
    put(rtc, B, 0x12)
    get(rtc, C)
    assert not irq(rtc)
    rtc.advance(NS)
    assert irq(rtc)
    assert rtc.wiring.timers == {}, "nothing more can happen until C is read"
    assert get(rtc, C) & 0xB0 == 0x90
    assert not irq(rtc)
    assert get(rtc, C) & 0x90 == 0
    rtc.advance(NS)
    assert irq(rtc)


def test_periodic_interrupt_keeps_its_rate() -> None:
    rtc = make()
    put(rtc, A, 0x26)  # 1024 Hz
    put(rtc, B, 0x42)
    get(rtc, C)
    count = 0
    for _ in range(1024 * 3):
        rtc.advance(NS // 1024)
        if irq(rtc):
            assert get(rtc, C) & 0xC0 == 0xC0
            count += 1
    assert count in (1024 * 3 - 1, 1024 * 3)


@pytest.mark.parametrize(("select", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_rates(select: int, hz: int) -> None:
    rtc = make()
    put(rtc, A, 0x20 | select)
    put(rtc, B, 0x42)
    get(rtc, C)
    deadline = rtc.wiring.timers["irq"]
    rtc.advance(deadline - rtc.wiring.clock_ns)
    get(rtc, C)
    assert rtc.wiring.timers["irq"] - deadline == pytest.approx(NS / hz, abs=1)


def test_alarm() -> None:
    rtc = make()
    put(rtc, 1, 0x00)
    put(rtc, 3, 0x00)
    put(rtc, 5, 0x00)
    put(rtc, B, 0x22)
    get(rtc, C)
    rtc.advance(3 * NS - 1)
    assert not irq(rtc)
    rtc.advance(1)
    assert irq(rtc)
    assert get(rtc, C) & 0xA0 == 0xA0
    rtc.advance(86_399 * NS)
    assert not irq(rtc)
    rtc.advance(NS)
    assert irq(rtc)


def test_alarm_flag_without_its_interrupt_needs_no_timer() -> None:
    rtc = make()
    get(rtc, C)
    rtc.advance(2 * NS)  # 23:59:59; alarm bytes are 00:00:00
    assert rtc.wiring.timers == {}
    assert get(rtc, C) & 0x20 == 0
    rtc.advance(NS)
    assert get(rtc, C) & 0x20


def test_alarm_wildcards() -> None:
    t = Calendar.at(datetime(2024, 1, 1, 10, 20, 30))
    b = 0x02
    assert alarm_delay(t, (0xC0, 0xC0, 0xC0), b) == 1
    assert alarm_delay(t, (0xFF, 0xFF, 0x31), b) == 1
    assert alarm_delay(t, (0xFF, 0xFF, 0x30), b) == 60
    assert alarm_delay(t, (0xFF, 0x00, 0x00), b) == 39 * 60 + 30
    assert alarm_delay(t, (0x10, 0x20, 0x30), b) == 86_400
    assert alarm_delay(t, (0x25, 0x00, 0x00), b) is None


def test_alarm_delay_agrees_with_counting_seconds() -> None:
    for seconds in range(0, 86_400, 1009):
        moment = datetime(2024, 1, 1) + timedelta(seconds=seconds)
        for wanted in ((0xC0, 0x15, 0x07), (0x81, 0xFF, 0x30), (0x12, 0x00, 0xC1)):
            delay = alarm_delay(Calendar.at(moment), wanted, 0x00)  # 12 hours, BCD
            assert delay is not None
            later = Calendar.at(moment).later(delay)
            assert later is not None
            registers = later.registers(0x00)
            shown = (registers[2], registers[1], registers[0])
            assert all(w >= 0xC0 or w == s for w, s in zip(wanted, shown, strict=True))
            assert delay <= 86_400


def test_an_invalid_time_stands_still() -> None:
    rtc = make()
    put(rtc, 8, 0x1F)
    rtc.advance(10 * NS)
    assert get(rtc, 0) == 0x57
    put(rtc, 8, 0x02)
    rtc.advance(NS)
    assert get(rtc, 0) == 0x58


def test_reset_clears_enables_and_flags_only() -> None:
    rtc = make()
    put(rtc, 0x40, 0x5A)
    put(rtc, B, 0x7A)
    rtc.advance(NS)
    rtc.device.reset()
    assert not irq(rtc)
    assert get(rtc, B) == 0x02
    assert get(rtc, C) == 0
    assert (get(rtc, 0x40), get(rtc, 0), get(rtc, D)) == (0x5A, 0x58, 0x80)


def test_index_port() -> None:
    rtc = make()
    rtc.w(0, 0x80 | 0x40)
    rtc.w(1, 0x77)
    assert rtc.device.state.nmi_masked
    assert get(rtc, 0x40) == 0x77
    assert not rtc.device.state.nmi_masked
    assert rtc.r(0) == 0xFF
    put(rtc, D, 0)
    assert get(rtc, D) == 0x80


def test_memory_sizes_and_checksum() -> None:
    rtc = make(base_kib=639, extended_kib=255 << 10)
    words = [get(rtc, n) | get(rtc, n + 1) << 8 for n in (0x15, 0x17, 0x30, 0x34)]
    assert words == [639, 63 << 10, 63 << 10, 240 << 4]
    checksum = get(rtc, 0x2E) << 8 | get(rtc, 0x2F)
    assert checksum == sum(get(rtc, n) for n in range(0x10, 0x2E))
    assert checksum

"""ACPI fixed hardware against ACPI 6.4, chapter 4.8."""

from __future__ import annotations

import pytest

from bus.mirror import Counter
from devices.acpi_pm import CONTROL, ENABLE, RESET, RESET_VALUE, SLP_TYP_S5, STATUS, TIMER, TIMER_HZ, AcpiPm
from tests.devices.rig import START_NS, Rig

NS = 1_000_000_000


def make(timer_bits: int = 32) -> Rig[AcpiPm]:
    return Rig(AcpiPm, "pm", 2, timer_bits=timer_bits)


def events(pm: Rig[AcpiPm]) -> list[str]:
    return [kind for kind, _ in pm.wiring.events]


@pytest.mark.parametrize("bits", [24, 32])
def test_timer_counts_by_formula(bits: int) -> None:
    pm = make(bits)
    assert pm.r(TIMER, width=4) == 0
    pm.advance(10 * NS)
    assert pm.r(TIMER, width=4) == 10 * TIMER_HZ % (1 << bits)
    counter = pm.device.mirror()["pm", TIMER]
    assert isinstance(counter, Counter)
    assert counter.at(pm.wiring.clock_ns) == 10 * TIMER_HZ % (1 << bits)


def test_timer_is_read_only() -> None:
    pm = make()
    pm.advance(NS)
    pm.w(TIMER, 0, width=4)
    assert pm.r(TIMER, width=4) == TIMER_HZ


def test_timer_status_is_set_by_each_change_of_the_highest_bit() -> None:
    pm = make(24)
    half_ns = (1 << 23) * NS // TIMER_HZ
    pm.advance(half_ns - 1000)
    assert pm.r(STATUS) == 0
    pm.advance(2000)
    assert pm.r(STATUS) == 0x0001
    pm.w(STATUS, 0x0001)
    assert pm.r(STATUS) == 0
    pm.advance(half_ns)
    assert pm.r(STATUS) == 0x0001


def test_timer_interrupt() -> None:
    pm = make(24)
    pm.w(ENABLE, 0x0001)
    assert pm.wiring.timers["carry"] == START_NS - -(1 << 23) * NS // TIMER_HZ
    pm.advance(3 * NS)
    assert pm.wiring.irq["sci"]
    pm.w(STATUS, 0x0001)
    assert not pm.wiring.irq["sci"]
    pm.advance(3 * NS)
    assert pm.wiring.irq["sci"]
    pm.w(ENABLE, 0)
    assert not pm.wiring.irq["sci"]


@pytest.mark.parametrize(("button", "bit"), [(b"p", 0x0100), (b"s", 0x0200)])
def test_buttons_raise_sci_until_acknowledged(button: bytes, bit: int) -> None:
    pm = make()
    pm.device.receive("buttons", button)
    assert not pm.wiring.irq["sci"]
    pm.w(ENABLE, bit)
    assert pm.wiring.irq["sci"]
    assert pm.r(STATUS) == bit
    pm.w(STATUS, bit)
    assert not pm.wiring.irq["sci"]


def test_registers_in_bytes_and_dwords() -> None:
    pm = make()
    pm.w(0, 0x0321_0000, width=4)
    assert pm.r(ENABLE) == 0x0321
    pm.w(ENABLE + 1, 0x01, width=1)
    assert pm.r(ENABLE) == 0x0121
    pm.device.receive("buttons", b"p")
    pm.w(STATUS, 0xFF, width=1)
    assert pm.r(STATUS) == 0x0100, "the other byte's bit stays"
    assert pm.r(0, width=4) == 0x0121_0100


def test_sci_enable_is_always_set() -> None:
    pm = make()
    assert pm.r(CONTROL) == 0x0001
    pm.w(CONTROL, 0x0000)
    assert pm.r(CONTROL) == 0x0001


def test_s5_powers_off() -> None:
    pm = make()
    pm.w(CONTROL, SLP_TYP_S5 << 10)
    assert events(pm) == []
    assert pm.r(CONTROL) == SLP_TYP_S5 << 10 | 1
    pm.w(CONTROL, SLP_TYP_S5 << 10 | 0x2000)
    assert events(pm) == ["poweroff"]
    assert pm.r(CONTROL) & 0x2000 == 0, "SLP_EN reads as 0"


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 6, 7])
def test_other_sleep_types_are_logged_only(kind: int) -> None:
    pm = make()
    pm.w(CONTROL, kind << 10 | 0x2000)
    assert events(pm) == ["log"]


def test_reset_register() -> None:
    pm = make()
    pm.w(RESET, 0, width=1)
    assert events(pm) == []
    pm.w(RESET, RESET_VALUE, width=1)
    assert events(pm) == ["reset"]

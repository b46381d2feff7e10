"""82093AA against its data sheet."""

from __future__ import annotations

import pytest

from devices.ioapic import IoApic
from tests.devices.rig import Rig

SELECT, WINDOW = 0x00, 0x10
LEVEL, MASKED, REMOTE_IRR = 0x8000, 0x10000, 0x4000


def make(**settings: int) -> Rig[IoApic]:
    return Rig(IoApic, "regs", 4, **settings)


def get(apic: Rig[IoApic], index: int) -> int:
    apic.w(SELECT, index)
    return apic.r(WINDOW)


def put(apic: Rig[IoApic], index: int, value: int) -> None:
    apic.w(SELECT, index)
    apic.w(WINDOW, value)


def redirect(apic: Rig[IoApic], pin: int, low: int, dest: int = 0) -> None:
    put(apic, 0x11 + 2 * pin, dest << 24)
    put(apic, 0x10 + 2 * pin, low)


def vectors(apic: Rig[IoApic]) -> list[int]:
    found = [message.vector for message in apic.wiring.apic_messages]
    apic.wiring.apic_messages.clear()
    return found


def line(apic: Rig[IoApic], irq: int, level: bool) -> None:
    apic.device.line_in(irq, level)


def test_reset_values() -> None:
    apic = make(id=3)
    assert get(apic, 0) == 3 << 24
    assert get(apic, 1) == 0x0017_0011
    assert [get(apic, 0x10 + n) for n in range(48)] == [MASKED, 0] * 24
    assert get(apic, 0x40) == 0


def test_entries_keep_their_writable_bits() -> None:
    apic = make()
    put(apic, 0x10, 0xFFFF_FFFF)
    put(apic, 0x11, 0xFFFF_FFFF)
    assert (get(apic, 0x10), get(apic, 0x11)) == (0x0001_AFFF, 0xFF00_0000)
    put(apic, 0, 0xFFFF_FFFF)
    assert (get(apic, 0), get(apic, 2)) == (0x0F00_0000, 0x0F00_0000)


def test_a_record_of_version_1() -> None:
    table = [{"low": MASKED | n, "high": n << 24} for n in range(24)]
    apic = make()
    apic.device.load({"kind": "IoApicState", "version": 1,
                      "fields": {"id": 0, "select": 0, "lines": 0, "table": table}})  # fmt: skip
    assert [get(apic, 0x10 + n) for n in range(48)] == [v for n in range(24) for v in (MASKED | n, n << 24)]


def test_edge() -> None:
    apic = make()
    redirect(apic, 4, 0x34)
    line(apic, 4, True)
    assert vectors(apic) == [0x34]
    line(apic, 4, False)
    assert vectors(apic) == []
    line(apic, 4, True)
    assert vectors(apic) == [0x34]
    assert get(apic, 0x18) == 0x34, "no remote IRR"


def test_an_edge_on_a_masked_pin_is_lost() -> None:
    apic = make()
    redirect(apic, 4, 0x34 | MASKED)
    line(apic, 4, True)
    redirect(apic, 4, 0x34)
    assert vectors(apic) == []


def test_level_waits_for_eoi_and_repeats_while_active() -> None:
    apic = make()
    redirect(apic, 9, 0x39 | LEVEL)
    line(apic, 9, True)
    assert vectors(apic) == [0x39]
    assert get(apic, 0x22) & REMOTE_IRR
    line(apic, 9, False)
    line(apic, 9, True)
    assert vectors(apic) == []
    apic.device.eoi(0x38)
    assert vectors(apic) == []
    apic.device.eoi(0x39)
    assert vectors(apic) == [0x39]
    line(apic, 9, False)
    apic.device.eoi(0x39)
    assert vectors(apic) == []
    assert get(apic, 0x22) & REMOTE_IRR == 0


def test_unmasking_an_active_level_delivers() -> None:
    apic = make()
    redirect(apic, 9, 0x39 | LEVEL | MASKED)
    line(apic, 9, True)
    assert vectors(apic) == []
    redirect(apic, 9, 0x39 | LEVEL)
    assert vectors(apic) == [0x39]


def test_linux_clears_remote_irr_by_going_through_edge_mode() -> None:
    """eoi_ioapic_pin for versions below 20h: mask and edge, then as before."""
    apic = make()
    redirect(apic, 9, 0x39 | LEVEL)
    line(apic, 9, True)
    line(apic, 9, False)
    redirect(apic, 9, 0x39 | MASKED)
    assert get(apic, 0x22) & REMOTE_IRR == 0
    redirect(apic, 9, 0x39 | LEVEL)
    assert vectors(apic) == [0x39]
    line(apic, 9, True)
    assert vectors(apic) == [0x39]


def test_remote_irr_is_read_only_and_survives_other_writes() -> None:
    apic = make()
    redirect(apic, 9, 0x39 | LEVEL)
    line(apic, 9, True)
    redirect(apic, 9, 0x39 | LEVEL | MASKED)
    assert get(apic, 0x22) & REMOTE_IRR
    redirect(apic, 10, 0x3A | LEVEL | REMOTE_IRR)
    assert get(apic, 0x24) & REMOTE_IRR == 0


@pytest.mark.parametrize("mode", range(8))
def test_messages_carry_the_entry(mode: int) -> None:
    apic = make()
    redirect(apic, 5, 0x45 | mode << 8 | 0x0800, dest=0x0F)
    line(apic, 5, True)
    (message,) = apic.wiring.apic_messages
    assert (message.vector, message.delivery_mode, message.dest, message.dest_mode) == (0x45, mode, 0x0F, 1)
    assert (message.trigger_level, message.level_assert) == (False, True)


@pytest.mark.parametrize(("settings", "pin"), [({}, 2), ({"irq0_pin": 0}, 0)])
def test_irq_0_arrives_at_its_pin(settings: dict[str, int], pin: int) -> None:
    apic = make(**settings)
    for n in range(24):
        redirect(apic, n, 0x30 + n)
    line(apic, 0, True)
    line(apic, 2, True)
    expected = [0x30 + pin] + ([0x32] if pin != 2 else [])
    assert vectors(apic) == expected


def test_reset_masks_all_and_keeps_the_lines() -> None:
    apic = make()
    redirect(apic, 9, 0x39 | LEVEL)
    line(apic, 9, True)
    apic.device.reset()
    assert get(apic, 0x22) == MASKED
    vectors(apic)
    redirect(apic, 9, 0x39 | LEVEL)
    assert vectors(apic) == [0x39]

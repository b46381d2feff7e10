"""8042 and keyboard: the dialogues of Linux's i8042.c, libps2.c and atkbd.c, and scan-code translation."""

from __future__ import annotations

import pytest

from devices.i8042 import I8042
from devices.ps2_keyboard import BUFFER_BYTES
from tests.devices.rig import Rig

OBF = 0x01


def make() -> Rig[I8042]:
    return Rig(I8042, "data")


def status(kbd: Rig[I8042]) -> int:
    return kbd.r(0, "command")


def command(kbd: Rig[I8042], *values: int) -> list[int]:
    """A controller command with its arguments; what comes back."""
    kbd.w(0, values[0], "command")
    assert status(kbd) & 0x08, "the last write was a command"
    for value in values[1:]:
        kbd.w(0, value)
    return drain(kbd)


def to_keyboard(kbd: Rig[I8042], *values: int) -> list[int]:
    answers = []
    for value in values:
        kbd.w(0, value)
        answers += drain(kbd)
    return answers


def drain(kbd: Rig[I8042]) -> list[int]:
    data = []
    while status(kbd) & OBF:
        data.append(kbd.r(0))
    return data


def press(kbd: Rig[I8042], *codes: int) -> list[int]:
    assert kbd.device.room("keys") >= len(codes)
    kbd.device.receive("keys", bytes(codes))
    return drain(kbd)


def test_controller_tests() -> None:
    kbd = make()
    assert command(kbd, 0xAA) == [0x55]
    assert command(kbd, 0xAB) == [0x00]
    assert status(kbd) & 0x14 == 0x14, "system flag, not locked"


def test_command_byte() -> None:
    kbd = make()
    assert command(kbd, 0x20) == [0x45]
    command(kbd, 0x60, 0x74)
    assert command(kbd, 0x20) == [0x74]


def test_controller_ram() -> None:
    kbd = make()
    command(kbd, 0x6A, 0x99)
    assert command(kbd, 0x2A) == [0x99]


def test_linux_finds_no_aux_port_without_waiting() -> None:
    """i8042_check_aux: the loop's byte without the AUX bit ends it at once, the line test confirms."""
    kbd = make()
    kbd.w(0, 0xD3, "command")
    kbd.w(0, 0x5A)
    assert status(kbd) & (OBF | 0x20) == OBF
    assert kbd.r(0) == 0x5A
    assert command(kbd, 0xA9) == [0x01]


def test_linux_keyboard_probe() -> None:
    """atkbd_probe and what follows; the controller translates 83h of the identity to 41h."""
    kbd = make()
    assert to_keyboard(kbd, 0xFF) == [0xFA, 0xAA]
    assert to_keyboard(kbd, 0xF5) == [0xFA]
    assert to_keyboard(kbd, 0xF2) == [0xFA, 0xAB, 0x41]
    assert to_keyboard(kbd, 0xED, 0x07) == [0xFA, 0xFA]
    assert kbd.wiring.sent == [("leds", b"\x07")]
    assert to_keyboard(kbd, 0xF3, 0x00) == [0xFA, 0xFA]
    assert to_keyboard(kbd, 0xF4) == [0xFA]


def test_identity_untranslated() -> None:
    kbd = make()
    command(kbd, 0x60, 0x05)
    assert to_keyboard(kbd, 0xF2) == [0xFA, 0xAB, 0x83]


def test_keyboard_answers() -> None:
    kbd = make()
    assert to_keyboard(kbd, 0xEE) == [0xEE]
    assert to_keyboard(kbd, 0xFE) == [0xEE]
    assert to_keyboard(kbd, 0xF0, 0x00) == [0xFA, 0xFA, 0x41], "scan set 2; translated like all else"
    assert to_keyboard(kbd, 0xF0, 0x01) == [0xFA, 0xFE], "there is no set 1"
    assert to_keyboard(kbd, 0x00) == [0xFE]


@pytest.mark.parametrize(
    ("codes", "translated"),
    [
        ((0x1C,), [0x1E]),  # A
        ((0xF0, 0x1C), [0x9E]),
        ((0xE0, 0x75), [0xE0, 0x48]),  # cursor up
        ((0xE0, 0xF0, 0x75), [0xE0, 0xC8]),
        ((0x83,), [0x41]),  # F7
        ((0x84,), [0x54]),  # Alt + SysRq
        ((0x5A, 0xF0, 0x5A), [0x1C, 0x9C]),  # Enter
        ((0xE1, 0x14, 0x77, 0xE1, 0xF0, 0x14, 0xF0, 0x77), [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]),  # Pause
    ],
)
def test_translation_to_set_1(codes: tuple[int, ...], translated: list[int]) -> None:
    assert press(make(), *codes) == translated


def test_untranslated_codes_pass() -> None:
    kbd = make()
    command(kbd, 0x60, 0x05)
    assert press(kbd, 0xF0, 0x1C) == [0xF0, 0x1C]


def test_each_byte_is_an_edge_of_irq_1() -> None:
    kbd = make()
    kbd.edges("kbd")
    kbd.device.receive("keys", bytes([0x1C, 0x32, 0x21]))
    assert kbd.edges("kbd") == 1
    for left in (1, 1, 0):
        kbd.r(0)
        assert kbd.edges("kbd") == left
    assert not kbd.wiring.irq["kbd"]


def test_interrupt_enable() -> None:
    kbd = make()
    command(kbd, 0x60, 0x44)
    kbd.device.receive("keys", b"\x1c")
    assert status(kbd) & OBF
    assert not kbd.wiring.irq["kbd"]


def test_a_disabled_line_holds_the_codes_back() -> None:
    kbd = make()
    command(kbd, 0xAD)
    assert press(kbd, 0x1C) == []
    assert command(kbd, 0x20) == [0x55]
    assert command(kbd, 0xAE) == [0x1E]


def test_a_disabled_keyboard_drops_keys() -> None:
    kbd = make()
    to_keyboard(kbd, 0xF5)
    assert press(kbd, 0x1C) == []
    to_keyboard(kbd, 0xF4)
    assert press(kbd, 0x1C) == [0x1E]


def test_the_keyboards_buffer_is_finite() -> None:
    kbd = make()
    command(kbd, 0xAD)
    assert kbd.device.room("keys") == BUFFER_BYTES
    kbd.device.receive("keys", bytes([0x1C] * BUFFER_BYTES))
    assert kbd.device.room("keys") == 0


def test_answers_of_the_controller_come_before_keys() -> None:
    kbd = make()
    kbd.device.receive("keys", bytes([0x1C, 0x32]))
    kbd.w(0, 0x20, "command")
    assert drain(kbd) == [0x1E, 0x45, 0x30]


def test_reset_pulse() -> None:
    kbd = make()
    for value in (0xFF, 0xF1):
        command(kbd, value)
    assert kbd.wiring.events == []
    command(kbd, 0xFE)
    assert [kind for kind, _ in kbd.wiring.events] == ["reset"]


def test_output_port_resets_and_gates_a20() -> None:
    kbd = make()
    assert command(kbd, 0xD0) == [0xC3]
    kbd.w(0, 0x00, "port_a")
    assert kbd.wiring.events == []
    command(kbd, 0xD1, 0xDD)
    assert command(kbd, 0xD0) == [0xC1]
    assert [kind for kind, _ in kbd.wiring.events] == ["log"], "both gates are closed now"
    command(kbd, 0xDF)
    assert command(kbd, 0xD0) == [0xC3]
    command(kbd, 0xD1, 0xDE)
    assert [kind for kind, _ in kbd.wiring.events] == ["log", "reset"]


def test_port_a() -> None:
    kbd = make()
    assert kbd.r(0, "port_a") == 0x02
    kbd.w(0, 0xFF, "port_a")
    kbd.w(0, 0x03, "port_a")
    assert [kind for kind, _ in kbd.wiring.events] == ["reset"], "on the rising bit only"

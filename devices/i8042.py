"""8042 keyboard controller with a keyboard, and port 0x92 (system control port A).

Reference: IBM PC/AT Technical Reference, 1984, "Keyboard controller"; IBM PS/2 Hardware Interface Technical
Reference, "Keyboard/auxiliary device controller" and "System control port A"; [command or register].
There is no auxiliary port: like an AT controller this one echoes D3h as keyboard data, and A9h reports a
stuck clock, which is how Linux concludes at once that there is no mouse port (drivers/input/serio/i8042.c).
It comes up as firmware leaves it: self-tested, translating, interrupt on, address line 20 on.
Left out: what closing gate A20 does to addresses (it is reported as a log event); parity and time-out errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from devices.base import Channel, Device, DeviceState, MirrorValue, PortRange
from devices.ps2_keyboard import Keyboard

STATUS_OBF, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 0x01, 0x04, 0x08, 0x10
MODE_KBD_INT, MODE_SYSTEM, MODE_KBD_OFF, MODE_TRANSLATE = 0x01, 0x04, 0x10, 0x40  # command byte
OUTPUT_RUN, OUTPUT_A20, OUTPUT_IDLE = 0x01, 0x02, 0xC0  # output port: bit 0 low resets the machine
OUTPUT_OBF = 0x10
INPUT_PORT = 0xB0  # keyboard not locked, no manufacturing jumper
TEST_INPUTS = 0x03  # clock and data lines idle
SELF_TEST_PASSED, LINE_OK, CLOCK_STUCK = 0x55, 0x00, 0x01
PORT_A_RESET, PORT_A_A20 = 0x01, 0x02
RAM_BYTES = 32  # the command byte is the first

BREAK_PREFIX, BREAK = 0xF0, 0x80
TRANSLATION = bytes.fromhex(  # scan set 2 to 1, as the 8042's ROM has it; above: unchanged but for two keys
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59 65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d 69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61 6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f 52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
    "80 81 82 41 54"
)


@dataclass(frozen=True, slots=True)
class I8042Settings:
    backend: Literal["console", "log", "null"] = "null"  # takes scan codes, gets the state of the LEDs


@dataclass(slots=True)
class I8042State(DeviceState):
    VERSION: ClassVar[int] = 1
    ram: list[int] = field(
        default_factory=lambda: [MODE_TRANSLATE | MODE_SYSTEM | MODE_KBD_INT] + [0] * (RAM_BYTES - 1)
    )
    data: int = 0  # output buffer, which the CPU reads
    full: bool = False
    answers: list[int] = field(default_factory=list)  # the controller's own bytes, waiting for the buffer
    argument_of: int = 0  # a command that waits for a byte at the data port
    command_last: bool = False  # the last write was one to the command port
    break_next: bool = False  # translation has swallowed a break prefix
    output: int = OUTPUT_RUN | OUTPUT_A20
    port_a: int = PORT_A_A20
    keyboard: Keyboard = field(default_factory=Keyboard)


class I8042(Device[I8042State]):
    NAME = "i8042"
    PORTS = (
        PortRange("data", length=1, names={0: "OUTPUT|INPUT"}),  # the buffers, as the 8042 sees them
        PortRange(
            "command", length=1, mirrored=frozenset({0}), relaxed=frozenset({0}), names={0: "STATUS|COMMAND"}
        ),
        PortRange(
            "port_a", length=1, mirrored=frozenset({0}), relaxed=frozenset({0}), names={0: "PORT_A"}
        ),
    )
    IRQS = ("kbd",)
    CHANNELS = (Channel("leds", "keys"),)
    SETTINGS = I8042Settings
    STATE = I8042State

    def reset(self) -> None:
        self.state = I8042State()
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        s = self.state
        if region == "port_a":
            return s.port_a
        if region == "command":
            return self._status()
        value, s.full = s.data, False
        self.drive_lines()  # IRQ 1 falls in between, so that the next byte is an edge
        self._refill()
        return value

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        s, gate_was_open, leds = self.state, self._a20(), self.state.keyboard.leds
        if region == "port_a":
            if value & ~s.port_a & PORT_A_RESET:
                self.wiring.event("reset", "port 92h, bit 0")
            s.port_a = value & (PORT_A_RESET | PORT_A_A20)
        elif region == "command":
            s.command_last, s.argument_of = True, 0
            self._command(value)
        else:
            s.command_last = False
            self._data(value)
        self._refill()
        if gate_was_open and not self._a20():
            self.wiring.event("log", "gate A20 is closed: this machine keeps address line 20")
        if s.keyboard.leds != leds:
            self.wiring.send("leds", bytes([s.keyboard.leds]))

    def room(self, channel: str) -> int:
        return self.state.keyboard.room()

    def receive(self, channel: str, data: bytes) -> None:
        self.state.keyboard.press(data)
        self._refill()

    def drive_lines(self) -> None:
        s = self.state
        self.wiring.set_irq("kbd", s.full and bool(s.ram[0] & MODE_KBD_INT))

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        return {("command", 0): self._status(), ("port_a", 0): self.state.port_a}

    def _status(self) -> int:
        s = self.state
        return (
            STATUS_UNLOCKED
            | (STATUS_OBF if s.full else 0)
            | (STATUS_SYSTEM if s.ram[0] & MODE_SYSTEM else 0)
            | (STATUS_COMMAND if s.command_last else 0)
        )

    def _command(self, value: int) -> None:
        s = self.state
        match value:
            case _ if 0x20 <= value <= 0x3F:
                s.answers.append(s.ram[value & 0x1F])
            case _ if 0x60 <= value <= 0x7F:
                s.argument_of = value
            case 0xA9:  # test the auxiliary line
                s.answers.append(CLOCK_STUCK)
            case 0xAA:
                s.ram[0] |= MODE_SYSTEM
                s.answers.append(SELF_TEST_PASSED)
            case 0xAB:
                s.answers.append(LINE_OK)
            case 0xAD:
                s.ram[0] |= MODE_KBD_OFF
            case 0xAE:
                s.ram[0] &= ~MODE_KBD_OFF
            case 0xC0:
                s.answers.append(INPUT_PORT)
            case 0xD0:
                s.answers.append(s.output | OUTPUT_IDLE | (OUTPUT_OBF if s.full else 0))
            case 0xD1 | 0xD2 | 0xD3 | 0xD4:  # write output port, keyboard buffer, loop, auxiliary device
                s.argument_of = value
            case 0xDD | 0xDF:  # gate A20 off and on: not IBM's, but common
                s.output = s.output & ~OUTPUT_A20 | (OUTPUT_A20 if value & 0x02 else 0)
            case 0xE0:
                s.answers.append(TEST_INPUTS)
            case _ if value >= 0xF0 and not value & OUTPUT_RUN:  # pulse output port bits that are 0
                self.wiring.event("reset", f"keyboard controller command {value:02x}h")
            case _:
                pass  # A7h and A8h too: there is no auxiliary port to switch

    def _data(self, value: int) -> None:
        s, command = self.state, self.state.argument_of
        s.argument_of = 0
        match command:
            case 0:
                s.ram[0] &= ~MODE_KBD_OFF  # sending to the keyboard switches its line on [data port]
                s.keyboard.command(value)
            case 0xD1:
                if not value & OUTPUT_RUN:
                    self.wiring.event("reset", "keyboard controller output port, bit 0")
                s.output = value & OUTPUT_A20 | OUTPUT_RUN
            case 0xD2 | 0xD3:
                s.answers.append(value)
            case 0xD4:
                pass  # nobody there
            case _:
                s.ram[command & 0x1F] = value

    def _refill(self) -> None:
        """Put the next byte into the output buffer if it is empty."""
        s = self.state
        if not s.full and s.answers:
            s.data, s.full = s.answers.pop(0), True
        while not s.full and s.keyboard.queue and not s.ram[0] & MODE_KBD_OFF:
            self._from_keyboard(s.keyboard.take())
        self.drive_lines()

    def _from_keyboard(self, byte: int) -> None:
        s = self.state
        if s.ram[0] & MODE_TRANSLATE:
            if byte == BREAK_PREFIX:
                s.break_next = True
                return
            byte = TRANSLATION[byte] if byte < len(TRANSLATION) else byte
            byte |= BREAK if s.break_next else 0
            s.break_next = False
        s.data, s.full = byte, True

    def _a20(self) -> bool:
        return bool(self.state.output & OUTPUT_A20 or self.state.port_a & PORT_A_A20)

"""The keyboard at the other end of an 8042's cable: scan set 2 and the commands that drivers send.

Reference: IBM PS/2 Hardware Interface Technical Reference, "Keyboard (101/102-key)", [command name].
Left out: scan sets 1 and 3 (asking for them is answered with RESEND), typematic repetition (who presses the
keys repeats them), the time a byte takes on the cable and the self test takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

ACK, RESEND, ECHO, SELF_TEST_PASSED = 0xFA, 0xFE, 0xEE, 0xAA
IDENTITY = (0xAB, 0x83)
BUFFER_BYTES = 16  # the keyboard's own buffer [buffer]
SCAN_SET = 2
LEDS_USED, RATE_USED, RATE_DEFAULT = 0x07, 0x7F, 0x2B



class Command(IntEnum):
    SET_LEDS, ECHO = 0xED, 0xEE
    SCAN_SET, IDENTIFY, SET_RATE, ENABLE, DISABLE, SET_DEFAULTS = 0xF0, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6
    RESEND, RESET = 0xFE, 0xFF




@dataclass(slots=True)
class Keyboard:
    """`queue` holds the bytes on their way to the controller."""

    queue: list[int] = field(default_factory=list)
    scanning: bool = True
    leds: int = 0  # bit 0 scroll, 1 num, 2 caps
    rate: int = RATE_DEFAULT
    pending: int = 0  # a command that waits for its argument
    last_sent: int = SELF_TEST_PASSED

    def command(self, byte: int) -> None:
        """A byte from the system."""
        if self.pending and byte < Command.SET_LEDS:
            command, self.pending = self.pending, 0
            self._argument(command, byte)
            return
        self.pending = 0
        match byte:
            case Command.SET_LEDS | Command.SCAN_SET | Command.SET_RATE:
                self.pending = byte
                self.queue.append(ACK)
            case Command.ECHO:
                self.queue.append(ECHO)
            case Command.IDENTIFY:
                self.queue += [ACK, *IDENTITY]
            case Command.ENABLE:
                self.queue[:] = [ACK]
                self.scanning = True
            case Command.DISABLE | Command.SET_DEFAULTS:
                self.queue[:] = [ACK]
                self.rate, self.scanning = RATE_DEFAULT, byte == Command.SET_DEFAULTS
            case Command.RESEND:
                self.queue.append(self.last_sent)
            case Command.RESET:
                self.queue[:] = [ACK, SELF_TEST_PASSED]
                self.rate, self.leds, self.scanning = RATE_DEFAULT, 0, True
            case _:
                self.queue.append(RESEND)

    def _argument(self, command: int, byte: int) -> None:
        if command == Command.SET_LEDS:
            self.leds = byte & LEDS_USED
            self.queue.append(ACK)
        elif command == Command.SET_RATE:
            self.rate = byte & RATE_USED
            self.queue.append(ACK)
        elif byte == 0:  # which scan set is it?
            self.queue += [ACK, SCAN_SET]
        else:
            self.queue.append(ACK if byte == SCAN_SET else RESEND)

    def room(self) -> int:
        """How many bytes of scan codes fit now. A keyboard that is disabled takes and drops them; answers to
        commands have room always."""
        return max(BUFFER_BYTES - len(self.queue), 0)

    def press(self, scancodes: bytes) -> None:
        """Scan set 2, make and break codes as they go over the cable."""
        if self.scanning:
            self.queue.extend(scancodes[: self.room()])

    def take(self) -> int:
        """The next byte for the controller; the queue must not be empty."""
        self.last_sent = self.queue.pop(0)
        return self.last_sent

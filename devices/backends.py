"""Where the bytes of a device's channels go to and come from on the host.

console  a UNIX stream socket `<run_dir>/console-<node>.sock`, see devices/consoles.py
log      output, line by line, as events of kind "log" for the launcher
null     output vanishes, there is no input

In a machine, all of these are in the process `consoles` (devices/rim.py), and the device's process has a
RingBackEnd in their place.
Left out: files, host serial ports.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from devices.consoles import Clients, Console, listen
from devices.ring import ChannelRings, wake, woken

LOG_LINE_MAX = 400  # bytes without a line end


class BackEnd(Protocol):
    """One channel's host side."""

    def write(self, data: bytes) -> None:
        """Output of the device."""

    def take(self, most: int) -> bytes:
        """Up to `most` bytes of input, taken away."""

    def read_fds(self) -> list[int]: ...

    def write_fds(self) -> list[int]: ...

    def ready(self, readable: set[int], writable: set[int]) -> None:
        """Descriptors of read_fds() and write_fds() that are ready now."""

    def close(self, deadline_s: float) -> None:
        """Deliver what is not delivered yet, for at most `deadline_s` seconds, and remove what was made."""


class NullBackEnd:
    def write(self, data: bytes) -> None:
        pass

    def take(self, most: int) -> bytes:
        return b""

    def read_fds(self) -> list[int]:
        return []

    def write_fds(self) -> list[int]:
        return []

    def ready(self, readable: set[int], writable: set[int]) -> None:
        pass

    def close(self, deadline_s: float) -> None:
        pass


def log_lines(data: bytes, ended: bool = False) -> tuple[list[str], int]:
    """Lines of a log, bytes that aren't printable ASCII escaped, and how many bytes they are; the rest is a
    line that has not ended, unless the log has."""
    lines, start = [], 0
    while start < len(data):
        end = data.find(b"\n", start, start + LOG_LINE_MAX + 1)
        if end < 0 and len(data) - start <= LOG_LINE_MAX and not ended:
            break
        stop = end if end >= 0 else min(len(data), start + LOG_LINE_MAX)
        if line := data[start:stop].replace(b"\r", b""):
            lines.append("".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in line))
        start = stop + (end >= 0)
    return lines, start


class LogBackEnd(NullBackEnd):
    """Lines of output to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rest = b""

    def write(self, data: bytes) -> None:
        self._move(self._rest + data, False)

    def close(self, deadline_s: float) -> None:
        self._move(self._rest, True)

    def _move(self, data: bytes, ended: bool) -> None:
        lines, size = log_lines(data, ended)
        self._rest = data[size:]
        for line in lines:
            self._say(line)


class RingBackEnd(NullBackEnd):
    """The device's end of a channel's rings: bytes come and go once, whatever processes of it are killed.

    `put_out`, `taken_in`: positions behind the last committed step, None: those of the rings. What a new
    process puts out again is not put twice; input that was taken in no committed step is taken again.
    """

    def __init__(
        self, rings: ChannelRings, wake_rim: int, wake_device: int,
        put_out: int | None = None, taken_in: int | None = None,
    ) -> None:  # fmt: skip
        self._output, self._input = rings.output, rings.input
        self._wake_rim, self._wake_device = wake_rim, wake_device
        self._put_out = self._output.tail if put_out is None else put_out
        self._taken_in = self._input.head if taken_in is None else taken_in
        self._output.waiting = False
        self._input.head = self._taken_in
        wake(wake_rim)  # an earlier process may have ended before it did
        wake(wake_device)  # and it may have taken the wake-up for what it did not take

    def write(self, data: bytes) -> None:
        """Put all of it, waiting while the rim makes room."""
        rest = data[max(0, self._output.tail - self._put_out) :]
        self._put_out += len(data)
        while rest:
            rest = self._output.put(rest)
            if rest and not self._output.room():
                self._wait_for_room()
        if self._output.hurries():
            wake(self._wake_rim)

    def take(self, most: int) -> bytes:
        """What was taken before is committed by now, and its room given back."""
        if self._input.head != self._taken_in:
            self._input.head = self._taken_in
            if self._input.waiting:
                wake(self._wake_rim)
        data = self._input.peek(most)
        self._taken_in += len(data)
        return data

    def read_fds(self) -> list[int]:
        return [self._wake_device]

    def ready(self, readable: set[int], writable: set[int]) -> None:
        if self._wake_device in readable:
            woken(self._wake_device)

    def _wait_for_room(self) -> None:
        self._output.waiting = True
        wake(self._wake_rim)
        while not self._output.room():
            select.select([self._wake_device], [], [])
            woken(self._wake_device)
        self._output.waiting = False
        wake(self._wake_device)  # for what else it said


class ConsoleBackEnd:
    """The console of a device that has the sockets in its own process."""

    def __init__(self, path: Path) -> None:
        self._fd = ChannelRings.make("console")
        self._rings = ChannelRings(self._fd)
        self._console = Console(self._rings, listen(path), Clients())

    def write(self, data: bytes) -> None:
        while data:
            data = self._rings.output.put(data)
            self._console.move_out()

    def take(self, most: int) -> bytes:
        data = self._rings.input.peek(most)
        self._rings.input.head += len(data)
        return data

    def read_fds(self) -> list[int]:
        return self._console.read_fds()

    def write_fds(self) -> list[int]:
        return self._console.write_fds()

    def ready(self, readable: set[int], writable: set[int]) -> None:
        self._console.ready(readable, writable)

    def close(self, deadline_s: float) -> None:
        while self._console.move_out():
            pass
        self._console.close(deadline_s)
        os.close(self._fd)

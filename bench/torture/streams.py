"""The host's end of a console on which lines.S runs: it checks each byte, and sends lines of its own.

What comes is lines of 64 bytes: those of lines.S (G, Z, E), and what `other` takes. Before the first line
there may be anything, what the kernel says while it starts.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

LINE = 64
WINDOW = 8  # lines that the guest has not taken yet: 512 bytes, fewer than a terminal's buffer
PER_LINE = 2  # lines to the guest at most, for each of its own
ARRIVALS = 1 << 15  # that are remembered
MASK = 0xFFFF_FFFF


def characters(number: int, salt: int, count: int) -> bytes:
    """As lines.S fills a line."""
    x = (number * 0x9E3779B1 & MASK) ^ salt | 1
    out = bytearray()
    for _ in range(count):
        x ^= x << 13 & MASK
        x ^= x >> 17
        x ^= x << 5 & MASK
        out.append(65 + (x >> 8 & 31))
    return bytes(out)


def line_in(number: int, salt: int) -> bytes:
    """What the guest expects as its `number`th line."""
    return b"H %08x " % number + characters(number, salt, LINE - 12) + b"\n"


def line_out(kind: bytes, number: int, taken: int, salt: int) -> bytes:
    """What the guest says."""
    return kind + b" %08x %08x " % (number, taken) + characters(number, salt, LINE - 21) + b"\n"


class Stream(threading.Thread):
    """One console. `number`, `taken`: lines that have come, and that the guest has taken of ours."""

    def __init__(
        self,
        path: Path,
        name: str,
        salt: int,
        begin: bytes = b"",
        other: Callable[[bytes], None] | None = None,
    ) -> None:
        """`begin`: lines begin behind it; else with the first byte."""
        super().__init__(daemon=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(path))
        self.console, self._salt, self._other = name, salt, other
        self.text = bytearray()  # before the first line, and after the last one
        self.number = self.taken = 0
        self.bytes_out = self.bytes_in = 0
        self.arrivals: deque[float] = deque(maxlen=ARRIVALS)  # of lines, on CLOCK_MONOTONIC in seconds
        self.faults: list[str] = []
        self.ended = False  # its last line has come
        self.closed = False
        self._begin, self._lines = begin, not begin
        self._sent = 0
        self._leaving = self._closing = False
        self._buffer = bytearray()

    def run(self) -> None:
        try:
            while data := self._sock.recv(65536):
                self._take(data)
        except OSError as error:
            if not self._closing:
                self.faults.append(f"{self.console}: {error}")
        self.closed = True

    def type(self, data: bytes) -> None:
        """To the guest, as it is."""
        self._sock.sendall(data)

    def leave(self) -> None:
        """Have the guest's program end; `ended` says when it has."""
        self._leaving = True

    def wait_for(self, text: bytes, timeout_s: float) -> bool:
        """Until something has been said outside of lines; whether it was."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text and time.monotonic() < deadline and not self.closed:
            time.sleep(0.01)
        return text in self.text

    def close(self) -> None:
        self._closing = True
        self._sock.close()

    def _take(self, data: bytes) -> None:
        if not self._lines:
            self.text += data
            if not self._begin or self._begin not in self.text:
                return
            text, _, data = bytes(self.text).partition(self._begin)
            self.text[:] = text + self._begin
            self._lines, self._begin = True, b""
        self._buffer += data
        while len(self._buffer) >= LINE and self._lines and not self.faults:
            line = bytes(self._buffer[:LINE])
            del self._buffer[:LINE]
            self._take_line(line)
        if not self._lines:
            self.text += self._buffer
            self._buffer.clear()

    def _take_line(self, line: bytes) -> None:
        kind = line[:1]
        if kind not in (b"G", b"Z"):
            if self._other is not None and kind != b"":
                self._other(line)
            else:
                self.faults.append(f"{self.console}: after line {self.number} came {line!r}")
            return
        try:
            taken = int(line[11:19], 16)
        except ValueError:
            taken = -1
        expected = line_out(kind, self.number + 1, max(taken, 0), self._salt)
        if not self.taken <= taken <= self._sent or line != expected:
            self.faults.append(f"{self.console}: {line!r} in place of {expected!r}")
            return
        self.number += 1
        self.taken = taken
        self.bytes_out += LINE
        self.bytes_in = taken * LINE
        self.arrivals.append(time.monotonic())
        if kind == b"Z":
            self.ended = True
            if self._other is None:
                self._lines = False
        elif self._leaving:
            self._sock.sendall(b"Q" * LINE)
            self._leaving = False
            self._sent = 1 << 62  # nothing more
        else:
            for _ in range(min(PER_LINE, self.taken + WINDOW - self._sent)):
                self._sent += 1
                self._sock.sendall(line_in(self._sent, self._salt))

    def longest_silence(self, begin: float, end: float) -> float:
        """Between two lines, the one before `begin` and the one after `end` included; seconds."""
        times = [t for t in list(self.arrivals) if t >= begin - 1.0]
        before = [t for t in times if t <= begin][-1:]
        after = [t for t in times if t >= end][:1]
        inside = [*before, *(t for t in times if begin < t < end), *after]
        return max((b - a for a, b in pairwise(inside)), default=0.0)

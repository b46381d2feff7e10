"""Where the bytes of a device's channels go to and come from on the host.

console  a UNIX stream socket `<run_dir>/console-<node>.sock`; any number of clients, raw bytes both ways.
         Output goes to all; a client that attaches first gets the scroll-back. Input of all is merged and
         is read only as fast as the device takes it.
log      output, line by line, as events of kind "log" for the launcher
null     output vanishes, there is no input

In a machine, consoles and logs are in the process `consoles` (devices/rim.py), and the device's process has a
RingBackEnd in their place.
Left out: files, host serial ports.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from devices.ring import ChannelRings, wake, woken

SCROLL_BACK = 256 << 10  # bytes
BEHIND_MAX = 64 << 20  # bytes that wait for a client that does not read; beyond, it is dropped
INPUT_MAX = 4096  # bytes read ahead of the device
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


class LogBackEnd(NullBackEnd):
    """Lines of output to `say`; bytes that aren't printable ASCII are escaped."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._line = bytearray()

    def write(self, data: bytes) -> None:
        for byte in data:
            if byte == 0x0A or len(self._line) >= LOG_LINE_MAX:
                self._end_line()
            if byte not in (0x0A, 0x0D):
                self._line.append(byte)

    def close(self, deadline_s: float) -> None:
        self._end_line()

    def _end_line(self) -> None:
        if self._line:
            text = "".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in self._line)
            self._line.clear()
            self._say(text)


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


class _Client:
    __slots__ = ("closed_input", "outgoing", "sock")

    def __init__(self, sock: socket.socket, scroll_back: bytes) -> None:
        self.sock = sock
        self.outgoing = bytearray(scroll_back)
        self.closed_input = False  # it has shut down its sending side and only watches


class ConsoleBackEnd:
    """See the module's docstring."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scroll_back = bytearray()
        self._input = bytearray()
        self._clients: dict[int, _Client] = {}  # by descriptor
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        self._listener.setblocking(False)

    def write(self, data: bytes) -> None:
        self._scroll_back += data
        if len(self._scroll_back) > 2 * SCROLL_BACK:  # trimmed now and then, not at each byte
            del self._scroll_back[:-SCROLL_BACK]
        for client in list(self._clients.values()):
            client.outgoing += data
            self._push(client)

    def take(self, most: int) -> bytes:
        data = bytes(self._input[:most])
        del self._input[:most]
        return data

    def read_fds(self) -> list[int]:
        listener = [self._listener.fileno()]
        if len(self._input) >= INPUT_MAX:
            return listener
        return listener + [fd for fd, client in self._clients.items() if not client.closed_input]

    def write_fds(self) -> list[int]:
        return [fd for fd, client in self._clients.items() if client.outgoing]

    def ready(self, readable: set[int], writable: set[int]) -> None:
        for fd in writable & self._clients.keys():
            self._push(self._clients[fd])
        for fd in readable & self._clients.keys():
            self._pull(self._clients[fd])
        if self._listener.fileno() in readable:
            self._accept()

    def close(self, deadline_s: float) -> None:
        self._accept()  # whoever has connected already is attached
        deadline = time.monotonic() + deadline_s
        while (waiting := self.write_fds()) and (left := deadline - time.monotonic()) > 0:
            _, writable, _ = select.select([], waiting, [], left)
            self.ready(set(), set(writable))
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            client = _Client(sock, bytes(self._scroll_back[-SCROLL_BACK:]))
            self._clients[sock.fileno()] = client
            self._push(client)

    def _push(self, client: _Client) -> None:
        try:
            while client.outgoing:
                sent = client.sock.send(client.outgoing)
                del client.outgoing[:sent]
        except BlockingIOError:
            if len(client.outgoing) > BEHIND_MAX:
                self._drop(client)
        except OSError:  # it has hung up
            self._drop(client)

    def _pull(self, client: _Client) -> None:
        try:
            data = client.sock.recv(INPUT_MAX)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if data:
            self._input += data
        else:
            client.closed_input = True
            try:
                client.sock.send(b"")  # fails if it has closed both ways
            except OSError:
                self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.sock.fileno(), None)
        client.sock.close()

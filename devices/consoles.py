"""A device's console: a UNIX stream socket, any number of clients, raw bytes both ways.

Output goes to all clients; one that attaches first gets the scroll-back. Input of all is merged, and is read
only as fast as the device takes it. All of this may go on in another process at any point: what was said,
how far each client has got it and what came from it are in memory that outlives the process, noted there by
the kernel itself (devices/counted_unsafe.py); the launcher keeps the sockets open (bus/control.py). So no
client loses a byte or gets one twice, whatever its program is. But for one moment: who has been accepted and
not yet given to the launcher to keep is hung up on.
Left out: terminal sizes, several consoles of one device.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from bus.control import Control
from devices.counted_unsafe import NOTE_SIZE, Counted
from devices.history import History
from devices.ring import ChannelRings

SCROLL_BACK = 256 << 10  # bytes
BEHIND_MAX = 64 << 20  # bytes that wait for a client that does not read; beyond, it is dropped
PIECE = 64 << 10  # bytes moved before others have their turn
SLOTS, SLOT_SIZE = 64, 32 + NOTE_SIZE  # of the table of clients
_CHANNEL, _SENT = 0, 1  # words of a slot: number of the channel + 1 or 0, position in its output
TABLE_SIZE = SLOTS * SLOT_SIZE


class Client:
    """One connection; `sent`: the position up to which it has been sent what was said."""

    def __init__(self, sock: socket.socket, name: str, memory: memoryview) -> None:
        """`name`: under which it is kept, "" where it isn't. `memory`: SLOT_SIZE bytes."""
        self.sock, self.name = sock, name
        self.closed_input = False  # it has shut down its sending side and only watches
        self._words = memory[: SLOT_SIZE - NOTE_SIZE].cast("Q")
        self._counted = Counted(memory[SLOT_SIZE - NOTE_SIZE :])
        self._words[_SENT] += self._counted.done(self.sent)  # by a process that ended before it could say so

    @property
    def sent(self) -> int:
        return self._words[_SENT]

    def push(self, history: History, end: int) -> None:
        """Send it what was said up to `end`, as much as it takes. OSError: it has hung up."""
        while (left := end - self.sent) > 0:
            data = history.read(self.sent, min(left, PIECE))
            done = self._counted.send(self.sock.fileno(), self.sent, data)
            if done is None:
                return
            self._words[_SENT] += done

    def free(self) -> None:
        self._words[_CHANNEL] = 0


class Clients:
    """The table of all clients of all consoles of a process."""

    def __init__(
        self, table: int | None = None, control: Control | None = None, kept: Mapping[str, int] | None = None
    ) -> None:
        """`table`: a memfd of TABLE_SIZE bytes that outlives us, `control`: who keeps sockets, `kept`: those
        of an earlier process, ours from now on."""
        self._memory = memoryview(mmap.mmap(-1 if table is None else table, TABLE_SIZE))
        self._control = control
        self._kept = dict(kept or {})

    def of(self, channel: int) -> list[Client]:
        """Those that an earlier process has had of a channel."""
        found = []
        for slot in range(SLOTS):
            memory, name = self._slot(slot), f"client:{slot}"
            if memory[:8].cast("Q")[_CHANNEL] == channel + 1:
                fd = self._kept.pop(name, None)
                if fd is None:  # it ended before it had it kept, or after it had dropped it
                    memory[:8].cast("Q")[_CHANNEL] = 0
                else:
                    found.append(Client(socket.socket(fileno=fd), name, memory))
        return found

    def forget_others(self) -> None:
        """Let go what belongs to no channel."""
        for name, fd in self._kept.items():
            os.close(fd)
            self._let_go(name)
        self._kept.clear()

    def welcome(self, sock: socket.socket, channel: int, position: int) -> Client:
        """A new client, to be sent what was said from `position` on."""
        slot = next((n for n in range(SLOTS) if not self._slot(n)[:8].cast("Q")[_CHANNEL]), None)
        name, memory = "", memoryview(bytearray(SLOT_SIZE))
        if slot is not None:
            name, memory = f"client:{slot}", self._slot(slot)
            memory[:] = bytes(SLOT_SIZE)
        words = memory[: SLOT_SIZE - NOTE_SIZE].cast("Q")
        words[_SENT], words[_CHANNEL] = position, channel + 1
        if name and not (self._control is not None and self._control.keep(name, sock.fileno())):
            name = ""
        return Client(sock, name, memory)

    def drop(self, client: Client) -> None:
        """Hang up, for all who have this connection open."""
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_RDWR)
        if client.name:
            self._let_go(client.name)
        client.free()
        client.sock.close()

    def _let_go(self, name: str) -> None:
        if self._control is not None:
            self._control.let_go(name)

    def _slot(self, number: int) -> memoryview:
        return self._memory[number * SLOT_SIZE : (number + 1) * SLOT_SIZE]


class Console:
    """See the module's docstring. Its user takes `output` and puts `input` of the rings through it only."""

    def __init__(
        self, rings: ChannelRings, listener: socket.socket, clients: Clients, channel: int = 0
    ) -> None:
        self._output, self._input, self._history = rings.output, rings.input, rings.history
        self._output.lazy = False
        self._counted = Counted(rings.note)
        self._input.tail += self._counted.done(self._input.tail)  # see Client
        self._listener, self._table, self._channel = listener, clients, channel
        self._clients = {client.sock.fileno(): client for client in clients.of(channel)}
        self.moved_out = self.moved_in = 0  # bytes

    def move_out(self) -> int:
        """Take some output, send it on; how many bytes were taken."""
        head, data = self._output.head, self._output.peek(PIECE)
        if data:
            self._history.write(head, data)
            self._output.head = head + len(data)
            self.moved_out += len(data)
            for client in list(self._clients.values()):
                self._push(client)
            needed = [client.sent for client in self._clients.values()]
            self._history.forget(min([self._output.head - SCROLL_BACK, *needed]))
        return len(data)

    def read_fds(self) -> list[int]:
        listener = [self._listener.fileno()]
        if not self._input.room():
            return listener
        return listener + [fd for fd, client in self._clients.items() if not client.closed_input]

    def write_fds(self) -> list[int]:
        end = self._output.head
        return [fd for fd, client in self._clients.items() if client.sent < end]

    def ready(self, readable: set[int], writable: set[int]) -> None:
        """Descriptors of read_fds() and write_fds() that are ready now."""
        for fd in writable & self._clients.keys():
            self._push(self._clients[fd])
        for fd in readable & self._clients.keys():
            self._pull(self._clients[fd])
        if self._listener.fileno() in readable:
            self._accept()

    def close(self, deadline_s: float) -> None:
        """Send all that was taken, for at most `deadline_s` seconds, and hang up; the socket's file is
        removed first, so that nobody comes who would not be noticed."""
        path = self._listener.getsockname()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._accept()  # whoever has connected already is attached
        for client in list(self._clients.values()):
            self._push(client)
        deadline = time.monotonic() + deadline_s
        while (waiting := self.write_fds()) and (left := deadline - time.monotonic()) > 0:
            _, writable, _ = select.select([], waiting, [], left)
            self.ready(set(), set(writable))
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()

    def release(self) -> None:
        """Another process goes on: close what is open here, and nothing else."""
        self._listener.close()
        for client in self._clients.values():
            client.sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            start = max(self._history.start, self._output.head - SCROLL_BACK)
            client = self._table.welcome(sock, self._channel, start)
            self._clients[sock.fileno()] = client
            self._push(client)

    def _push(self, client: Client) -> None:
        try:
            client.push(self._history, self._output.head)
        except OSError:  # it has hung up
            self._drop(client)
        else:
            if self._output.head - client.sent > BEHIND_MAX:
                self._drop(client)

    def _pull(self, client: Client) -> None:
        if not (area := self._input.area()):
            return
        tail = self._input.tail
        try:
            count = self._counted.receive(client.sock.fileno(), tail, area)
            if count == 0:
                client.closed_input = True
                client.sock.send(b"")  # fails if it has closed both ways
        except OSError:
            self._drop(client)
            return
        if count:
            self._input.tail = tail + count
            self.moved_in += count

    def _drop(self, client: Client) -> None:
        del self._clients[client.sock.fileno()]
        self._table.drop(client)


def make_table() -> int:
    """A memfd for a table of clients, without any: its descriptor."""
    fd = os.memfd_create("clients", os.MFD_CLOEXEC)
    os.ftruncate(fd, TABLE_SIZE)
    return fd


def listen(path: Path) -> socket.socket:
    """A console's socket; a file that a killed process has left is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)
    listener.setblocking(False)
    return listener

"""The console process: carries bytes between the terminal and a serial port, and guards the terminal.

It is apart from the launcher so that either may be killed: when the launcher ends, however it ends,
this process shows what is still in the console socket, restores the terminal and exits; when this
process is killed, the launcher restores the terminal. It is forked off before the launcher has threads.

Records to it:    {"op": "connect", path} | {"op": "say", text} | {"op": "finish"} | {"op": "leave"}
Records from it:  {"op": "connected"} | {"op": "until"} | {"op": "leave"} | {"op": "closed"} |
                  {"op": "failed", error} | {"op": "output-closed"}
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import termios
import time
from pathlib import Path
from typing import Any

import msgspec

from launcher.console import HOW_TO_LEAVE, KeyFilter, TextWatch
from launcher.forkserver import close_other_descriptors, redirect_standard, run_and_exit, set_title
from launcher.terminal import SANE, Terminal
from memory_node import wire

STDIN, STDOUT, STDERR = 0, 1, 2
PIECE = 64 << 10
INPUT_LIMIT = 64 << 10  # unsent input kept; beyond it, standard input is not read
ORPHAN_DRAIN_S = 2.0  # after the launcher's death; its socket ends as soon as the kernel has ended `consoles`


class PumpOptions(msgspec.Struct, frozen=True):
    """`show`: bytes go to standard output and come from standard input. `until`: text to watch for."""

    show: bool
    until: bytes | None = None


class Pump(msgspec.Struct):
    """The launcher's handle: `sock` becomes readable when there are records."""

    pid: int
    pidfd: int
    sock: socket.socket
    terminal: Terminal | None
    stopped: bool = False

    @classmethod
    def start(cls, options: PumpOptions) -> Pump:
        """Fork the process; it touches neither terminal nor input before `connect`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        terminal = Terminal.of(STDIN) if options.show else None
        parent = os.pidfd_open(os.getpid())
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            gc.enable()
            run_and_exit(lambda: _PumpProcess(theirs, parent, options, terminal).run())
        theirs.close()
        os.close(parent)
        return cls(pid, os.pidfd_open(pid), ours, terminal)

    def connect(self, path: Path) -> None:
        self._send({"op": "connect", "path": str(path)})

    def say(self, text: str) -> None:
        """One line on standard error, in order with the console's output."""
        self._send({"op": "say", "text": text})

    def read(self) -> dict[str, Any] | None:
        """The next record; None when the process has ended."""
        try:
            received = wire.receive_record(self.sock)
        except ConnectionResetError:
            return None
        return received[0] if received else None

    def finish(self, interrupt: int) -> None:
        """Wait until all that the console has said is shown, its socket having an end; then end it.

        A reader of our output that has stopped reading holds this up, until `interrupt` is readable.
        """
        self._send({"op": "finish"})
        while interrupt not in select.select([self.sock.fileno(), interrupt], [], [])[0]:
            if self.read() is None:
                break
        self.stop()

    def leave(self, interrupt: int | None = None) -> None:
        """End it in order, although the console goes on; `interrupt`: as of `finish`."""
        self._send({"op": "leave"})
        fds = [self.sock.fileno(), *([] if interrupt is None else [interrupt])]
        while interrupt not in select.select(fds, [], [])[0]:
            if self.read() is None:
                break
        self.stop()

    def stop(self) -> None:
        """End it at once and restore the terminal, in case it could not. May be called again."""
        if self.stopped:
            return
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.sock.close()
        if self.terminal is not None:
            self.terminal.restore()

    def _send(self, record: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed by `read`
            wire.send_record(self.sock, record)


class _PumpProcess:
    def __init__(
        self, sock: socket.socket, parent: int, options: PumpOptions, terminal: Terminal | None
    ) -> None:
        self._sock, self._parent, self._options, self._terminal = sock, parent, options, terminal
        self._console: socket.socket | None = None
        self._path = Path()  # of its socket
        self._met = False  # bytes have come from it, or gone there
        self._keys = KeyFilter() if terminal is not None else None
        self._watch = TextWatch(options.until) if options.until else None
        self._to_guest = bytearray()
        self._input_open = options.show and (terminal is not None or not os.isatty(STDIN))
        self._raw = self._finishing = self._output_broken = False
        self._last_byte = b"\n"

    def run(self) -> None:
        close_other_descriptors(self._sock.fileno(), self._parent)
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)  # the launcher acts on these and ends this process
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background: reads fail, nothing stops
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        if not self._options.show:
            redirect_standard(os.devnull)
        set_title("backplane: console", "console")
        try:
            while not (self._finishing and self._console is None):
                self._turn()
        finally:
            self._restore()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._parent, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        if self._console is not None:
            wanted = select.POLLIN | (select.POLLOUT if self._to_guest else 0)
            poll.register(self._console, wanted)
            if self._input_open and len(self._to_guest) < INPUT_LIMIT:
                poll.register(STDIN, select.POLLIN)
        ready = dict(poll.poll())
        if self._parent in ready:
            self._outlive_launcher()
            return
        if self._sock.fileno() in ready:
            self._obey()
        if self._console is not None and (events := ready.get(self._console.fileno())):
            self._serve_console(self._console, events)
        if STDIN in ready and self._console is not None:
            self._read_input()

    def _obey(self) -> None:
        try:
            received = wire.receive_record(self._sock)
        except ConnectionResetError:  # killed before it had read all of our records
            received = None
        if received is None:
            return  # the launcher has ended: its pidfd says so next
        record = received[0]
        match record["op"]:
            case "connect":
                self._connect(Path(record["path"]))
            case "say":
                self._say(record["text"])
            case "finish":
                self._finishing = True
            case "leave":
                self._finishing = True
                if self._console is not None:
                    self._console.close()
                    self._console = None

    def _connect(self, path: Path) -> None:
        self._path = path
        try:
            self._dial()
        except OSError as e:
            self._tell({"op": "failed", "error": f"{path.name}: {e.strerror}"})
            return
        set_title(f"backplane {path.parent.name}: console", "console")
        if self._terminal is not None:
            self._say(HOW_TO_LEAVE)
            self._raw = True
            self._terminal.set_raw()
        self._tell({"op": "connected"})

    def _dial(self) -> None:
        console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            console.connect(str(self._path))
        except OSError:
            console.close()
            raise
        console.setblocking(False)
        self._console = console

    def _serve_console(self, console: socket.socket, events: int) -> None:
        if events & select.POLLOUT and self._to_guest:
            with contextlib.suppress(OSError):  # an end shows as an empty read below
                del self._to_guest[: console.send(self._to_guest)]
                self._met = True
        if events & ~select.POLLOUT:
            try:
                piece = console.recv(PIECE)
            except BlockingIOError:
                return
            except OSError:
                piece = b""
            if piece:
                self._met = True
                self._show(piece)
                return
            console.close()
            self._console = None
            if not self._met:  # accepted by a process that has ended right then (devices/consoles.py)?
                with contextlib.suppress(OSError):
                    self._dial()
                    return
            self._tell({"op": "closed"})

    def _show(self, piece: bytes) -> None:
        if self._options.show and not self._output_broken:
            try:
                _write_all(STDOUT, piece)
            except OSError:
                self._output_broken = True
                self._tell({"op": "output-closed"})
        self._last_byte = piece[-1:]
        if self._watch is not None and self._watch.feed(piece):
            self._watch = None
            self._tell({"op": "until"})

    def _read_input(self) -> None:
        try:
            typed = os.read(STDIN, PIECE)
        except BlockingIOError:  # a descriptor that someone else made non-blocking
            return
        except OSError:
            typed = b""
        if not typed:
            self._input_open = False
            return
        leave = False
        if self._keys is not None:
            typed, leave = self._keys.feed(typed)
        self._to_guest += typed
        if leave:
            self._input_open = False
            self._tell({"op": "leave"})

    def _outlive_launcher(self) -> None:
        """The launcher is gone and the kernel is ending the machine: restore first, then show the rest.

        The rest may go on in the middle of a line, so what tidies the screen up comes behind it.
        """
        was_raw, self._raw = self._raw, False
        if was_raw and self._terminal is not None:
            self._terminal.restore()  # this once: from now on the terminal is the shell's
        self._finishing = True
        if self._console is not None:
            with contextlib.suppress(OSError):
                self._show_rest(self._console)
            self._console.close()
            self._console = None
        if was_raw:
            self._tidy()

    def _show_rest(self, console: socket.socket) -> None:
        """Up to the socket's end; where the machine goes on alone, up to what is there after a while."""
        until = time.monotonic() + ORPHAN_DRAIN_S
        while (left := until - time.monotonic()) > 0:
            console.settimeout(left)
            piece = console.recv(PIECE)
            if not piece:
                return
            self._show(piece)
        there = int.from_bytes(fcntl.ioctl(console, termios.FIONREAD, bytes(4)), sys.byteorder)
        while there > 0 and (piece := console.recv(min(there, PIECE))):
            there -= len(piece)
            self._show(piece)

    def _restore(self) -> None:
        if self._raw and self._terminal is not None:
            self._raw = False
            self._tidy()
            self._terminal.restore()

    def _tidy(self) -> None:
        """What the guest may have left on the screen: attributes, a hidden cursor, a line without its end."""
        if os.isatty(STDOUT) and not self._output_broken:
            with contextlib.suppress(OSError):
                _write_all(STDOUT, SANE + (b"" if self._last_byte == b"\n" else b"\r\n"))

    def _say(self, text: str) -> None:
        start = "\r\n" if self._raw and self._last_byte != b"\n" else ""
        with contextlib.suppress(OSError):
            _write_all(STDERR, f"{start}{text}{chr(13) if self._raw else ''}\n".encode())
        self._last_byte = b"\n"

    def _tell(self, record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            wire.send_record(self._sock, record)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # a descriptor that someone else made non-blocking
            select.select([], [fd], [])

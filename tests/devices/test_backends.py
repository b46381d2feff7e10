"""The console's promises: scroll-back, nothing lost while someone is attached, no byte read too early."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.backends import LOG_LINE_MAX, ConsoleBackEnd, LogBackEnd, NullBackEnd
from devices.consoles import SCROLL_BACK
from devices.ring import INPUT


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "console-uart0.sock"


@pytest.fixture
def console(path: Path) -> Iterator[ConsoleBackEnd]:
    back_end = ConsoleBackEnd(path)
    yield back_end
    back_end.close(0)


def attach(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(240)
    client.connect(str(path))
    return client


def turn(console: ConsoleBackEnd, timeout_s: float = 1) -> None:
    """What the host's loop does once."""
    readable, writable, _ = select.select(console.read_fds(), console.write_fds(), [], timeout_s)
    console.ready(set(readable), set(writable))


def receive(client: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n and (part := client.recv(n - len(data))):
        data += part
    return data


def test_output_reaches_every_client(path: Path, console: ConsoleBackEnd) -> None:
    with attach(path) as a, attach(path) as b:
        turn(console)
        console.write(b"hello")
        assert (receive(a, 5), receive(b, 5)) == (b"hello", b"hello")


def test_a_new_client_gets_what_was_said_before(path: Path, console: ConsoleBackEnd) -> None:
    console.write(b"boot ")
    console.write(b"messages\n")
    with attach(path) as client:
        turn(console)
        console.write(b"live")
        assert receive(client, 18) == b"boot messages\nlive"


def test_the_scroll_back_is_bounded_and_keeps_the_end(path: Path, console: ConsoleBackEnd) -> None:
    for i in range(3 * SCROLL_BACK // 1000):
        console.write(f"{i:0999}\n".encode())
    with attach(path) as client:
        turn(console)
        collected: list[bytes] = []
        reader = threading.Thread(target=lambda: collected.append(receive(client, SCROLL_BACK)))
        reader.start()
        while console.write_fds():
            turn(console)
        reader.join()
        (data,) = collected
        assert len(data) == SCROLL_BACK
        assert data.endswith(f"{3 * SCROLL_BACK // 1000 - 1:0999}\n".encode())


def test_input_is_merged_and_taken_in_pieces(path: Path, console: ConsoleBackEnd) -> None:
    with attach(path) as a, attach(path) as b:
        turn(console)
        a.sendall(b"abc")
        turn(console)
        b.sendall(b"def")
        turn(console)
        assert console.take(4) == b"abcd"
        assert console.take(4) == b"ef"
        assert console.take(4) == b""


def test_input_is_not_read_faster_than_the_device_takes_it(path: Path, console: ConsoleBackEnd) -> None:
    with attach(path) as client:
        turn(console)
        sent = bytes(i & 0xFF for i in range(2 * INPUT))
        client.sendall(sent)
        while len(console.read_fds()) > 1:
            turn(console)
        assert len(console.read_fds()) == 1  # only the listener: the rest stays with the kernel
        got = b""
        while len(got) < len(sent):
            got += console.take(16)
            if len(console.read_fds()) > 1:
                turn(console, 0)
        assert got == sent


def test_a_client_that_does_not_read_delays_nobody_and_loses_nothing(
    path: Path, console: ConsoleBackEnd
) -> None:
    text = bytes(range(256)) * 16
    with attach(path) as slow, attach(path) as quick:
        turn(console)
        for _ in range(500):
            console.write(text)
            assert receive(quick, len(text)) == text
        reader = threading.Thread(target=lambda: collected.append(receive(slow, 500 * len(text))))
        collected: list[bytes] = []
        reader.start()
        while console.write_fds():
            turn(console)
        reader.join()
        assert collected[0] == text * 500


def test_close_delivers_everything_even_to_who_has_just_connected(path: Path) -> None:
    console = ConsoleBackEnd(path)
    text = b"x" * 100_000 + b"reboot: Power down\n"
    with attach(path) as attached:
        turn(console)
        console.write(text * 8)
        with attach(path) as just_now:  # not accepted yet
            collected: dict[str, bytes] = {}
            readers = [
                threading.Thread(target=lambda n=name, c=client: collected.update({n: receive(c, 1 << 30)}))
                for name, client in (("attached", attached), ("just_now", just_now))
            ]
            for reader in readers:
                reader.start()
            console.close(240)
            for reader in readers:
                reader.join()
    assert collected["attached"] == text * 8
    assert collected["just_now"] == (text * 8)[-SCROLL_BACK:]
    assert not path.exists()


def test_close_does_not_wait_for_ever(path: Path) -> None:
    console = ConsoleBackEnd(path)
    with attach(path):
        turn(console)
        console.write(b"x" * 2_000_000)
        console.close(0.02)
    assert not path.exists()


def test_clients_that_hang_up_are_forgotten(path: Path, console: ConsoleBackEnd) -> None:
    attach(path).close()
    turn(console)
    turn(console)
    assert len(console.read_fds()) == 1
    client = attach(path)
    turn(console)
    client.close()
    for _ in range(3):
        console.write(b"to nobody")
    assert len(console.read_fds()) == 1


def test_a_client_that_only_watches(path: Path, console: ConsoleBackEnd) -> None:
    with attach(path) as client:
        client.shutdown(socket.SHUT_WR)
        turn(console)
        turn(console)
        console.write(b"still here")
        assert receive(client, 10) == b"still here"


def test_the_socket_is_private_and_replaces_a_dead_one(path: Path) -> None:
    path.touch()
    console = ConsoleBackEnd(path)
    assert path.stat().st_mode & 0o777 == 0o600
    console.close(0)


def test_log_lines() -> None:
    lines: list[str] = []
    log = LogBackEnd(lines.append)
    log.write(b"one\r\n\ntw")
    log.write(b"o\x07\xff\nrest")
    assert lines == ["one", "two\\x07\\xff"]
    log.write(b"-" * LOG_LINE_MAX)
    assert len(lines) == 3
    log.close(0)
    assert lines[2] + lines[3] == "rest" + "-" * LOG_LINE_MAX


def test_null() -> None:
    null = NullBackEnd()
    null.write(b"gone")
    assert (null.take(5), null.read_fds(), null.write_fds()) == (b"", [], [])

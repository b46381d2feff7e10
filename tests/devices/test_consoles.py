"""What a process that is killed at the worst moment has done is found by the next one, byte by byte."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.backends import log_lines
from devices.consoles import SCROLL_BACK, SLOT_SIZE, Client, Clients, Console, listen, make_table
from devices.counted_unsafe import NOTE_SIZE, Counted
from devices.history import FORGET_AT_ONCE
from devices.ring import ChannelRings


@pytest.fixture
def fd() -> Iterator[int]:
    fd = ChannelRings.make("g.out")
    yield fd
    os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(240)
    yield ours, theirs
    ours.close()
    theirs.close()


def killed(do: Callable[[], object]) -> None:
    """Do it in a process that is killed before it can do anything else."""
    pid = os.fork()
    if not pid:
        try:
            do()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def shared(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, 4096))[:size]


def test_counts_are_there_when_their_process_is_not(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    note, area = shared(NOTE_SIZE), shared(100)
    counted = Counted(note)
    assert [counted.done(position) for position in (0, 7)] == [0, 0]
    killed(lambda: Counted(note).send(ours.fileno(), 7, b"hello"))
    assert (counted.done(7), counted.done(0), theirs.recv(99)) == (5, 0, b"hello")
    theirs.send(b"answer")
    killed(lambda: Counted(note).receive(ours.fileno(), 12, area[10:14]))
    assert (counted.done(12), counted.done(7), bytes(area[8:16])) == (4, 0, b"\0\0answ\0\0")
    assert counted.receive(ours.fileno(), 16, area) == 2
    assert counted.receive(ours.fileno(), 18, area) is None  # it would have to wait
    assert (counted.done(18), counted.done(16)) == (0, 0)
    theirs.close()
    assert counted.receive(ours.fileno(), 18, area) == 0
    with pytest.raises(BrokenPipeError):
        counted.send(ours.fileno(), 12, b"x")


def test_a_client_goes_on_where_a_killed_process_was(
    fd: int, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    rings, memory = ChannelRings(fd), shared(SLOT_SIZE)
    rings.history.write(0, b"one two three")

    def send_and_tell_nobody() -> None:
        client = Client(ours, "", memory)
        client._counted.send(ours.fileno(), client.sent, b"one two")

    killed(send_and_tell_nobody)
    client = Client(ours, "", memory)
    assert client.sent == 7
    client.push(rings.history, 13)
    assert theirs.recv(99) == b"one two three"
    assert Client(ours, "", memory).sent == 13  # once is enough


def test_input_that_a_killed_process_had_read(fd: int, tmp_path: Path) -> None:
    rings, table, path = ChannelRings(fd), make_table(), tmp_path / "s"
    console = Console(rings, listen(path), Clients(table))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        console.ready(set(console.read_fds()), set())
        client.send(b"typed ")
        (ours,) = set(console.read_fds()) - {console.read_fds()[0]}
        killed(lambda: Counted(rings.note).receive(ours, rings.input.tail, rings.input.area()))
        assert rings.input.peek(99) == b""
        again = Console(rings, listen(tmp_path / "t"), Clients(table))
        assert rings.input.peek(99) == b"typed "
        client.send(b"on")
        console.ready({ours}, set())
        assert rings.input.peek(99) == b"typed on"
        again.close(0)
        console.close(0)
    os.close(table)


def test_what_nobody_needs_takes_no_memory(fd: int, tmp_path: Path) -> None:
    rings = ChannelRings(fd)
    console = Console(rings, listen(tmp_path / "s"), Clients())
    rings.output.head = rings.output.tail = start = 5_000_000_000
    rings.history.skip_to(start)
    for _ in range(200):
        rings.output.put(b"x" * 60_000)
        console.move_out()
    end = rings.output.head
    assert end - rings.history.start < SCROLL_BACK + FORGET_AT_ONCE + 60_000
    assert os.fstat(fd).st_blocks * 512 < 4 << 20  # of 12 MB
    assert rings.history.read(end - SCROLL_BACK, SCROLL_BACK) == b"x" * SCROLL_BACK
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:  # one that reads nothing
        client.connect(str(tmp_path / "s"))
        console.ready(set(console.read_fds()), set())
        for _ in range(20):
            rings.output.put(b"y" * 60_000)
            console.move_out()
        assert rings.history.start <= end
    console.close(0)


@pytest.mark.parametrize("size", [1, 7, 399, 400, 401, 4000])
def test_log_lines_are_the_same_however_they_come(size: int) -> None:
    text = b"one\r\n\ntw\x07o\n" + b"-" * 400 + b"\n" + b"=" * 900 + b"\nrest"
    whole, count = log_lines(text)
    assert (whole[:2], [len(line) for line in whole[2:]], count) == (
        ["one", "tw\\x07o"], [400, 400, 400, 100], len(text) - 4
    )  # fmt: skip
    said, rest = [], b""
    for at in range(0, len(text), size):
        lines, count = log_lines(rest + text[at : at + size])
        said += lines
        rest = (rest + text[at : at + size])[count:]
    assert said + log_lines(rest, ended=True)[0] == [*whole, "rest"]

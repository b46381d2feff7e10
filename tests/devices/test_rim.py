"""The process `consoles`, a device's process and a client of its console: real processes, real sockets."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from bus.endpoint import RequestRefused
from bus.frames import (
    Ping,
    Pong,
    Read,
    ReadReply,
    Reset,
    Shutdown,
    Stats,
    StatsReply,
    StringOut,
    StringOutReply,
)
from bus.link import console_path
from devices.backends import SCROLL_BACK, RingBackEnd
from devices.journal import Journal
from devices.ring import INPUT, OUTPUT, ChannelRings, make_wake
from tests.devices.test_host import GADGET, ROOT, START, Machine, attach_console, read_all

TEXT = bytes(range(256)) * 512


class Rimmed(Machine):
    """Its device `g` has rings and a journal, which outlive its processes and those of the rim."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.journal, self.ring = Journal.make("g"), ChannelRings.make("g.out")
        self.wake_rim, self.wake_device = make_wake(), make_wake()
        self.rings = ChannelRings(self.ring)

    def start_rim(self, kind: str, again: bool = False) -> None:
        fds = {"ring:g:out": self.ring, "wake:g": self.wake_device, "wake_rim": self.wake_rim}
        channels = [{"node": "g", "channel": "out", "kind": kind}]
        if not again:
            self._run("consoles", "devices.rim", {"channels": channels, "fds": fds})
            return
        self._fork("consoles", "devices.rim", {"channels": channels, "fds": fds})
        path = console_path(self.run_dir, "g")
        while True:  # to the bus it is a stranger, as it has no journal
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                if client.connect_ex(str(path)) == 0:
                    return
            self.launcher.wait(1_000_000)
            self.seen += self.launcher.receive()

    def start_device(self, kind: str = "console") -> None:
        fds = {"journal": self.journal, "ring:out": self.ring,
               "wake_rim": self.wake_rim, "wake_device": self.wake_device}  # fmt: skip
        settings = {"backend": kind, "depth": 64}
        self._run("g", "devices.host", {"type": GADGET, "settings": settings, "fds": fds})

    def kill(self, node: str) -> None:
        self.processes[node].kill()
        self.processes[node].wait()

    def end(self) -> None:
        """As the launcher does it: the device, then the consoles."""
        for node in ("g", "consoles"):
            self.cpu.send(node, Shutdown())
            assert self.exit_status(node) == 0

    def say(self, data: bytes) -> None:
        assert self.ask("g", StringOut("regs", 1, 1, data)) == StringOutReply()

    def heard(self, n: int) -> bytes:
        """Bytes that have come to the guest."""
        got = b""
        while len(got) < n:
            length = self.ask("g", Read("regs", 3, 1))
            assert isinstance(length, ReadReply)
            for _ in range(length.value):
                byte = self.ask("g", Read("regs", 2, 1))
                assert isinstance(byte, ReadReply)
                got += bytes([byte.value])
        return got

    def close(self) -> None:
        super().close()
        for fd in (self.journal, self.ring, self.wake_rim, self.wake_device):
            os.close(fd)

    def _fork(self, node: str, module: str, config: dict[str, Any]) -> None:
        whole = {"node": node, "run_dir": str(self.run_dir), "machine": "m", **config}
        line = [sys.executable, "-c", START.format(module=module), msgpack.packb(whole).hex()]
        self.processes[node] = subprocess.Popen(line, cwd=ROOT, pass_fds=list(config["fds"].values()))

    def _run(self, node: str, module: str, config: dict[str, Any]) -> None:
        self._fork(node, module, config)
        self.event(node, "ready")
        self.cpu.connect(node)
        while not self.cpu.has_heard(node):
            self.cpu.wait(10_000_000)
            self.at_cpu_before += self.cpu.receive()


@pytest.fixture
def machine(short_path: Path) -> Iterator[Rimmed]:
    machine = Rimmed(short_path)
    try:
        yield machine
    finally:
        machine.close()


def receive(client: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n and (part := client.recv(n - len(data))):
        data += part
    return data


def test_bytes_both_ways(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    machine.say(b"scroll-back ")
    with attach_console(machine, "g") as client:
        machine.say(b"live")
        assert receive(client, 16) == b"scroll-back live"
        client.sendall(TEXT[:1000])
        assert machine.heard(1000) == TEXT[:1000]


def test_a_killed_device_leaves_its_clients_connected(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    with attach_console(machine, "g") as client:
        machine.say(b"one ")
        client.sendall(b"ab")
        assert machine.heard(2) == b"ab"
        machine.kill("g")
        client.sendall(b"cd")  # while there is none
        machine.start_device()
        machine.say(b"two ")
        client.sendall(b"ef")
        assert machine.heard(4) == b"cdef"
        assert receive(client, 8) == b"one two "
        assert not select.select([client], [], [], 0)[0]


def test_output_that_waits_for_the_rim_survives_the_device(machine: Rimmed) -> None:
    """What was said before there was a rim, in two processes, more than a ring holds."""
    machine.start_device()
    half = TEXT * (OUTPUT // len(TEXT) // 2)
    machine.say(half)
    machine.say(half[:-1])
    machine.kill("g")
    machine.start_device()
    machine.cpu.send("g", StringOut("regs", 1, 1, b"0123456789" * 30_000))  # waits in the middle of it
    while machine.rings.output.room() or not machine.rings.output.waiting:
        machine.cpu.wait(1_000_000)
        machine.at_cpu_before += machine.cpu.receive()
    machine.kill("g")
    machine.start_rim("console")
    with attach_console(machine, "g") as client:
        machine.start_device()
        machine.say(b"end")
        said = receive_until(client, b"end")
    whole = half + half[:-1] + b"0123456789" * 30_000 + b"end"
    assert whole.endswith(said)
    assert len(said) >= SCROLL_BACK
    assert machine.rings.output.tail == len(whole)


def receive_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end) and (part := client.recv(1 << 16)):
        data += part
    return data


def test_input_is_not_read_faster_than_the_rings_and_the_device_take_it(machine: Rimmed) -> None:
    machine.start_rim("console")
    with attach_console(machine, "g") as client:
        sent = TEXT * 4
        writer = threading.Thread(target=lambda: client.sendall(sent))
        writer.start()
        while not machine.rings.input.waiting:
            machine.launcher.wait(1_000_000)
        assert machine.rings.input.used() == INPUT
        got = bytearray()
        device = RingBackEnd(machine.rings, machine.wake_rim, machine.wake_device)
        while len(got) < len(sent):
            if not (piece := device.take(3000)):
                select.select([machine.wake_device], [], [])
                device.ready({machine.wake_device}, set())
            got += piece
        writer.join()
        assert bytes(got) == sent


def test_the_end_delivers_all_that_is_in_the_rings(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    with attach_console(machine, "g") as client:
        collected: list[bytes] = []
        reader = threading.Thread(target=lambda: collected.append(read_all(client)))
        for _ in range(4):
            machine.say(TEXT)
        machine.say(b"Power down\n")
        reader.start()
        machine.end()
        reader.join()
        assert collected == [TEXT * 4 + b"Power down\n"]
    assert not console_path(machine.run_dir, "g").exists()
    assert not (machine.run_dir / "consoles.ipc").exists()


def test_a_new_rim_goes_on_and_still_has_the_scroll_back(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    with attach_console(machine, "g") as client:
        machine.say(b"before ")
        assert receive(client, 7) == b"before "
        machine.kill("consoles")
        assert read_all(client) == b""
    machine.say(b"meanwhile ")
    machine.start_rim("console", again=True)
    with attach_console(machine, "g") as client:
        machine.say(b"after")
        assert receive(client, 22) == b"before meanwhile after"


def test_log_lines_are_the_devices(machine: Rimmed) -> None:
    machine.start_rim("log")
    machine.start_device("log")
    machine.say(b"line\npart")
    event = machine.event("consoles", "log")
    assert (event.text, event.data) == ("line", {"node": "g"})
    machine.end()
    assert machine.event("consoles", "log").text == "part"


def test_it_answers_as_other_nodes_do_and_turns_only_when_there_is_something_to_do(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    machine.say(b"12345")
    with attach_console(machine, "g") as client:
        assert receive(client, 5) == b"12345"
    turns = []
    for _ in range(200):
        reply = machine.ask("consoles", Stats())
        assert isinstance(reply, StatsReply)
        turns.append(reply.counters["turns"])
    assert turns[-1] - turns[0] < 4 * len(turns)  # a busy loop has a dozen between two questions
    assert (reply.counters["bytes_out"], reply.counters["bytes_in"]) == (5, 0)
    assert machine.ask("consoles", Ping()) == Pong()
    with pytest.raises(RequestRefused, match="consoles takes no Reset"):
        machine.ask("consoles", Reset())


# ---- the device's end, byte by byte -------------------------------------------------------------


def back_end(rings: ChannelRings, put_out: int, taken_in: int) -> RingBackEnd:
    return RingBackEnd(rings, make_wake(), make_wake(), put_out, taken_in)


def test_a_step_that_is_done_again_puts_nothing_twice(machine: Rimmed) -> None:
    rings = machine.rings
    back_end(rings, 0, 0).write(b"step one ")
    rings.output.write_at(9, b"st")  # a process that ended in the middle
    rings.output.tail = 11
    again = back_end(rings, 9, 0)
    again.write(b"step two ")
    again.write(b"three")
    assert rings.output.peek(100) == b"step one step two three"
    back_end(rings, 18, 0).write(b"three")
    assert rings.output.tail == 23


def test_input_of_a_step_that_was_not_committed_comes_again(machine: Rimmed) -> None:
    rings = machine.rings
    rings.input.put(b"0123456789")
    first = back_end(rings, 0, 0)
    assert (first.take(4), first.take(2)) == (b"0123", b"45")  # to take more: 4 are committed
    assert rings.input.head == 4
    second = back_end(rings, 0, 4)
    assert second.take(3) == b"456"
    third = back_end(rings, 0, 7)  # committed, but it had not given the room back
    assert (rings.input.head, third.take(9)) == (7, b"789")

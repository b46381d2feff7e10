"""The process `consoles`, a device's process and a client of its console: real processes, real sockets."""

from __future__ import annotations

import os
import random
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
    Event,
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
from devices.backends import RingBackEnd
from devices.consoles import SCROLL_BACK, SLOTS, make_table
from devices.journal import Journal
from devices.ring import INPUT, OUTPUT, ChannelRings, make_wake
from launcher.keeping import Kept
from memory_node import wire
from tests.devices.test_host import GADGET, ROOT, START, Machine, attach_console, read_all

TEXT = bytes(range(256)) * 512


class Rimmed(Machine):
    """Its device `g` has rings and a journal, which outlive its processes and those of the rim."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.journal, self.ring = Journal.make("g"), ChannelRings.make("g.out")
        self.own_journal, self.table = Journal.make("consoles"), make_table()
        self.wake_rim, self.wake_device = make_wake(), make_wake()
        self.rings = ChannelRings(self.ring)
        self.kept = Kept()
        self.controls: list[socket.socket] = []  # of all processes of the rim

    def start_rim(self, kind: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self.controls:
            self.kept.drain(self.controls[-1])
        self.controls.append(ours)
        fds = {"ring:g:out": self.ring, "wake:g": self.wake_device, "wake_rim": self.wake_rim,
               "journal": self.own_journal, "clients": self.table, "control": theirs.fileno(),
               **self.kept.fds}  # fmt: skip
        channels = [{"node": "g", "channel": "out", "kind": kind}]
        self._run("consoles", "devices.rim", {"channels": channels, "fds": fds})
        theirs.close()

    def change(self, kind: str) -> None:
        channel = {"node": "g", "channel": "out", "kind": kind}
        wire.send_record(self.controls[-1], {"op": "channel", "channel": channel})
        while not any(r["op"] == "changed" for r in self.kept.drain(self.controls[-1])):
            select.select([self.controls[-1]], [], [])

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
        own = (self.journal, self.ring, self.own_journal, self.table, self.wake_rim, self.wake_device)
        for fd in own:
            os.close(fd)
        for control in self.controls:
            control.close()
        self.kept.close()

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


def test_a_killed_rim_leaves_its_clients_connected(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    with attach_console(machine, "g") as client, attach_console(machine, "g") as watcher:
        watcher.shutdown(socket.SHUT_WR)
        machine.say(b"before ")
        assert receive(client, 7) == receive(watcher, 7) == b"before "
        client.sendall(b"ab")
        assert machine.heard(2) == b"ab"
        machine.kill("consoles")
        machine.say(b"meanwhile ")
        client.sendall(b"cd")
        with attach_console(machine, "g") as late:  # the socket is there all the time
            machine.start_rim("console")
            machine.say(b"after")
            assert receive(client, 15) == receive(watcher, 15) == b"meanwhile after"
            assert receive(late, 22) == b"before meanwhile after"
            late.sendall(b"ef")
            assert sorted(machine.heard(4)) == list(b"cdef")
        machine.end()
        assert read_all(client) == read_all(watcher) == b""
    machine.kept.drain(machine.controls[-1])
    assert sorted(machine.kept.fds) == ["listener:g:out"]  # whose file is gone


def test_log_lines_come_once_whatever_is_killed(machine: Rimmed) -> None:
    machine.start_rim("log")
    machine.start_device("log")
    rng, said = random.Random(7), 0
    for number in range(30):
        text = b"".join(b"line %d\n" % n for n in range(said, said + rng.randrange(40)))
        said += text.count(b"\n")
        machine.say(text + b"li")
        if number % 2:
            machine.kill("consoles")
            machine.start_rim("log")
        machine.say(b"ne %d\n" % said)
        said += 1
    machine.end()
    lines = [machine.event("consoles", "log").text for _ in range(said)]
    assert lines == [f"line {n}" for n in range(said)]
    assert not [r for r in machine.seen if isinstance(r.frame, Event) and r.frame.kind == "log"]


def test_a_channel_is_given_another_back_end(machine: Rimmed) -> None:
    machine.start_rim("null")
    machine.start_device("null")
    machine.say(TEXT * 20)  # more than a ring holds
    path = console_path(machine.run_dir, "g")
    assert not path.exists()
    machine.change("console")
    machine.say(b"now ")
    with attach_console(machine, "g") as client:
        machine.say(b"there")
        assert receive(client, 9) == b"now there"
        machine.kill("consoles")
        machine.start_rim("console")
        machine.change("log")
        assert read_all(client) == b""
    assert not path.exists()
    machine.say(b"a line\nand")
    assert machine.event("consoles", "log").text == "a line"
    machine.change("console")
    assert machine.event("consoles", "log").text == "and"
    with attach_console(machine, "g") as client:
        machine.say(b"again")
        assert receive(client, 5) == b"again"
        machine.change("null")
        assert read_all(client) == b""
    machine.say(b"unheard")
    machine.end()


def test_more_clients_than_are_kept(machine: Rimmed) -> None:
    machine.start_rim("console")
    machine.start_device()
    machine.say(b"all")
    clients = []
    for _ in range(SLOTS + 1):
        clients.append(attach_console(machine, "g"))
        assert receive(clients[-1], 3) == b"all"
    machine.kill("consoles")
    machine.start_rim("console")
    machine.say(b"most")
    got = [receive(client, 4) for client in clients]
    assert sorted(got) == [b""] + [b"most"] * SLOTS
    for client in clients:
        client.close()
    machine.end()


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

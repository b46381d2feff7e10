"""Another process of the memory node: killed, swapped, failing to take over; its clients notice nothing."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from bus.endpoint import Endpoint
from bus.frames import Ping, Pong
from bus.grants import GrantRefused
from bus.grants import attach as granted
from launcher.entries import Preload
from launcher.errors import ConfigError
from launcher.forkserver import Child, ChildSpec, ForkServer
from launcher.keeping import Kept
from launcher.memory import load_images, with_memory
from launcher.swapping import SwapRefused, swap
from memory_node import wire
from memory_node.client import SOCKET_NAME, TRIES, MemoryClient, MemoryRefused
from memory_node.regions import pc_regions

MIB = 1 << 20
SECOND = 10**9


@pytest.fixture
def forkserver() -> Iterator[ForkServer]:
    """Forked before there is a ZeroMQ context."""
    server = ForkServer.start(Preload(("memory_node.node",)))
    yield server
    server.stop()


class Node:
    """As launcher/processes.py has it."""

    def __init__(self, run_dir: Path, forkserver: ForkServer) -> None:
        self._forkserver, self.run_dir = forkserver, run_dir
        regions = [r.to_plain() for r in pc_regions(16 * MIB, mirror_pages=2)]
        config = {"run_dir": str(run_dir), "machine": "m", "regions": regions}
        spec = ChildSpec("memory", "memory_node.node.run", config, "memory", run_dir / "log")
        self.spec = with_memory(spec)
        self.launcher = Endpoint(run_dir, "launcher")
        self.launcher.bind()
        self.launcher.connect("memory")
        self.child, self.control = self.fork(self.spec)

    def fork(self, spec: ChildSpec) -> tuple[Child, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            return self._forkserver.fork(replace(spec, fds={**spec.fds, "control": theirs.fileno()})), ours
        finally:
            theirs.close()

    def kill(self) -> None:
        signal.pidfd_send_signal(self.child.pidfd, signal.SIGKILL)
        select.select([self.child.pidfd], [], [])

    def start(self) -> None:
        self.child, self.control = self.fork(self.spec)

    def swap(self) -> None:
        old = self.child
        done = swap("memory", old, self.control, self.spec, self.fork, lambda: None, Kept())
        self.child, self.control = done.child, done.control
        select.select([old.pidfd], [], [])

    def ping(self) -> None:
        assert self.launcher.request("memory", Ping(), 240 * SECOND) == Pong()

    def close(self) -> None:
        self._forkserver.stop()
        self.launcher.close(0)
        for fd in self.spec.fds.values():
            os.close(fd)


@pytest.fixture
def node(short_path: Path, forkserver: ForkServer) -> Iterator[Node]:
    node = Node(short_path, forkserver)
    yield node
    node.close()


def test_what_is_mapped_stays_and_what_is_attached_later_is_the_same(node: Node) -> None:
    load_images(node.spec, [(0x1000, b"image"), (16 * MIB - 1, b"!")])
    with MemoryClient(node.run_dir) as client:
        fd, size = client.attach("ram", True)
        with mmap.mmap(fd, size) as mapped:
            assert (mapped[0x1000:0x1005], mapped[-1:]) == (b"image", b"!")
            client.set_mark("m")
            for number in range(6):
                mapped[number * 4096] = 7
                if number % 2:
                    node.swap()
                else:
                    node.kill()
                    node.start()
                node.ping()
                assert list(client.written_since("m")) == list(range(number + 1))
                other, _ = granted(node.run_dir, "ram", writable=False)
                assert os.pread(other, 6, 0x1000 - 1) == mapped[0x0FFF:0x1005]
                os.close(other)
        os.close(fd)
        client.drop_mark("m")
        node.kill()
        node.start()
        with pytest.raises(MemoryRefused, match="no mark 'm'"):
            list(client.written_since("m"))


def test_when_the_new_one_fails_the_old_one_goes_on(node: Node) -> None:
    pid = node.child.pid

    def fork(spec: ChildSpec) -> tuple[Child, socket.socket]:
        child, control = node.fork(spec)
        select.select([control], [], [])  # it stands by
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        return child, control

    with MemoryClient(node.run_dir) as client:
        client.set_mark("m")
        for _ in range(3):
            with pytest.raises(SwapRefused, match="new process"):
                swap("memory", node.child, node.control, node.spec, fork, lambda: None, Kept())
            node.ping()
            assert list(client.written_since("m")) == []
        broken = replace(node.spec, config={**node.spec.config, "regions": [{"name": "ram"}]})
        with pytest.raises(SwapRefused, match="not a region"):
            swap("memory", node.child, node.control, broken, node.fork, lambda: None, Kept())
        assert client.regions() == pc_regions(16 * MIB, 2)
    assert node.child.pid == pid
    node.ping()


def test_who_asks_while_there_is_none_waits(node: Node) -> None:
    node.ping()
    node.kill()
    got: list[int] = []
    asking = threading.Thread(target=lambda: got.append(granted(node.run_dir, "mirror", writable=True)[1]))
    asking.start()
    node.start()
    asking.join()
    assert got == [8192]


def test_a_request_that_ends_every_process_is_given_up(short_path: Path) -> None:
    listener = wire.listen(short_path / SOCKET_NAME)
    listener.setblocking(True)
    ended = 0

    def end_them_all() -> None:
        nonlocal ended
        for _ in range(TRIES):
            process, _ = listener.accept()
            process.recv(1 << 16)
            process.close()
            ended += 1

    thread = threading.Thread(target=end_them_all)
    thread.start()
    meanwhile = pytest.raises(MemoryRefused, match="stats: it has ended meanwhile")
    with MemoryClient(short_path) as client, meanwhile:
        client.stats()
    thread.join()
    assert ended == TRIES
    listener.close()


def test_a_grant_is_refused_at_last(short_path: Path) -> None:
    with pytest.raises(GrantRefused, match="no memory node answers"):
        granted(short_path, "ram", writable=True, timeout_s=0.0)


def test_a_file_that_is_in_use_is_named(tmp_path: Path) -> None:
    regions = [r.to_plain() for r in pc_regions(16 * MIB, 0, str(tmp_path / "ram"))]
    config = {"run_dir": str(tmp_path), "machine": "m", "regions": regions}
    spec = ChildSpec("memory", "memory_node.node.run", config, "memory", tmp_path / "log")
    first = with_memory(spec)
    with pytest.raises(ConfigError, match="another machine's memory"):
        with_memory(spec)
    for fd in first.fds.values():
        os.close(fd)
    again = with_memory(spec)
    for fd in again.fds.values():
        os.close(fd)

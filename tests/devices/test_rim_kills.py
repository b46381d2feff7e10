"""`consoles` killed and swapped at random under streams of numbers both ways, more than sockets hold:
each process is found in the middle of something, and no client loses a byte or gets one twice."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bus.endpoint import Endpoint
from bus.link import console_path
from devices.backends import RingBackEnd
from devices.consoles import BEHIND_MAX, make_table
from devices.journal import Journal
from devices.ring import ChannelRings, make_wake, wake
from launcher.entries import Preload
from launcher.forkserver import Child, ChildSpec, ForkServer
from launcher.keeping import Kept
from launcher.swapping import SwapRefused, swap

PIECE = 4096
AHEAD_MAX = BEHIND_MAX // 4  # bytes that the device is ahead of a client: who doesn't read is hung up on
PATIENCE_S = 240.0  # a bound on hanging, not an expectation


@pytest.fixture
def forkserver() -> Iterator[ForkServer]:
    """Forked before there is a ZeroMQ context."""
    server = ForkServer.start(Preload(("devices.rim",)))
    yield server
    server.stop()


class Consoles:
    """As launcher/processes.py has them; the test is the device."""

    def __init__(self, run_dir: Path, forkserver: ForkServer) -> None:
        self.run_dir, self._forkserver = run_dir, forkserver
        self.launcher = Endpoint(run_dir, "launcher")
        self.launcher.bind()
        ring = ChannelRings.make("g.out")
        wake_rim, wake_device = make_wake(), make_wake()
        fds = {"ring:g:out": ring, "wake:g": wake_device, "wake_rim": wake_rim,
               "journal": Journal.make("consoles"), "clients": make_table()}  # fmt: skip
        channels = [{"node": "g", "channel": "out", "kind": "console"}]
        config = {"run_dir": str(run_dir), "machine": "m", "channels": channels}
        self.spec = ChildSpec("consoles", "devices.rim.run", config, "rim", run_dir / "log", fds=fds)
        self.wake_rim, self.wake_device, self.rings = wake_rim, wake_device, ChannelRings(ring)
        self.device = RingBackEnd(self.rings, wake_rim, wake_device)
        self.kept = Kept()
        self.child, self.control = self.fork(self.with_kept())

    def with_kept(self) -> ChildSpec:
        spec = self.spec
        return ChildSpec(spec.node, spec.entry, spec.config, spec.title, spec.log,
                         fds={**spec.fds, **self.kept.fds})  # fmt: skip

    def fork(self, spec: ChildSpec) -> tuple[Child, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = {**spec.fds, "control": theirs.fileno()}
        child = self._forkserver.fork(
            ChildSpec(spec.node, spec.entry, spec.config, spec.title, spec.log, fds=fds)
        )
        theirs.close()
        return child, ours

    def kill(self) -> None:
        signal.pidfd_send_signal(self.child.pidfd, signal.SIGKILL)
        select.select([self.child.pidfd], [], [])
        os.close(self.child.pidfd)
        self.kept.drain(self.control)
        self.control.close()
        self.child, self.control = self.fork(self.with_kept())

    def swap(self) -> None:
        old, old_control = self.child, self.control
        done = swap("consoles", old, old_control, self.spec, self.fork, lambda: None, self.kept)
        self.child, self.control = done.child, done.control
        select.select([old.pidfd], [], [])
        os.close(old.pidfd)
        old_control.close()

    def fail_to_swap(self) -> None:
        """The new process ends when it is to take over."""

        def fork(spec: ChildSpec) -> tuple[Child, socket.socket]:
            child, control = self.fork(spec)
            select.select([control], [], [])  # it stands by
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            return child, control

        with pytest.raises(SwapRefused, match="new process"):
            swap("consoles", self.child, self.control, self.spec, fork, lambda: None, self.kept)

    def close(self) -> None:
        self._forkserver.stop()
        self.launcher.close(0)
        self.kept.close()


@pytest.fixture
def consoles(short_path: Path, forkserver: ForkServer) -> Iterator[Consoles]:
    consoles = Consoles(short_path, forkserver)
    yield consoles
    consoles.close()


class Numbers:
    """A stream of them, for ever: the same for who sends and who checks."""

    def __init__(self) -> None:
        self.next = 0

    def text(self) -> bytes:
        first, self.next = self.next, self.next + PIECE // 8
        return b"".join(b"%07x\n" % n for n in range(first, self.next))


class Checker:
    """Fed with pieces; `wrong` is where they first differed from what was to come."""

    def __init__(self) -> None:
        self._numbers, self._due = Numbers(), bytearray()
        self.count, self.wrong = 0, -1

    def feed(self, piece: bytes) -> None:
        while len(self._due) < len(piece):
            self._due += self._numbers.text()
        if piece != self._due[: len(piece)] and self.wrong < 0:
            self.wrong = self.count
        del self._due[: len(piece)]
        self.count += len(piece)


def attach(consoles: Consoles) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(PATIENCE_S)
    while client.connect_ex(str(console_path(consoles.run_dir, "g"))):
        select.select([], [], [], 0.001)
    return client


class Talk:
    """A device that talks and listens, two clients that read, one of which types too; each in a thread."""

    def __init__(self, consoles: Consoles) -> None:
        self._consoles = consoles
        self.heard, self.seen = Checker(), [Checker(), Checker()]
        self.said = self.typed = 0  # bytes
        self._stopping = threading.Event()
        self._all_said = self._all_typed = False  # nothing will be added to `said`, to `typed`
        self.failed: list[str] = []  # what a thread ended with
        self._clients = [attach(consoles), attach(consoles)]
        jobs: list[Callable[[], None]] = [self._device, self._type]
        jobs += [lambda n=n: self._read(n) for n in range(2)]
        self._threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Stop talking and typing; returns when all of it has arrived, or something was wrong."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        for client in self._clients:
            client.close()

    def wrong(self) -> bool:
        return bool(self.failed) or any(checker.wrong >= 0 for checker in (self.heard, *self.seen))

    def _guarded(self, job: Callable[[], None]) -> None:
        """The other threads end, too, when one fails."""
        try:
            job()
        except Exception as error:
            self.failed.append(f"{job}: {error!r}")

    def _device(self) -> None:
        consoles, numbers, rest = self._consoles, Numbers(), b""
        while not self.wrong():
            if self._stopping.is_set():
                self._all_said = True
            elif not rest and self.said - min(seen.count for seen in self.seen) < AHEAD_MAX:
                rest = numbers.text()
                self.said += len(rest)
            before = len(rest)
            rest = consoles.rings.output.put(rest)
            wake(consoles.wake_rim)
            if piece := consoles.device.take(997):
                self.heard.feed(piece)
            elif len(rest) == before:
                if self._all_typed and not rest and self.heard.count == self.typed:
                    return
                select.select([consoles.wake_device], [], [], 0.01)
                consoles.device.ready({consoles.wake_device}, set())

    def _type(self) -> None:
        numbers = Numbers()
        while not self._stopping.is_set():
            text = numbers.text()
            self.typed += len(text)
            self._clients[0].sendall(text)
        self._all_typed = True

    def _read(self, number: int) -> None:
        client, seen = self._clients[number], self.seen[number]
        while not self.wrong() and not (self._all_said and seen.count == self.said):
            if select.select([client], [], [], 0.01)[0]:
                piece = client.recv(20_000)
                assert piece, "hung up on"
                seen.feed(piece)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_both_ways(seed: int, consoles: Consoles) -> None:
    rng = random.Random(seed)
    talk = Talk(consoles)
    try:
        while any(seen.count == 0 for seen in talk.seen):
            time.sleep(0.001)
        ways = [consoles.kill] * 6 + [consoles.swap] * 3 + [consoles.fail_to_swap]
        for _ in range(60):
            time.sleep(rng.random() * 0.02)  # so that they come at any point of its work
            rng.choice(ways)()
            if talk.wrong():
                break
    finally:
        talk.finish()
    assert not talk.failed
    assert [c.wrong for c in (talk.heard, *talk.seen)] == [-1, -1, -1]
    assert [c.count for c in (talk.heard, *talk.seen)] == [talk.typed, talk.said, talk.said]
    assert min(talk.typed, talk.said) > PIECE

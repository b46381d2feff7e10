"""Endpoint: one node's place on the bus. One thread uses it; the CPU thread has an IoClient of its own.

It waits with select() on the sockets' descriptors instead of zmq_poll(), whose timeouts are whole
milliseconds: timers of devices are finer than that. Such a descriptor only says that something changed,
and a send may swallow the news, so `_suspects` keeps the sockets whose events must be looked at first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from bus.codec import BadFrame
from bus.counters import Counters
from bus.frames import Frame, Header, Refused
from bus.link import make_dealer, make_router, socket_path
from bus.recorder import Recorder
from bus.stream import Need, Plain, Positions, Stream, id_source

FAIR_SHARE = 64  # frames taken from one socket before the others have their turn
LINGER_MS = 1000  # how long close() waits for what was sent to leave
NEVER_NS = 1 << 62
UNNAMED = b"\0"  # begins the names that ZeroMQ gives
NAMES = "latin-1"  # any identity survives the round trip, node names are ASCII
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # the enumerations cost a microsecond per look


class NoReply(RuntimeError):
    """A peer has not answered a request within its deadline."""


class RequestRefused(RuntimeError):
    """A peer answered a request with Refused."""


class Received(NamedTuple):
    """A frame that came in.

    `asked`: it came over our ROUTER and reply() can answer it; otherwise it is a peer's answer to us.
    """

    peer: str
    header: Header
    frame: Frame
    asked: bool


class Endpoint:
    """bind() to be reached, connect() to reach; close() in the end, or use it as a context manager.

    `afresh`: for a node that nothing is handed down to, and whose peers may know an earlier process of its
    name. It is taken for that one's successor: what the peers retain comes to it, and nothing else. Whoever
    takes a name over makes an Endpoint after the last one's has ended, also the same process again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        node: str,
        now_ns: Callable[[], int] = time.monotonic_ns,
        afresh: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.node = node
        self.now_ns = now_ns
        self.counters = Counters()
        self.ids = id_source(node, now_ns())
        self._base = time.monotonic_ns() if afresh else 0  # nobody sends a frame each nanosecond
        self._context: zmq.Context[Any] = zmq.Context()
        self._router: zmq.Socket[bytes] | None = None
        self._spare: dict[str | None, zmq.Socket[bytes]] = {}  # see prepare(); None: the ROUTER
        self._owns_path = False  # the socket file is ours to remove
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._asked: dict[bytes, Stream] = {}  # by the identity of who sends to our ROUTER
        self._asking: dict[str, Stream] = {}  # by peer that we connected to
        self._ways: dict[int, tuple[str | None, zmq.Socket[bytes]]] = {}  # by descriptor; None: the ROUTER
        self._fd_of: dict[str | None, int] = {}
        self._suspects: set[int] = set()  # descriptors of sockets that may hold frames
        self._live: set[str] = set()  # peers that have answered our connection
        self.connections: dict[str, int] = {}  # who has connected to us -> when, the last time
        self.recorder: Recorder | None = None  # notes the frames that are taken
        self._noted = 0  # where that is done with the last one
        self._held: list[tuple[str | bytes, bytes]] | None = None  # to a peer, or to who connected to us
        self._put_off: list[Stream] = []  # those of which frames are taken and not committed
        self._plain: tuple[dict[str, Plain], dict[str, Plain]] = {}, {}  # see to_plain()
        self._changed: set[str | bytes] = set()  # streams since then: to a peer, or of who connected to us

    def prepare(self, peers: Iterable[str]) -> None:
        """Make what bind() and connect() to these peers will take: nobody notices it."""
        self._spare = {peer: make_dealer(self._context, self.node) for peer in peers}
        self._spare[None] = make_router(self._context)

    def bind(self, listening: int | None = None) -> None:
        """Make this node reachable. A socket file left by a killed process of the same name is replaced.

        `listening`: take connections there (link.listen), a descriptor that stays the caller's.
        """
        path = socket_path(self.run_dir, self.node)
        router = self._spare.pop(None, None) or make_router(self._context)
        self._router = router
        if listening is not None:
            router.setsockopt(zmq.USE_FD, os.dup(listening))
        router.bind(f"ipc://{path}")
        if listening is None:
            self._owns_path = True
            path.chmod(0o600)
        self._watch(None, router)

    def connect(self, peer: str) -> None:
        """Open the way to a peer, which need not exist yet; sending to it before it does is fine."""
        if peer in self._dealers:
            return
        dealer = self._spare.pop(peer, None) or make_dealer(self._context, self.node)
        dealer.connect(f"ipc://{socket_path(self.run_dir, peer)}")
        self._dealers[peer] = dealer
        self._asking[peer] = Stream(self.counters, self.now_ns, self._base)
        self._changed.add(peer)
        self._watch(peer, dealer)

    def has_heard(self, peer: str) -> bool:
        """Whether a peer that we connected to has answered: before, what is sent to it waits here."""
        return peer in self._live

    def meet(self, peer: str, timeout_ns: int) -> None:
        """Wait until a peer that we connected to has answered; NoReply. What others send meanwhile stays."""
        end_ns = self.now_ns() + timeout_ns
        while peer not in self._live:
            left_ns = end_ns - self.now_ns()
            if left_ns <= 0:
                raise NoReply(f"{peer} has not answered the connection within {timeout_ns / 1e9:g} s")
            select.select([self._fd_of[peer]], [], [], min(left_ns / 1e9, 0.05))
            if _readable(self._dealers[peer]):
                self._from_dealer(peer, self._dealers[peer])

    def send(self, peer: str, frame: Frame, trace: int = 0) -> int:
        """Send to a connected peer; returns the frame's span. A trace of 0 begins a new one.

        Never waits: what the peer can't take now is sent when it can.
        """
        span = next(self.ids)
        self._changed.add(peer)
        data = self._asking[peer].encode(frame, trace or span, span)
        if data is not None and peer in self._live:  # else it goes when the peer says Resume
            self._to_dealer(peer, data)
        return span

    def reply(self, to: Received, frame: Frame) -> None:
        """Answer a received frame; if its sender is gone, the answer is counted as unroutable."""
        self._answer(to.peer.encode(NAMES), frame, to.header.trace, to.header.span)

    def request(self, peer: str, frame: Frame, timeout_ns: int, trace: int = 0) -> Frame:
        """Send and wait for the answer; what others send meanwhile stays for receive().

        Raises NoReply, RequestRefused. A late answer to an earlier request is dropped.
        """
        return self._await(peer, frame, self.send(peer, frame, trace), self.now_ns(), timeout_ns)

    def request_all(self, peers: Sequence[str], frame: Frame, timeout_ns: int) -> list[Frame]:
        """The same of several, which work on it side by side if they are met; answers in the same order."""
        spans = [self.send(peer, frame) for peer in peers]
        started_ns = self.now_ns()
        return [
            self._await(peer, frame, span, started_ns, timeout_ns)
            for peer, span in zip(peers, spans, strict=True)
        ]

    def _await(self, peer: str, frame: Frame, span: int, started_ns: int, timeout_ns: int) -> Frame:
        """The answer to a request; see there."""
        dealer = self._dealers[peer]
        while (left_ns := started_ns + timeout_ns - self.now_ns()) >= 0:
            if not _readable(dealer):
                select.select([self._fd_of[peer]], [], [], left_ns / 1e9)
                if not _readable(dealer):
                    continue
            received = self._from_dealer(peer, dealer)
            if received is None or received.header.span != span:
                continue
            self.counters.latency.add(self.now_ns() - started_ns)
            if isinstance(received.frame, Refused):
                raise RequestRefused(f"{peer} refused {type(frame).__name__}: {received.frame.reason}")
            return received.frame
        raise NoReply(f"{peer} has not answered {type(frame).__name__} within {timeout_ns / 1e9:g} s")

    def wait(
        self, timeout_ns: int | None, read_fds: Iterable[int] = (), write_fds: Iterable[int] = ()
    ) -> tuple[set[int], set[int]]:
        """Wait until a frame can be received, a descriptor is ready or the time is over (None: no limit).

        Returns the readable and the writable ones among the descriptors given.
        """
        read, write = list(read_fds), list(write_fds)
        for fd in tuple(self._suspects):
            if _readable(self._ways[fd][1]):
                timeout_ns = 0
                break
            self._suspects.discard(fd)
        timeout_s = None if timeout_ns is None or timeout_ns >= NEVER_NS else max(timeout_ns, 0) / 1e9
        readable, writable, _ = select.select([*self._ways, *read], write, [], timeout_s)
        self._suspects.update(fd for fd in readable if fd in self._ways)
        return set(readable).intersection(read), set(writable)

    def receive(self) -> Iterator[Received]:
        """What has arrived, without waiting: up to FAIR_SHARE frames per socket.

        Call it after wait(). Malformed frames are counted, and refused where they came over the ROUTER.
        """
        for fd in tuple(self._suspects):
            peer, socket = self._ways[fd]
            for _ in range(FAIR_SHARE):
                if not _readable(socket):
                    self._suspects.discard(fd)
                    break
                received = self._from_router(socket) if peer is None else self._from_dealer(peer, socket)
                if received is not None:
                    noted, self._noted = self._noted, 0
                    yield received
                    if noted and self.recorder is not None:
                        self.recorder.done(noted)
                    self._acknowledge(received)  # by now it is dealt with

    def acknowledge(self) -> None:
        """Say to all what has been taken from them: it is not to come to who goes on under our name."""
        for identity, asked in self._asked.items():
            if (data := asked.acknowledgement(every=1)) is not None:
                self._to_router(identity, data)
        for peer, asking in self._asking.items():
            if (data := asking.acknowledgement(every=1)) is not None:
                self._to_dealer(peer, data)

    def positions(self) -> Positions:
        """Of all connections, those made by others and ours."""
        asked = {f"{who.decode(NAMES)}>{self.node}": stream for who, stream in self._asked.items()}
        asking = {f"{self.node}>{peer}": stream for peer, stream in self._asking.items()}
        return {name: stream.positions() for name, stream in {**asked, **asking}.items()}

    def hold(self) -> None:
        """From now on frames are numbered and retained, but stay here until release(). What an earlier hold()
        kept and nobody let go is not sent. What is committed until then is all that was taken."""
        self._held = []
        while self._put_off:
            self._put_off.pop().caught_up()

    def put_off(self, received: Received) -> None:
        """This frame, which came just now, is committed with a later one: its sender is to keep it."""
        stream = self._asked[received.peer.encode(NAMES)]
        stream.put_off()
        self._put_off.append(stream)

    def release(self) -> None:
        """Let go what was held."""
        held, self._held = self._held, None
        for to, data in held or ():
            if isinstance(to, str):
                self._to_dealer(to, data)
            else:
                self._to_router(to, data)

    def stats(self) -> dict[str, Any]:
        return self.counters.to_plain()

    def to_plain(self) -> tuple[dict[str, Plain], dict[str, Plain]]:
        """All streams, by who sends to us and by whom we connected to: what a new process of this node
        loads. It is the same object each time."""
        asked, asking = self._plain
        while self._changed:
            who = self._changed.pop()
            if isinstance(who, str):
                asking[who] = self._asking[who].to_plain()
            else:
                asked[_name(who)] = self._asked[who].to_plain()
        return self._plain

    def load(self, plain: Any) -> None:
        """Go on where an earlier process of this node was. After connect(), before anything is sent."""
        asked, asking = plain
        for name, saved in asked.items():
            stream = self._asked[name.encode(NAMES)] = Stream(self.counters, self.now_ns)
            stream.load(saved)
            self._changed.add(name.encode(NAMES))
        for peer, saved in asking.items():
            if peer in self._asking:
                self._asking[peer].load(saved)
                self._changed.add(peer)

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Let what was sent leave, for up to `linger_ms` per socket, and remove the socket file."""
        if linger_ms:
            self._wait_until_sent(self.now_ns() + 1_000_000 * linger_ms)
        self.leave(linger_ms)
        if self._owns_path:
            with contextlib.suppress(FileNotFoundError):
                socket_path(self.run_dir, self.node).unlink()
        self._context.term()

    def leave(self, linger_ms: int = 0) -> None:
        """Take and send nothing more; does not wait. close() is to follow."""
        router = [self._router] if self._router is not None else []  # first: who asks connects anew
        for socket in (*router, *self._dealers.values(), *self._spare.values()):
            socket.close(linger=linger_ms)

    def _wait_until_sent(self, until_ns: int) -> None:
        """Frames for a peer whose connection is not made yet wait for it, and those beyond a window for
        room. What others ask of us is not looked at: it would be acknowledged, and nobody deals with it."""
        fds = [self._fd_of[peer] for peer in self._dealers]
        while (left_ns := until_ns - self.now_ns()) > 0:
            streams = self._asking.items()
            if all(not s.unacknowledged or (peer in self._live and not s.full) for peer, s in streams):
                return
            select.select(fds, [], [], min(left_ns, 10_000_000) / 1e9)
            for peer, dealer in self._dealers.items():
                while _readable(dealer):
                    self._from_dealer(peer, dealer)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, peer: str | None, socket: zmq.Socket[bytes]) -> None:
        fd = int(socket.getsockopt(zmq.FD))
        self._ways[fd] = (peer, socket)
        self._fd_of[peer] = fd
        self._suspects.add(fd)

    def _from_router(self, router: zmq.Socket[bytes]) -> Received | None:
        identity, *parts = router.recv_multipart()
        if identity.startswith(UNNAMED):
            return None  # from a connection that another of the same name has replaced: it comes again there
        stream = self._asked.get(identity)
        if stream is None:
            stream = self._asked[identity] = Stream(self.counters, self.now_ns, self._base)
        self._changed.add(identity)
        if parts == [b""]:  # it has connected
            self.connections[identity.decode(NAMES)] = self.now_ns()
            for data in stream.connected():
                self._to_router(identity, data)
            return None
        try:
            decoded = stream.decode(parts[0] if len(parts) == 1 else b"")
        except BadFrame as error:
            header = error.header or Header(0, 0, 0, 0, 0)
            self._answer(identity, Refused(str(error)), header.trace, header.span)
            return None
        for data in stream.take_waiting():
            self._to_router(identity, data)
        if decoded is None:
            return None
        if isinstance(decoded, Need):
            for data in stream.repeat() if decoded is Need.REPEAT else (stream.resume(),):
                self._to_router(identity, data)
            return None
        header, frame = decoded
        taken_ns = self.now_ns()
        self.counters.latency.add(taken_ns - header.clock_ns)
        self._note(identity, parts[0], taken_ns)
        return Received(identity.decode(NAMES), header, frame, asked=True)

    def _from_dealer(self, peer: str, dealer: zmq.Socket[bytes]) -> Received | None:
        parts, stream = dealer.recv_multipart(), self._asking[peer]
        self._changed.add(peer)
        try:
            decoded = stream.decode(parts[0] if len(parts) == 1 else b"")
        except BadFrame:
            return None  # counted; an answer gets no answer
        for data in stream.take_waiting():
            self._to_dealer(peer, data)
        if decoded is None:
            return None
        if isinstance(decoded, Need):
            if decoded is Need.REPEAT:
                self._live.add(peer)
            for data in stream.repeat() if decoded is Need.REPEAT else (stream.resume(),):
                self._to_dealer(peer, data)
            return None
        self._note(peer.encode(NAMES), parts[0], self.now_ns())
        return Received(peer, *decoded, asked=False)

    def _note(self, peer: bytes, data: bytes, taken_ns: int) -> None:
        if self.recorder is not None and self.recorder.on:
            self._noted = self.recorder.frame(peer, data, taken_ns)

    def _acknowledge(self, received: Received) -> None:
        if received.asked:
            identity = received.peer.encode(NAMES)
            data = self._asked[identity].acknowledgement()
            if data is not None:
                self._to_router(identity, data)
        elif (data := self._asking[received.peer].acknowledgement()) is not None:
            self._to_dealer(received.peer, data)

    def _answer(self, identity: bytes, frame: Frame, trace: int, span: int) -> None:
        self._changed.add(identity)
        data = self._asked[identity].encode(frame, trace, span)
        if data is not None and not self._to_router(identity, data):
            self.counters.unroutable += 1

    def _to_dealer(self, peer: str, data: bytes) -> None:
        if self._held is not None:
            self._held.append((peer, data))
            return
        self._suspects.add(self._fd_of[peer])
        with contextlib.suppress(zmq.Again):  # not connected: it will say Resume
            self._dealers[peer].send(data, zmq.DONTWAIT)

    def _to_router(self, identity: bytes, data: bytes) -> bool:
        """Send to whoever connected under this name; False when it is not connected now."""
        assert self._router is not None
        if self._held is not None:
            self._held.append((identity, data))
            return True
        self._suspects.add(self._fd_of[None])
        try:
            self._router.send_multipart((identity, data), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True


@functools.cache
def _name(identity: bytes) -> str:
    return identity.decode(NAMES)


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(socket.get(EVENTS) & POLLIN)  # type: ignore[operator]  # an int, for this option

"""Endpoints over real sockets, in one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import zmq

from bus.addressmap import AddressMap
from bus.endpoint import Endpoint, NoReply, Received, RequestRefused
from bus.frames import (
    KIND_OF,
    PROTOCOL_VERSION,
    Event,
    Frame,
    Line,
    Ping,
    Pong,
    PostedBatch,
    Read,
    ReadReply,
    Refused,
    Resume,
    Stats,
)
from bus.io import DeviceGone, IoClient
from bus.link import PATH_MAX, BadRunDir, dial, socket_path
from bus.ranges import PortRange
from bus.stream import ACK_EVERY, WINDOW

LONG_NS = 240_000_000_000  # a bound on hanging, not an expectation


@pytest.fixture
def run_dir(short_path: Path) -> Path:
    return short_path


def collect(endpoint: Endpoint, n: int, *senders: Endpoint) -> list[Received]:
    """Wait for n frames; senders hear meanwhile that they are connected."""
    got: list[Received] = []
    deadline = time.monotonic() + LONG_NS / 1e9
    while len(got) < n and time.monotonic() < deadline:
        endpoint.wait(5_000_000 if senders else 1_000_000_000)
        got += endpoint.receive()
        for sender in senders:
            sender.wait(0)
            assert list(sender.receive()) == []
    return got


class Server:
    """A thread that answers requests at an endpoint."""

    def __init__(self, run_dir: Path, node: str, answer: Callable[[Frame], Frame | None]) -> None:
        self.seen: list[Received] = []
        self._stop = False
        self.endpoint = Endpoint(run_dir, node)
        self.endpoint.bind()
        self._answer = answer
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop:
            self.endpoint.wait(20_000_000)
            for received in self.endpoint.receive():
                self.seen.append(received)
                answer = self._answer(received.frame)
                if answer is not None:
                    self.endpoint.reply(received, answer)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self.endpoint.close()


def test_one_way_frames_arrive_in_order_with_sender_trace_and_clock(run_dir: Path) -> None:
    with Endpoint(run_dir, "uart0") as a, Endpoint(run_dir, "pic") as b:
        b.bind()
        a.connect("pic")
        before = time.monotonic_ns()
        for i in range(200):
            a.send("pic", Line(4, bool(i & 1), "uart0.intr"), trace=7)
        got = collect(b, 200, a)
    assert [r.frame for r in got] == [Line(4, bool(i & 1), "uart0.intr") for i in range(200)]
    assert [r.header.seq for r in got] == list(range(1, 201))
    assert {r.header.trace for r in got} == {7}
    assert len({r.header.span for r in got}) == 200
    assert all(before <= r.header.clock_ns <= time.monotonic_ns() for r in got)
    assert {r.peer for r in got} == {"uart0"}
    assert all(r.asked for r in got)
    assert (b.counters.frames_in, b.counters.lost, b.counters.duplicated) == (200, 0, 0)
    assert b.counters.latency.count == 200


def test_sending_before_the_peer_exists(run_dir: Path) -> None:
    with Endpoint(run_dir, "a") as a:
        a.connect("late")
        a.send("late", Event("log", "early"))
        with Endpoint(run_dir, "late") as late:
            late.bind()
            assert [r.frame for r in collect(late, 1, a)] == [Event("log", "early")]


def test_a_new_trace_begins_when_none_is_given(run_dir: Path) -> None:
    with Endpoint(run_dir, "a") as a, Endpoint(run_dir, "b") as b:
        b.bind()
        a.connect("b")
        span = a.send("b", Ping())
        (received,) = collect(b, 1, a)
        assert (received.header.trace, received.header.span) == (span, span)


def test_request_and_reply(run_dir: Path) -> None:
    server = Server(run_dir, "dev", lambda frame: Pong() if isinstance(frame, Ping) else Refused("no"))
    try:
        with Endpoint(run_dir, "a") as a:
            a.connect("dev")
            for _ in range(50):
                assert a.request("dev", Ping(), LONG_NS) == Pong()
            with pytest.raises(RequestRefused, match="dev refused Stats: no"):
                a.request("dev", Stats(), LONG_NS)
            assert a.counters.latency.count == 51
    finally:
        server.close()


def test_a_request_to_several_is_with_all_of_them_before_one_answers(run_dir: Path) -> None:
    both_asked = threading.Barrier(2)

    def answer(value: int) -> Callable[[Frame], Frame]:
        def wait_for_the_other(frame: Frame) -> Frame:
            both_asked.wait(LONG_NS / 1e9)
            return ReadReply(value)

        return wait_for_the_other

    servers = [Server(run_dir, node, answer(value)) for node, value in (("one", 1), ("two", 2))]
    try:
        with Endpoint(run_dir, "a") as a:
            for peer in ("one", "two", "nobody"):
                a.connect(peer)
            for server in servers:
                a.meet(server.endpoint.node, LONG_NS)
            answers = a.request_all(["two", "one"], Read("value", 0, 1), LONG_NS)
            assert answers == [ReadReply(2), ReadReply(1)]
            assert a.request_all([], Ping(), LONG_NS) == []
            with pytest.raises(NoReply, match="nobody has not answered Read"):
                a.request_all(["nobody"], Read("value", 0, 1), 30_000_000)
    finally:
        for server in servers:
            server.close()


def test_no_reply(run_dir: Path) -> None:
    with Endpoint(run_dir, "a") as a:
        a.connect("nobody")
        with pytest.raises(NoReply, match="nobody has not answered Ping"):
            a.request("nobody", Ping(), 30_000_000)


def test_a_late_answer_does_not_answer_the_next_request(run_dir: Path) -> None:
    with Endpoint(run_dir, "a") as a, Endpoint(run_dir, "b") as b:
        b.bind()
        a.connect("b")
        with pytest.raises(NoReply):
            a.request("b", Read("late", 0, 1), 1_000_000)
        (late,) = collect(b, 1, a)
        b.reply(late, ReadReply(1))

        def answer_next() -> None:
            (received,) = collect(b, 1)
            b.reply(received, ReadReply(2))

        thread = threading.Thread(target=answer_next)
        thread.start()
        assert a.request("b", Read("next", 0, 1), LONG_NS) == ReadReply(2)
        thread.join()


def test_answers_to_sent_frames_come_out_of_receive(run_dir: Path) -> None:
    with Endpoint(run_dir, "a") as a, Endpoint(run_dir, "b") as b:
        b.bind()
        a.connect("b")
        span = a.send("b", Ping())
        (received,) = collect(b, 1, a)
        b.reply(received, Pong())
        (answer,) = collect(a, 1)
        assert (answer.peer, answer.frame, answer.header.span, answer.asked) == ("b", Pong(), span, False)


@pytest.mark.parametrize(
    "parts",
    [
        [b"\xc1"],
        [b"junk" * 100],
        [b"a", b"b"],
        [msgpack.packb([PROTOCOL_VERSION + 1, 32, 1, 0, 0, 0, 0])],
        [msgpack.packb([PROTOCOL_VERSION, 999, 1, 0, 0, 0, 0])],
        [msgpack.packb([PROTOCOL_VERSION, 1, 1, 0, 0, 0, 0])],
    ],
)
def test_what_is_no_frame_is_refused_and_counted_and_the_endpoint_lives(
    run_dir: Path, parts: list[bytes]
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = dial(context, run_dir, "stranger", "dev")
    server = Server(run_dir, "dev", lambda frame: Pong())
    try:
        raw.setsockopt(zmq.RCVTIMEO, 20_000)
        assert msgpack.unpackb(raw.recv())[1] == KIND_OF[Resume]
        raw.send_multipart(parts)
        assert msgpack.unpackb(raw.recv())[1] == KIND_OF[Refused]
        with Endpoint(run_dir, "a") as a:
            a.connect("dev")
            assert a.request("dev", Ping(), LONG_NS) == Pong()
    finally:
        server.close()
        raw.close()
        context.term()
    assert server.endpoint.counters.bad_frames == 1


def test_an_answer_to_someone_who_left_is_counted(run_dir: Path) -> None:
    with Endpoint(run_dir, "b") as b:
        b.bind()
        with Endpoint(run_dir, "a") as a:
            a.connect("b")
            a.send("b", Ping())
            (received,) = collect(b, 1, a)
        deadline = time.monotonic() + LONG_NS / 1e9
        while not b.counters.unroutable and time.monotonic() < deadline:
            b.reply(received, Pong())
            b.wait(5_000_000)
        assert b.counters.unroutable == 1


def test_what_was_sent_before_close_arrives(run_dir: Path) -> None:
    server = Server(run_dir, "b", lambda frame: None)
    try:
        a = Endpoint(run_dir, "a")
        a.connect("b")
        for i in range(500):
            a.send("b", Event("log", str(i)))
        a.close()
        deadline = time.monotonic() + LONG_NS / 1e9
        while len(server.seen) < 500 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        server.close()
    assert [r.frame for r in server.seen] == [Event("log", str(i)) for i in range(500)]


def test_what_comes_while_closing_is_not_taken(run_dir: Path) -> None:
    """Else it would be acknowledged, and nobody deals with it: it is the next process's."""
    b = Endpoint(run_dir, "b")
    with b:
        a = Endpoint(run_dir, "a")
        a.bind()
        a.connect("absent")
        a.send("absent", Ping())  # waits for a connection, so closing takes its time
        b.connect("a")
        while not b.has_heard("a"):
            a.wait(1_000_000)
            assert not list(a.receive())
            b.wait(1_000_000)
            assert not list(b.receive())
        for _ in range(2 * ACK_EVERY):
            b.send("a", Ping())
        a.close(linger_ms=200)
        assert a.positions()["b>a"] == (0, 0)


def test_wait_sees_descriptors_and_is_finer_than_a_millisecond(run_dir: Path) -> None:
    read_end, write_end = os.pipe()
    with Endpoint(run_dir, "a") as a:
        a.bind()
        assert a.wait(300_000, [read_end], [write_end]) == (set(), {write_end})
        began = time.monotonic_ns()
        assert a.wait(300_000, [read_end]) == (set(), set())
        assert time.monotonic_ns() - began >= 300_000
        os.write(write_end, b"x")
        assert a.wait(None, [read_end]) == ({read_end}, set())
    os.close(read_end)
    os.close(write_end)


def test_the_socket_is_private_and_goes_away(run_dir: Path) -> None:
    path = socket_path(run_dir, "a")
    with Endpoint(run_dir, "a") as a:
        a.bind()
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_socket_that_a_killed_process_left_is_replaced(run_dir: Path) -> None:
    path = socket_path(run_dir, "a")
    pid = os.fork()
    if pid == 0:
        Endpoint(run_dir, "a").bind()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert path.exists()
    server = Server(run_dir, "a", lambda frame: Pong())
    try:
        with Endpoint(run_dir, "b") as b:
            b.connect("a")
            assert b.request("a", Ping(), LONG_NS) == Pong()
    finally:
        server.close()


def test_a_path_too_long_for_a_socket_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadRunDir, match=f"longer than {PATH_MAX} bytes") as caught:
        socket_path(tmp_path / ("x" * 100), "cpu0")
    assert "\n" not in str(caught.value)


def test_who_begins_anew_gets_what_was_retained_and_its_own_frames_are_taken(run_dir: Path) -> None:
    """On both sides of a connection: it connects to one peer, another connects to it."""
    with Endpoint(run_dir, "below") as below, Endpoint(run_dir, "above") as above:
        below.bind()
        above.connect("node")
        seen: list[tuple[str, Frame]] = []
        for life in ("first", "second", "third"):
            with Endpoint(run_dir, "node", afresh=True) as node:
                node.bind()
                node.connect("below")
                below_gets = [Event("to below", f"{life} {n}") for n in range(3)]
                for event in below_gets:
                    node.send("below", event)
                span = above.send("node", Event(f"to the {life}", ""))
                answered = False
                deadline = time.monotonic() + LONG_NS / 1e9
                while time.monotonic() < deadline and (below_gets or not answered):
                    for endpoint in (node, below, above):
                        endpoint.wait(1_000_000)
                        for received in endpoint.receive():
                            if received.peer == "node" and received.asked:
                                assert received.frame == below_gets.pop(0)
                            elif received.peer == "node":
                                assert received.frame == Pong()
                                answered |= received.header.span == span
                            else:
                                seen.append((life, received.frame))
                                node.reply(received, Pong())
                assert answered
                assert not below_gets
            above.send("node", Event("to nobody", life))
        assert seen == [
            ("first", Event("to the first", "")),
            ("second", Event("to nobody", "first")),
            ("second", Event("to the second", "")),
            ("third", Event("to nobody", "second")),
            ("third", Event("to the third", "")),
        ]


def make_io(run_dir: Path, deadline_ns: int) -> IoClient:
    amap = AddressMap()
    amap.add_device("dev", (PortRange("regs", 4, posted=frozenset({1})),), {"regs": 0x300}, None)
    return IoClient(
        run_dir,
        "cpu0",
        amap,
        None,
        time.monotonic_ns,
        lambda *a: None,
        pic=None,
        ioapics=(),
        deadline_ns=deadline_ns,
    )


def test_the_io_client_over_sockets(run_dir: Path) -> None:
    server = Server(run_dir, "dev", lambda f: ReadReply(f.offset) if isinstance(f, Read) else None)
    io = make_io(run_dir, LONG_NS)
    try:
        for _ in range(20):
            io.port_write(0x301, 1, 5)
            assert io.port_read(0x302, 1) == 2
        io.port_write(0x301, 1, 6)
    finally:
        io.close()  # sends what is pending
        deadline = time.monotonic() + LONG_NS / 1e9
        while len(server.seen) < 22 and time.monotonic() < deadline:
            time.sleep(0.005)
        server.close()
    assert isinstance(server.seen.pop().frame, Ping)  # close() waits for its answer
    assert [r.frame for r in server.seen[:-1]] == [Read("regs", 2, 1, (("regs", 1, 1, 5),))] * 20
    assert {r.peer for r in server.seen} == {"cpu0.io"}
    assert server.seen[-1].frame == PostedBatch((("regs", 1, 1, 6),))


def test_the_io_client_waits_no_longer_than_its_deadline(run_dir: Path) -> None:
    io = make_io(run_dir, 30_000_000)
    with pytest.raises(DeviceGone, match="dev has not answered Read"):
        io.port_read(0x302, 1)
    io.close()


def test_a_device_that_takes_no_more_holds_the_writer_up_and_loses_nothing(run_dir: Path) -> None:
    with Endpoint(run_dir, "dev") as dev:
        dev.bind()  # and never receives, as if it were stopped
        io = make_io(run_dir, 30_000_000)
        posted = 0

        def post_on_and_on() -> None:
            nonlocal posted
            while posted < 100 * WINDOW:
                io.port_write(0x301, 1, posted & 0xFF)
                io.flush()
                posted += 1

        with pytest.raises(DeviceGone, match="dev has not answered PostedBatch"):
            post_on_and_on()
        assert posted == WINDOW
        got: list[Frame] = []
        deadline = time.monotonic() + LONG_NS / 1e9
        while len(got) < posted and time.monotonic() < deadline:
            io.attend("dev")
            dev.wait(1_000_000)
            got += [r.frame for r in dev.receive()]
        assert got == [PostedBatch((("regs", 1, 1, i & 0xFF),)) for i in range(posted)]
        assert (dev.counters.lost, dev.counters.duplicated) == (0, 0)
        io.close()

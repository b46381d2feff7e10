"""What the launcher takes for an answer in a swap. Whole swaps: tests/machine/test_live.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import msgpack

from launcher.forkserver import Child, ChildSpec
from launcher.swapping import swap


@contextmanager
def this_process() -> Iterator[Child]:
    pidfd = os.pidfd_open(os.getpid())
    yield Child("uart0", os.getpid(), pidfd)
    os.close(pidfd)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def say(sock: socket.socket, **record: Any) -> None:
    sock.send(msgpack.packb(record))


def hear(sock: socket.socket) -> dict[str, Any]:
    record: dict[str, Any] = msgpack.unpackb(sock.recv(4096))
    return record


def test_records_of_earlier_swaps_are_passed_over() -> None:
    """Else the new process would write the journal while the old one still does."""
    old, old_process = pair()
    new, new_process = pair()
    heard: list[str] = []

    batons: dict[str, int] = {}

    def act_old() -> None:
        data, (beginning,), _, _ = socket.recv_fds(old_process, 4096, 1)
        record = msgpack.unpackb(data)
        heard.append(record["op"])
        os.write(beginning, b"\1")
        os.close(beginning)
        say(old_process, op="retired", number=record["number"], ns=1000, left_ns=1500)
        heard.append(hear(old_process)["op"])

    def act_new() -> None:
        say(new_process, op="standing-by")
        assert os.read(batons["end"], 1) == b"\1"
        heard.append("take-over")
        say(new_process, op="live", began_ns=2000, ns=4000)
        say(new_process, op="connected", ns=5000)

    def fork(spec: ChildSpec) -> tuple[Child, socket.socket]:
        assert spec.config["standby"]
        batons["end"] = os.dup(spec.fds["baton"])
        for actor in actors:
            actor.start()
        return child, new

    say(old_process, op="live")
    say(old_process, op="connected", ns=1)
    say(old_process, op="retired", number=7, ns=2)  # too late for a swap that was given up
    with this_process() as child:
        actors = [Thread(target=act) for act in (act_old, act_new)]
        done = swap("uart0", child, old, ChildSpec("uart0", "", {}, "", Path()), fork, lambda: None)
        for actor in actors:
            actor.join()
    assert heard == ["retire", "take-over", "end"]
    assert done.pause_ns == 4000
    assert list(done.parts_ns.values()) == [500, 500, 2000, 1000]
    os.close(batons["end"])
    for sock in (old, old_process, new, new_process):
        sock.close()

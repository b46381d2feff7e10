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

    def act_old() -> None:
        record = hear(old_process)
        heard.append(record["op"])
        say(old_process, op="retired", number=record["number"], ns=1000)
        heard.append(hear(old_process)["op"])

    def act_new() -> None:
        say(new_process, op="standing-by")
        heard.append(hear(new_process)["op"])
        say(new_process, op="live")
        say(new_process, op="connected", ns=5000)

    say(old_process, op="live")
    say(old_process, op="connected", ns=1)
    say(old_process, op="retired", number=7, ns=2)  # too late for a swap that was given up
    with this_process() as child:
        actors = [Thread(target=act) for act in (act_old, act_new)]
        for actor in actors:
            actor.start()
        spec = ChildSpec("uart0", "", {}, "", Path())
        done = swap("uart0", child, old, spec, lambda spec: (child, new), lambda: None)
        for actor in actors:
            actor.join()
    assert heard == ["retire", "take-over", "end"]
    assert done.pause_ns == 4000
    for sock in (old, old_process, new, new_process):
        sock.close()

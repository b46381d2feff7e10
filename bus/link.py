"""Sockets of the bus: where a node's socket lies, and a Link, the asking side of one pair of nodes.

Every node binds one ZeroMQ ROUTER at `<run_dir>/<node>.ipc`; who wants something of it connects a DEALER
whose identity is the asker's name. Left out: tcp:// with CURVE keys (devices on another host).
"""

from __future__ import annotations

import contextlib
import socket as sockets
from pathlib import Path
from typing import Any, Protocol

import zmq

CONSOLE_SOCKET = "console-{node}.sock"
HIGH_WATER = 1000  # frames waiting on one way; a Stream has never as many under way
RECONNECT_MS = 1  # a node's socket that isn't there is tried again after this, backing off to
RECONNECT_MAX_MS = 16
BACKLOG = 64  # connections that wait for the node's process
PATH_MAX = 107  # sockaddr_un.sun_path holds 108 bytes with the final 0


class BadRunDir(ValueError):
    """A run directory whose sockets would have too long a path."""


def console_path(run_dir: str | Path, node: str) -> Path:
    """The socket of a device's console."""
    return Path(run_dir) / CONSOLE_SOCKET.format(node=node)


def socket_path(run_dir: str | Path, node: str) -> Path:
    """The path of a node's socket; BadRunDir where the kernel could not take it."""
    path = Path(run_dir) / f"{node}.ipc"
    if len(str(path).encode()) > PATH_MAX:
        raise BadRunDir(f"socket path {path} is longer than {PATH_MAX} bytes: use a shorter run directory")
    return path


def listen(run_dir: str | Path, node: str) -> int:
    """A listening socket at a node's path: its descriptor, for `Endpoint.bind` of each process of the node.

    Who connects while there is no process waits in the kernel, and need not try again.
    """
    path = socket_path(run_dir, node)
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_NONBLOCK) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        return listener.detach()


def make_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """A socket with the options that all of ours share."""
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


def make_dealer(context: zmq.Context[Any], identity: str) -> zmq.Socket[bytes]:
    """A DEALER, connected to nobody.

    It takes no frame while it is not connected; at each connection the peer gets an empty message first.
    """
    socket = make_socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.PROBE_ROUTER, 1)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    return socket


def make_router(context: zmq.Context[Any]) -> zmq.Socket[bytes]:
    """A ROUTER, not bound."""
    router = make_socket(context, zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply to nobody is an error, not a silence
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted peer takes its name over
    return router


def dial(context: zmq.Context[Any], run_dir: str | Path, identity: str, peer: str) -> zmq.Socket[bytes]:
    """A DEALER connected to `peer`, which need not be there yet."""
    socket = make_dealer(context, identity)
    socket.connect(f"ipc://{socket_path(run_dir, peer)}")
    return socket


class Link(Protocol):
    """The asking side of a pair of nodes, for one thread."""

    def send(self, data: bytes) -> None:
        """Send, or drop where there is no connection: bus/stream.py repeats it."""

    def receive(self, timeout_ms: int) -> bytes | None:
        """The next frame from the peer; None when none came in time (0 = only look)."""

    def close(self) -> None: ...


class ZmqLink:
    """A Link over a DEALER."""

    __slots__ = ("_socket", "_timeout_ms")

    def __init__(self, context: zmq.Context[Any], run_dir: str | Path, identity: str, peer: str) -> None:
        self._socket = dial(context, run_dir, identity, peer)
        self._timeout_ms = -1

    def send(self, data: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(data, zmq.DONTWAIT)

    def receive(self, timeout_ms: int) -> bytes | None:
        try:
            if timeout_ms == 0:
                return self._socket.recv(zmq.DONTWAIT)
            if timeout_ms != self._timeout_ms:
                self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
                self._timeout_ms = timeout_ms
            return self._socket.recv()
        except zmq.Again:
            return None

    def close(self) -> None:
        self._socket.close()

"""Messages with descriptors over a UNIX socket: one msgpack map per SOCK_SEQPACKET record.

Used where a descriptor has to travel, or where a client comes and goes: the memory node's socket and
the launcher's control socket. A request is {"op": name, ...}; a reply has "error" when refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack

RECORD_MAX = 160 << 10  # below Linux's default socket buffer, so that one record always fits
DATA_MAX = 128 << 10  # bytes of bulk data per record
FDS_MAX = 250  # Linux takes 253 [unix(7), SCM_RIGHTS]


class BadRecord(ValueError):
    """A record that is not one complete msgpack map."""


def listen(path: Path) -> socket.socket:
    """A non-blocking listening socket at `path`, for the owner only."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def connect(path: Path, timeout_s: float) -> socket.socket:
    """A connected socket whose calls give up after `timeout_s`; OSError where nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def send_record(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    record = msgpack.packb(message)
    if len(record) > RECORD_MAX:
        raise BadRecord(f"a record of {len(record)} bytes is too long")
    if fds:
        socket.send_fds(sock, [record], list(fds))
    else:
        sock.send(record)


def receive_record(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors (the caller's to close); None when the peer has closed."""
    record, fds, flags, _ = socket.recv_fds(sock, RECORD_MAX, FDS_MAX)
    if not record:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BadRecord("a record is too long")
        try:
            message = msgpack.unpackb(record)
        except (ValueError, msgpack.UnpackException) as e:
            raise BadRecord(f"not msgpack: {e}") from e
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise BadRecord("not a map with text keys")
    except BadRecord:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds

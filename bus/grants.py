"""A descriptor of one of the memory node's regions, for processes that may not import the memory node.

The protocol is memory_node/wire.py's: one msgpack map per SOCK_SEQPACKET record on `<run_dir>/memory.sock`,
the descriptor in the ancillary data of the reply.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import msgpack

SOCKET_NAME = "memory.sock"
RECORD_MAX = 160 << 10
RETRY_S = 0.002


class GrantRefused(RuntimeError):
    """The memory node refused the region, or is not there."""


def attach(run_dir: str | Path, region: str, writable: bool, timeout_s: float = 60.0) -> tuple[int, int]:
    """Descriptor (the caller's to close) and size of a region; waits for a memory node that is starting, or
    that ends before it has answered."""
    path = Path(run_dir) / SOCKET_NAME
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            reply, fds = _ask(path, {"op": "attach", "region": region, "writable": writable}, timeout_s)
            break
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError) as error:
            if time.monotonic() >= deadline:
                raise GrantRefused(f"no memory node answers at {path}") from error
            time.sleep(RETRY_S)
        except (OSError, ValueError) as error:
            raise GrantRefused(f"memory node: no grant of {region!r}: {error}") from error
    if len(fds) != 1 or "error" in reply:
        for fd in fds:
            os.close(fd)
        raise GrantRefused(f"memory node: no grant of {region!r}: {reply.get('error', 'no descriptor')}")
    return fds[0], int(reply["size"])


def _ask(path: Path, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.send(msgpack.packb(request))
        record, fds, _, _ = socket.recv_fds(sock, RECORD_MAX, 1)
        if not record:
            raise ConnectionResetError("it has ended")
        return msgpack.unpackb(record), fds

"""What other processes use of the memory node: descriptors of its regions, loading, dumps, marks.

One blocking request and reply at a time, over `<run_dir>/memory.sock`; any thread may own a client,
but only one. Every refusal raises MemoryRefused with the node's reason. When the node's process ends, the
client waits for its successor and asks again; all but `dump` bear that.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from memory_node import wire
from memory_node.regions import Region
from memory_node.store import BadAccess, write_pieces

SOCKET_NAME = "memory.sock"
CONNECT_S = 60.0  # how long to wait for a memory node that is starting
REPLY_S = 60.0  # a dump of 3 GiB to a slow disk
TRIES = 3  # of a request; perhaps it is what ends the node
NOT_AGAIN = ("dump",)  # its file would be there already


class MemoryRefused(RuntimeError):
    """The memory node refused a request, or is gone."""


class MemoryClient:
    """A connection to one machine's memory node."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / SOCKET_NAME
        self._sock = _connect(self._path)

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def attach(self, region: str, writable: bool) -> tuple[int, int]:
        """A descriptor of the region's file (the caller's to close) and its size in bytes."""
        reply, fds = self._ask({"op": "attach", "region": region, "writable": writable})
        if len(fds) != 1:
            raise MemoryRefused(f"the grant of {region!r} came with {len(fds)} descriptors")
        return fds[0], int(reply["size"])

    def regions(self) -> list[Region]:
        return [Region.from_plain(plain) for plain in self._call("regions")["regions"]]

    def e820(self, overlay: list[tuple[int, int, int]] | None = None) -> list[tuple[int, int, int]]:
        """(base, length, type), the regions' map cut by `overlay`."""
        plain = self._call("e820", overlay=overlay or [])["e820"]
        return [(base, length, kind) for base, length, kind in plain]

    def load(self, region: str, offset: int, data: bytes) -> None:
        view = memoryview(data)
        for at in range(0, len(data), wire.DATA_MAX):
            part = bytes(view[at : at + wire.DATA_MAX])
            self._call("load", region=region, offset=offset + at, data=part)

    def put(self, region: str, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write (offset, data) pairs through a descriptor of the region: for much data at once."""
        fd, size = self.attach(region, True)
        try:
            write_pieces(fd, size, pieces)
        except BadAccess as e:
            raise MemoryRefused(f"{region}: {e}") from e
        finally:
            os.close(fd)

    def load_file(self, region: str, offset: int, path: str | Path) -> int:
        """Load a whole file; its size."""
        return int(self._call("load_file", region=region, offset=offset, path=str(path))["size"])

    def read(self, region: str, offset: int, size: int) -> bytes:
        parts = []
        for at in range(0, size, wire.DATA_MAX):
            part = min(wire.DATA_MAX, size - at)
            parts.append(self._call("read", region=region, offset=offset + at, size=part)["data"])
        return b"".join(parts)

    def dump(self, region: str, path: str | Path) -> int:
        """Copy the region into a new file (sparse); its size."""
        return int(self._call("dump", region=region, path=str(path))["size"])

    def set_mark(self, mark: str, region: str = "ram") -> None:
        self._call("mark", mark=mark, region=region)

    def drop_mark(self, mark: str, region: str = "ram") -> None:
        self._call("drop_mark", mark=mark, region=region)

    def written_since(self, mark: str, region: str = "ram") -> Iterator[int]:
        """Numbers of the pages whose contents differ from the mark's, ascending."""
        bitmap = self._call("written_since", mark=mark, region=region)["pages"]
        return (page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1)

    def stats(self) -> dict[str, Any]:
        return dict(self._call("stats")["stats"])

    def _call(self, op: str, **arguments: object) -> dict[str, Any]:
        reply, fds = self._ask({"op": op, **arguments})
        for fd in fds:
            os.close(fd)
        return reply

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        for tries_left in reversed(range(TRIES)):
            try:
                wire.send_record(self._sock, request)
                answer = wire.receive_record(self._sock)
            except (BrokenPipeError, ConnectionResetError):
                answer = None
            except (OSError, wire.BadRecord) as e:
                raise MemoryRefused(f"memory node: {request['op']}: {e}") from e
            if answer is not None:
                reply, fds = answer
                if "error" in reply:
                    raise MemoryRefused(f"memory node: {request['op']}: {reply['error']}")
                return reply, fds
            if request["op"] in NOT_AGAIN or not tries_left:
                break
            self._sock.close()
            self._sock = _connect(self._path)
        raise MemoryRefused(f"memory node: {request['op']}: it has ended meanwhile")


def attach(run_dir: str | Path, region: str, writable: bool) -> tuple[int, int]:
    """Descriptor and size of one region, over a connection of its own."""
    with MemoryClient(run_dir) as client:
        return client.attach(region, writable)


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            sock = wire.connect(path, CONNECT_S)
        except (FileNotFoundError, ConnectionRefusedError) as e:
            if time.monotonic() >= deadline:
                raise MemoryRefused(f"no memory node answers at {path}") from e
            time.sleep(0.002)
        else:
            sock.settimeout(REPLY_S)
            return sock

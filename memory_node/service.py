"""The memory node's answers: one function from a request to a reply, and the sockets around it.

Every request is checked by the shape of its arguments; what does not fit is refused with a reason and
counted, and a client that misbehaves costs its own connection only.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_node import wire
from memory_node.marks import Marks
from memory_node.regions import Kind, e820
from memory_node.store import BadAccess, Store

Request = dict[str, Any]
Reply = dict[str, Any]


class MemoryService:
    """Requests against one store. `grants` collects descriptors to send along with the next reply."""

    def __init__(self, store: Store, marks: Marks) -> None:
        self.store, self.marks = store, marks
        self.counters: Counter[str] = Counter()
        self._grants: list[int] = []
        self._operations: dict[str, tuple[Callable[..., Reply], dict[str, type]]] = {
            "attach": (self._attach, {"region": str, "writable": bool}),
            "regions": (self._regions, {}),
            "e820": (self._e820, {"overlay": list}),
            "load": (self._load, {"region": str, "offset": int, "data": bytes}),
            "load_file": (self._load_file, {"region": str, "offset": int, "path": str}),
            "read": (self._read, {"region": str, "offset": int, "size": int}),
            "dump": (self._dump, {"region": str, "path": str}),
            "mark": (self._mark, {"mark": str, "region": str}),
            "drop_mark": (self._drop_mark, {"mark": str, "region": str}),
            "written_since": (self._written_since, {"mark": str, "region": str}),
            "stats": (self._stats, {}),
        }

    def handle(self, request: Request) -> tuple[Reply, list[int]]:
        """The reply, and descriptors to send with it and close; never raises for a bad request."""
        self._grants = []
        try:
            reply = self._dispatch(request)
        except (BadAccess, OSError) as e:
            self.counters["refused"] += 1
            return {"error": str(e)}, []
        return reply, self._grants

    def stats(self) -> dict[str, int]:
        in_use = {
            f"bytes_in_use_{r.name}": self.store.bytes_in_use(r.name)
            for r in self.store.regions
            if r.kind is not Kind.RESERVED
        }
        return {**self.counters, **in_use}

    def _dispatch(self, request: Request) -> Reply:
        arguments = dict(request)
        op = arguments.pop("op", None)
        if not isinstance(op, str) or op not in self._operations:
            raise BadAccess(f"no operation {op!r}")
        function, shape = self._operations[op]
        if arguments.keys() != shape.keys() or any(type(arguments[k]) is not t for k, t in shape.items()):
            raise BadAccess(f"{op} takes {', '.join(f'{k}: {t.__name__}' for k, t in shape.items())}")
        self.counters[op] += 1
        return function(**arguments)

    def _attach(self, region: str, writable: bool) -> Reply:
        self._grants = [self.store.grant(region, writable)]
        return {"size": self.store.region(region).size}

    def _regions(self) -> Reply:
        return {"regions": [r.to_plain() for r in self.store.regions]}

    def _e820(self, overlay: list[Any]) -> Reply:
        for item in overlay:
            if not (isinstance(item, list) and len(item) == 3 and all(type(n) is int for n in item)):
                raise BadAccess(f"not a range: {item!r}")
        return {"e820": e820(self.store.regions, [(b, n, t) for b, n, t in overlay])}

    def _load(self, region: str, offset: int, data: bytes) -> Reply:
        self.store.write(region, offset, data)
        self.counters["bytes_loaded"] += len(data)
        return {}

    def _load_file(self, region: str, offset: int, path: str) -> Reply:
        size = self.store.load_file(region, offset, Path(path))
        self.counters["bytes_loaded"] += size
        return {"size": size}

    def _read(self, region: str, offset: int, size: int) -> Reply:
        if size > wire.DATA_MAX:
            raise BadAccess(f"a read of {size} bytes is more than {wire.DATA_MAX}")
        return {"data": self.store.read(region, offset, size)}

    def _dump(self, region: str, path: str) -> Reply:
        return {"size": self.store.dump(region, Path(path))}

    def _mark(self, mark: str, region: str) -> Reply:
        self.marks.set_mark(mark, region)
        return {}

    def _drop_mark(self, mark: str, region: str) -> Reply:
        self.marks.drop_mark(mark, region)
        return {}

    def _written_since(self, mark: str, region: str) -> Reply:
        return {"pages": self.marks.written_since(mark, region)}

    def _stats(self) -> Reply:
        return {"stats": self.stats()}


class GrantSocket:
    """`memory.sock`: accepts clients and answers them; the node's loop polls `readable()`."""

    def __init__(self, path: Path, service: MemoryService) -> None:
        self._service = service
        self._path = path
        path.unlink(missing_ok=True)  # a killed process of this node has left it
        self._listener = wire.listen(path)
        self._clients: dict[int, socket.socket] = {}

    def descriptors(self) -> list[int]:
        return [self._listener.fileno(), *self._clients]

    def readable(self, fd: int) -> None:
        """Serve one descriptor that poll reported."""
        if fd == self._listener.fileno():
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._clients[client.fileno()] = client
        elif fd in self._clients and not self._serve(self._clients[fd]):
            self._clients.pop(fd).close()

    def close(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _serve(self, client: socket.socket) -> bool:
        """Answer one request; False when the connection is to be closed."""
        try:
            received = wire.receive_record(client)
            if received is None:
                return False
            request, fds = received
            for fd in fds:
                os.close(fd)
            reply, grants = self._service.handle(request)
            try:
                wire.send_record(client, reply, grants)
            finally:
                for fd in grants:
                    os.close(fd)
        except BlockingIOError:
            return False  # it sends without reading
        except (OSError, wire.BadRecord):
            self._service.counters["bad_records"] += 1
            return False
        return True

"""The memory node: the process that hands out the machine's physical memory.

It is in nobody's way while the machine runs: the others map what it granted them. It answers on
`memory.sock` (see memory_node/service.py) and, for supervision, on the bus. The files behind the memory, and
the marks, are the launcher's to keep: this process may end, or be replaced by another, and who has mapped
something notices nothing; who is asking asks again.
Left out: DMA as messages.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, assert_never

from bus.control import Control
from bus.endpoint import LINGER_MS, Endpoint, Received
from bus.frames import Event, Frame, Ping, Pong, Refused, Reset, ResetReply, Shutdown, Stats, StatsReply
from memory_node.client import SOCKET_NAME
from memory_node.marks import Marks
from memory_node.regions import Region
from memory_node.service import GrantSocket, MemoryService
from memory_node.store import Store

NODE = "memory"
LAUNCHER = "launcher"
MARKS = "marks"  # name of a descriptor, beside those of the regions
Answered = Ping | Reset | Stats


def run(config: dict[str, Any]) -> None:
    """Serve until Shutdown. `config`: run_dir, machine, regions (plain); perhaps `fds`: of regions by name,
    `marks`, `control`; perhaps `standby`: take over from another process, when told to."""
    fds: dict[str, int] = config.get("fds", {})
    control = Control(fds["control"]) if "control" in fds else None
    standby = control is not None and bool(config.get("standby"))
    try:
        regions = [Region.from_plain(plain) for plain in config["regions"]]
        store = Store(config["machine"], regions, fds)
        if standby and control is not None:
            control.stand_by()
        node = _Node(Path(config["run_dir"]), store, fds.get(MARKS), control)
    except Exception as error:
        if standby and control is not None:
            control.refuse(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    if standby and control is not None:
        control.live()
        control.connected(time.monotonic_ns())
    while not node.serve():
        assert control is not None
        control.retired()
        control.wait_to_resume()
        node = _Node(node.run_dir, store, fds.get(MARKS), control)


class _Node:
    """The sockets, while this process is the one that has them."""

    def __init__(self, run_dir: Path, store: Store, marks: int | None, control: Control | None) -> None:
        self.run_dir = run_dir
        self._control = control
        self._service = MemoryService(store, Marks(store, marks))
        self._grants = GrantSocket(run_dir / SOCKET_NAME, self._service)
        self._endpoint = Endpoint(run_dir, NODE, afresh=True)
        self._endpoint.bind()
        self._endpoint.connect(LAUNCHER)

    def serve(self) -> bool:
        """Until Shutdown (True), or until another process is to take over (False)."""
        ended = False
        try:
            self._endpoint.send(LAUNCHER, Event("ready", "memory is there"))
            while not ended:
                own = [] if self._control is None else [self._control.fileno()]
                readable, _ = self._endpoint.wait(None, [*own, *self._grants.descriptors()])
                if self._control is not None and self._control.fileno() in readable:
                    if self._control.told_to_retire():
                        break
                    readable.discard(self._control.fileno())
                for fd in readable:
                    self._grants.readable(fd)
                ended = self._hear_frames()
        finally:
            self._grants.close()
            self._endpoint.close(LINGER_MS if ended else 0)
        return ended

    def _hear_frames(self) -> bool:
        """Answer what has come; whether Shutdown has."""
        for received in self._endpoint.receive():
            if isinstance(received.frame, Shutdown):
                return True
            if received.asked:
                _answer(self._endpoint, self._service, received)
        return False


def _answer(endpoint: Endpoint, service: MemoryService, received: Received) -> None:
    frame = received.frame
    if isinstance(frame, Answered):
        endpoint.reply(received, _reply(endpoint, service, frame))
    else:
        endpoint.reply(received, Refused(f"{NODE} takes no {type(frame).__name__}"))


def _reply(endpoint: Endpoint, service: MemoryService, frame: Answered) -> Frame:
    match frame:
        case Ping():
            return Pong()
        case Reset():
            return ResetReply()  # the RESET pin does not touch memory
        case Stats():
            return StatsReply({**endpoint.stats(), **service.stats()})
        case _:
            assert_never(frame)

"""The memory node: the process that creates and owns the machine's physical memory.

It is in nobody's way while the machine runs: the others map what it granted them. It answers on
`memory.sock` (see memory_node/service.py) and, for supervision, on the bus.
Left out: DMA as messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

from bus.endpoint import Endpoint, Received
from bus.frames import Event, Frame, Ping, Pong, Refused, Reset, ResetReply, Shutdown, Stats, StatsReply
from memory_node.client import SOCKET_NAME
from memory_node.regions import Region
from memory_node.service import GrantSocket, MemoryService
from memory_node.store import Store

NODE = "memory"
LAUNCHER = "launcher"
Answered = Ping | Reset | Stats


def run(config: dict[str, Any]) -> None:
    """Serve until Shutdown. `config`: run_dir, machine, regions (plain), perhaps fds of regions by name."""
    run_dir = Path(config["run_dir"])
    store = Store(config["machine"], [Region.from_plain(plain) for plain in config["regions"]],
                  config.get("fds"))
    service = MemoryService(store)
    grants = GrantSocket(run_dir / SOCKET_NAME, service)
    try:
        with Endpoint(run_dir, NODE) as endpoint:
            endpoint.bind()
            endpoint.connect(LAUNCHER)
            endpoint.send(LAUNCHER, Event("ready", "memory is there"))
            while _turn(endpoint, grants, service):
                pass
    finally:
        grants.close()
        store.close()


def _turn(endpoint: Endpoint, grants: GrantSocket, service: MemoryService) -> bool:
    """Wait for work and do it; False after Shutdown."""
    readable, _ = endpoint.wait(None, grants.descriptors())
    for fd in readable:
        grants.readable(fd)
    for received in endpoint.receive():
        if isinstance(received.frame, Shutdown):
            return False
        if received.asked:
            _answer(endpoint, service, received)
    return True


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

"""CPU nodes that execute nothing but speak the bus: what launcher tests start in place of the real one.

Each function at the end is an entry point; tests/launcher/drive.py names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bus.addressmap import AddressMap
from bus.endpoint import Endpoint, Received
from bus.frames import (
    Event,
    Ping,
    Pong,
    PostedBatch,
    Read,
    ReadReply,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    Shutdown,
    Stats,
    StatsReply,
)
from memory_node.client import MemoryClient

SECOND = 10**9
COM1 = 0x3F8
CODE_SEGMENT = [0x10, 0, 0xFFFFFFFF, 0xC09B, True]
STATE = {"eip": 0x100000, "eax": 0xDEAD, "cs": CODE_SEGMENT, "cr0": 0x11, "reason": "a fake"}


class FakeCpu:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        entry = AddressMap.from_plain(config["map"]).find("port", COM1)
        assert entry is not None
        self.uart = entry.node
        self.endpoint = Endpoint(config["run_dir"], config["node"])
        self.endpoint.bind()
        for peer in ("launcher", self.uart):
            self.endpoint.connect(peer)
        self.running = True
        self.resets: list[dict[str, Any]] = []

    def event(self, kind: str, text: str, **data: Any) -> None:
        self.endpoint.send("launcher", Event(kind, text, data))

    def print(self, text: str) -> None:
        writes = tuple(("regs", 0, 1, byte) for byte in text.encode())
        for at in range(0, len(writes), 64):
            self.endpoint.send(self.uart, PostedBatch(writes[at : at + 64]))

    def typed(self) -> str:
        """What has been typed, polled from the UART."""
        typed = ""
        while self._read(5) & 1:
            typed += chr(self._read(0))
        return typed

    def _read(self, offset: int) -> int:
        reply = self.endpoint.request(self.uart, Read("regs", offset, 1), 240 * SECOND)
        assert isinstance(reply, ReadReply)
        return reply.value

    def serve(self, timeout_s: float | None) -> Iterator[None]:
        """Answer the launcher; yields after each wait, until Shutdown."""
        while self.running:
            self.endpoint.wait(None if timeout_s is None else int(timeout_s * SECOND))
            for received in self.endpoint.receive():
                self._answer(received)
            yield

    def run(self) -> None:
        for _ in self.serve(None):
            pass
        self.endpoint.close()

    def _answer(self, received: Received) -> None:
        reply = self.endpoint.reply
        match received.frame:
            case Shutdown():
                self.running = False
            case Ping():
                reply(received, Pong())
            case Stats():
                reply(received, StatsReply(self.endpoint.stats()))
            case Save():
                reply(received, SaveReply({"cpu": STATE}))
            case Reset(start):
                self.resets.append(start)
                reply(received, ResetReply())
            case _:
                pass  # interrupts, which nobody here waits for


def _ready(config: dict[str, Any]) -> FakeCpu:
    cpu = FakeCpu(config)
    cpu.event("ready", "fake")
    return cpu


def poweroff(config: dict[str, Any]) -> None:
    """Say hello and power off."""
    cpu = _ready(config)
    cpu.print("hello from a fake\r\n")
    cpu.event("poweroff", "S5")
    cpu.run()


def idle(config: dict[str, Any]) -> None:
    """Say hello and wait."""
    cpu = _ready(config)
    cpu.print("hello from a fake\r\n")
    cpu.run()


def silent(config: dict[str, Any]) -> None:
    """Never say ready."""
    time.sleep(3600)


def echo(config: dict[str, Any]) -> None:
    """Echo typed characters in brackets; q powers off."""
    cpu = _ready(config)
    cpu.print("echo\r\n")
    for _ in cpu.serve(0.01):
        for key in cpu.typed():
            cpu.print(f"[{key}]")
            if key == "q":
                cpu.event("poweroff", "q")
    cpu.endpoint.close()


def chatter(config: dict[str, Any]) -> None:
    """Say numbered lines without end, telling the launcher nothing of it."""
    cpu = _ready(config)
    for n, _ in enumerate(cpu.serve(0.002)):
        cpu.print(f"line {n}\r\n")
    cpu.endpoint.close()


def burst(config: dict[str, Any]) -> None:
    """Say 200 lines and power off at once: all of them must be shown."""
    cpu = _ready(config)
    for n in range(200):
        cpu.print(f"burst {n} {'x' * 50}\r\n")
    cpu.event("poweroff", "S5")
    cpu.run()


def reset_once(config: dict[str, Any]) -> None:
    """Write over the first page, pull the RESET pin; started again, show what memory holds and power off."""
    cpu = _ready(config)
    cpu.print("first\r\n")
    with MemoryClient(config["run_dir"]) as memory:
        before = memory.read("ram", 0x800, 32)
        memory.load("ram", 0x800, bytes(32))
        cpu.event("reset", "the guest asked for it")
        for _ in cpu.serve(None):
            if len(cpu.resets) == 2:
                break
        again = memory.read("ram", 0x800, 32)
    cpu.print(f"held {cpu.resets[0]} eip {cpu.resets[1]['eip']:x} images {before == again != bytes(32)}\r\n")
    cpu.event("poweroff", "S5")
    cpu.run()


def triple_fault(config: dict[str, Any]) -> None:
    """Shut down as a CPU does after a triple fault."""
    cpu = _ready(config)
    cpu.print("last words\r\n")
    cpu.event("triple-fault", "at 0010:00100000: 0f 0b ud2", **STATE)
    cpu.run()


def noisy(config: dict[str, Any]) -> None:
    """Report the same open-bus access many times, an unimplemented instruction once, and power off."""
    cpu = _ready(config)
    for _ in range(30):
        cpu.event("open-bus", "read of port 02e9 at 0010:00100000: ec in al, dx")
    cpu.event("bad-opcode", "at 0010:00100004: 0f 0b ud2")
    cpu.event("poweroff", "S5")
    cpu.run()


def raises(config: dict[str, Any]) -> None:
    """Fail after the start."""
    _ready(config)
    Path("/nonexistent/file").read_text()


def broken(config: dict[str, Any]) -> None:
    """Fail before being ready."""
    raise RuntimeError("this CPU\nis broken")

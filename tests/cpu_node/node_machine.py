"""A CPU node as a process on the bus: a memory node, a launcher and devices played by the test."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bus.addressmap import AddressMap
from bus.endpoint import Endpoint, Received
from bus.frames import (
    Event,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    PauseReply,
    Pong,
    Read,
    ReadReply,
    Refused,
    ResetReply,
    SaveReply,
    Shutdown,
    StatsReply,
    StringIn,
    StringInReply,
    StringOut,
    StringOutReply,
    Write,
    WriteReply,
)
from bus.ranges import MmioRange, PortRange
from cpu_node.descriptor import INTERRUPT_GATE32, pack, pack_gate
from cpu_node.node import run as run_cpu
from memory_node.client import attach
from memory_node.node import run as run_memory
from memory_node.regions import pc_regions
from tests.cpu_node.board import asm

MIB = 1 << 20
SECOND = 10**9
DEADLINE_S = 240.0  # a bound on hanging, not an expectation
GDT, IDT, STACK, CODE, HANDLER = 0x1000, 0x2000, 0x9000, 0x100000, 0x110000
PORTS, MMIO = 0x300, 0xE000_0000
VECTOR = 0x40
IRET = ".byte 0xcf"
SPIN = "here: inc dword ptr [0x200000]\njmp here"
SPAWN = multiprocessing.get_context("spawn")


class Machine:
    """Processes of a memory node and a CPU; the test is launcher, 8259, I/O APIC and one device."""

    def __init__(self, run_dir: Path, apic: bool) -> None:
        self.run_dir = run_dir
        self.frames: list[tuple[str, Frame]] = []  # what the devices got
        self.events: list[Event] = []
        self.vectors: list[int] = []
        self.registers: dict[int, int] = {}
        regions = [r.to_plain() for r in pc_regions(16 * MIB, mirror_pages=1)]
        config = {"run_dir": str(run_dir), "machine": "test", "regions": regions}
        self.memory = SPAWN.Process(target=run_memory, args=(config,), daemon=True)
        self.memory.start()
        fd, size = attach(run_dir, "ram", writable=True)
        self.ram = mmap.mmap(fd, size)
        os.close(fd)
        self.ends: dict[str, Endpoint] = {}
        self.open_ends(run_dir)
        address_map = AddressMap()
        ports = PortRange("ports", 8, widths=(1, 2, 4), posted=frozenset({0}))
        address_map.add_device("dev", (ports, MmioRange("window", 0x100, widths=(4,))),
                               {"ports": PORTS, "window": MMIO}, None)
        self.config: dict[str, Any] = {
            "node": "cpu0", "run_dir": str(run_dir), "machine": "test", "map": address_map.to_plain(),
            "memory_size": 16 * MIB, "tsc_hz": 2_000_000_000, "apic": apic,
            "controllers": {"pic": "pic", "ioapics": ["ioapic"]}, "start": self.start_state(),
        }  # fmt: skip
        self.cpu = SPAWN.Process(target=run_cpu, args=(self.config,), daemon=True)
        self._tables()

    def _tables(self) -> None:
        for selector, raw in ((0x10, pack(0, 0xFFFFF, 0xC09B)), (0x18, pack(0, 0xFFFFF, 0xC093))):
            self.ram[GDT + selector : GDT + selector + 8] = raw.to_bytes(8, "little")
        self.gate(VECTOR, HANDLER)
        self.load(f"inc dword ptr [0x200000]\n{IRET}", HANDLER)
        self.ram[0x3000:0x3006] = (0x7FF).to_bytes(2, "little") + IDT.to_bytes(4, "little")

    @staticmethod
    def start_state(eip: int = CODE) -> dict[str, int]:
        names = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
        state = {**dict.fromkeys(names, 0), "eip": eip, "esp": STACK}
        return {**state, "gdt_base": GDT, "gdt_limit": 0x1F, "cs": 0x10, "ds": 0x18}

    def gate(self, vector: int, va: int) -> None:
        raw = pack_gate(INTERRUPT_GATE32, 0x10, va)
        self.ram[IDT + 8 * vector : IDT + 8 * vector + 8] = raw.to_bytes(8, "little")

    def open_ends(self, run_dir: Path) -> None:
        """Those of the other nodes; new ones for a new CPU process, whose frames begin at 1."""
        for end in self.ends.values():
            end.close(0)
        self.ends = {name: Endpoint(run_dir, name) for name in ("launcher", "pic", "ioapic", "dev")}
        for name, end in self.ends.items():
            end.bind()
            if name != "dev":
                end.connect("cpu0")

    def load(self, text: str, va: int = CODE) -> None:
        code = asm(text, va)
        self.ram[va : va + len(code)] = code

    def start(self, text: str) -> None:
        """Run a guest program; LIDT comes first."""
        self.load(f"lidt [0x3000]\n{text}")
        self.cpu.start()
        self.event("ready")
        for name in ("launcher", "pic", "ioapic"):
            self.ends[name].meet("cpu0", int(DEADLINE_S * SECOND))

    def dword(self, pa: int) -> int:
        return int.from_bytes(self.ram[pa : pa + 4], "little")

    # ---- the bus

    def turn(self, wait_s: float = 0.01) -> None:
        """Serve what came in."""
        for name, end in self.ends.items():
            end.wait(int(wait_s * SECOND) if name == "dev" else 0)
            for received in end.receive():
                self._take(name, end, received)

    def _take(self, name: str, end: Endpoint, received: Received) -> None:
        frame = received.frame
        if isinstance(frame, Event):
            self.events.append(frame)
            return
        if not received.asked:
            self.frames.append((name, frame))
            return
        if isinstance(frame, Pong | SaveReply | StatsReply | ResetReply | Refused | PauseReply):
            return
        self.frames.append((name, frame))
        answer = self._answer(frame)
        if answer is not None:
            end.reply(received, answer)

    def _answer(self, frame: Frame) -> Frame | None:
        match frame:
            case Read(offset=offset, width=width):
                return ReadReply(self.registers.get(offset, 0xFFFFFFFF) & (1 << 8 * width) - 1)
            case Write(offset=offset, value=value):
                self.registers[offset] = value
                return WriteReply()
            case StringIn(width=width, count=count):
                return StringInReply(bytes(n & 0xFF for n in range(width * count)))
            case StringOut():
                return StringOutReply()
            case IntAck():
                vector = self.vectors.pop(0) if self.vectors else None
                self.ends["pic"].send("cpu0", Intr(bool(self.vectors)))
                return IntAckReply(vector)
            case _:
                return None

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"no {what}; events {self.events}, frames {self.frames}"
            assert self.cpu.is_alive() or condition(), f"the CPU's process ended, waiting for {what}"
            self.turn()

    def event(self, kind: str) -> Event:
        self.until(lambda: any(e.kind == kind for e in self.events), f"event {kind!r}")
        return next(e for e in self.events if e.kind == kind)

    def ask(self, frame: Frame) -> Frame:
        """The launcher's request; devices are served meanwhile by nobody."""
        return self.ends["launcher"].request("cpu0", frame, int(DEADLINE_S) * SECOND)

    def interrupt(self, *vectors: int) -> None:
        self.vectors += vectors
        self.ends["pic"].send("cpu0", Intr(True))

    def got(self, kind: type[Frame]) -> list[Frame]:
        return [frame for _, frame in self.frames if isinstance(frame, kind)]

    def close(self) -> None:
        if self.cpu.is_alive():
            self.ends["launcher"].send("cpu0", Shutdown())
            self.cpu.join(10)
        for process in (self.cpu, self.memory):
            if process.pid is not None and process.is_alive():
                process.kill()
                process.join()
        for end in self.ends.values():
            end.close()

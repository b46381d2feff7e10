"""Kills and swaps, each kind from a thread of its own, so that they meet as they like.

A kill is SIGKILL for a process of a device, whichever has its name at that moment: also one that was just
started, or stands by for a swap. A swap that such a kill has refused is asked for again. What a kill costs is
counted from the signal until a successor has answered the CPU's connection, of which the launcher keeps the
time (`stats`); what a swap costs the launcher measures (launcher/swapping.py).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.control import NoAnswer, ask

SECOND_NS = 1_000_000_000
GATHER_S = 2.0  # between two questions for what the launcher has noted
REFUSED_S = 60.0  # for how long one is tried again


@dataclass(slots=True)
class Fault:
    """One kill or swap. Times on CLOCK_MONOTONIC in ns."""

    kind: str
    device: str
    pid: int  # of the old process
    begun_ns: int
    ended_ns: int | None = None  # a successor has answered the CPU; None: not known
    pause_ns: int | None = None


@dataclass(slots=True)
class Plan:
    """Of one thread: which device, and how long to wait first, in seconds."""

    kind: str
    steps: list[tuple[str, float]] = field(default_factory=list)

    @staticmethod
    def make(kind: str, count: int, devices: Sequence[str], apart_s: float, seed: int) -> Plan:
        """Waits are even between 0 and twice `apart_s`."""
        rng = random.Random(f"{kind} {seed}")
        return Plan(kind, [(rng.choice(devices), 2 * apart_s * rng.random()) for _ in range(count)])


class Faults:
    """Of one machine. `done` has what was done, `faults` what was wrong, in words."""

    def __init__(self, control: Path, machine: str, stop: threading.Event) -> None:
        self._control, self._machine, self._stop = control, machine, stop
        self.done: list[Fault] = []
        self.faults: list[str] = []
        self.refused = 0  # swaps, for a kill
        self.round_trips_ns: list[int] = []  # the CPU's median, each time that it was asked
        rows = ask(control, "ps", machine)["rows"]
        self._fork_server = next(row["pid"] for row in rows if row["node"] == "forkserver")
        self._ended: dict[tuple[str, int], int] = {}  # device, pid of the old process -> when it was replaced
        self._threads: list[threading.Thread] = []

    def start(self, plans: Sequence[Plan]) -> None:
        """Each in a thread; `running` says whether any has something left."""
        for plan in plans:
            act = {"kill": self._kill, "swap": self._swap}[plan.kind]
            thread = threading.Thread(target=self._follow, args=(plan, act), daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def gather(self) -> None:
        """Ask the launcher when killed processes were replaced."""
        try:
            rows: list[dict[str, Any]] = ask(self._control, "stats", self._machine, 60.0)["rows"]
        except NoAnswer as error:
            self.faults.append(str(error))
            self._stop.set()
            return
        for row in rows:
            for pid, at_ns in row.get("replaced") or ():
                self._ended[row["node"], pid] = at_ns
            counters = row.get("counters") or {}
            if row["node"].startswith("cpu") and counters.get("latency_p50_ns"):
                self.round_trips_ns.append(counters["latency_p50_ns"])

    def finish(self) -> None:
        """When all is done: what each kill cost."""
        for thread in self._threads:
            thread.join()
        self.gather()
        for fault in self.done:
            if fault.kind == "kill":
                fault.ended_ns = self._ended.get((fault.device, fault.pid))
                if fault.ended_ns is not None:
                    fault.pause_ns = fault.ended_ns - fault.begun_ns

    def _follow(self, plan: Plan, act: Callable[[str], bool]) -> None:
        try:
            for device, wait_s in plan.steps:
                if self._stop.wait(wait_s):
                    return
                deadline = time.monotonic() + REFUSED_S
                while not act(device) and not self._stop.wait(0.02):
                    if time.monotonic() > deadline:
                        self.faults.append(f"{plan.kind} of {device} was refused for {REFUSED_S:g} s")
                        self._stop.set()
        except Exception as error:
            self.faults.append(f"{plan.kind}: {type(error).__name__}: {error}")
            self._stop.set()

    def _kill(self, device: str) -> bool:
        pids = self._pids(device)
        if not pids:
            return False
        pid = random.choice(pids)
        now_ns = time.monotonic_ns()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.done.append(Fault("kill", device, pid, now_ns))
            return True
        return False

    def _swap(self, device: str) -> bool:
        now_ns = time.monotonic_ns()
        try:
            reply = ask(self._control, "swap", self._machine, 60.0, device=device, type=None, settings={})
        except NoAnswer as error:
            text = str(error)
            if not any(word in text for word in ("has ended", "ended, or took", "has no process")):
                self.faults.append(f"swap: {text}")
                self._stop.set()
            self.refused += 1
            return False
        end_ns = time.monotonic_ns()
        self.done.append(Fault("swap", device, reply["old"], now_ns, end_ns, reply["pause_ns"]))
        return True

    def _pids(self, device: str) -> list[int]:
        """Living processes with the device's name: one, or two during a swap."""
        title = f"backplane {self._machine}: {device}".encode()
        found = []
        for pid in self._children():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == title:
                    found.append(pid)
        return found

    def _children(self) -> list[int]:
        """Of the fork server."""
        server = self._fork_server
        return [int(word) for word in Path(f"/proc/{server}/task/{server}/children").read_text().split()]

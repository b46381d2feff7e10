"""What the users of a running machine ask its launcher for, over the control socket (launcher/control.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bus.endpoint import Endpoint
from bus.frames import Recording, Stats, StatsReply, Timing
from devices.rim import NODE as RIM
from launcher import recording, report
from launcher.control import ControlServer
from launcher.errors import EXIT_OK
from launcher.forkserver import ForkServer
from launcher.launch import MachineEnd
from launcher.names import CPU, MEMORY
from launcher.pausing import Ask, NotQuiet, Pausing
from launcher.processes import Processes
from launcher.spans import Span
from launcher.swapping import SwapRefused
from launcher.swaps import Swaps

if TYPE_CHECKING:
    from launcher.pump import Pump
    from launcher.snapshotting import Snapshots

STATS_NS = 300_000_000


class _PsRequest(msgspec.Struct):
    """Of `launcher ps`, or of `launcher stats`, which is shown all counters."""

    client: int
    op: str
    deadline_ns: int
    missing: set[str]
    counters: dict[str, dict[str, Any]] = {}


class Commands:
    """Of one supervisor: its loop waits on `descriptors` until `deadline_ns`, and calls `turn`."""

    def __init__(
        self,
        path: Path,
        processes: Processes,
        pausing: Pausing,
        endpoint: Endpoint,
        ask: Ask,
        forkserver: ForkServer,
        pump: Pump | None,
        leave: Callable[[], None],
    ) -> None:
        """`leave`: have all ready for another launcher; RuntimeError."""
        self._control = ControlServer(path)
        self._processes, self._pausing, self._endpoint, self._ask = processes, pausing, endpoint, ask
        self._forkserver, self._pump = forkserver, pump
        self._leave = leave
        self._ps_requests: list[_PsRequest] = []
        self._swaps = Swaps(processes)
        self._snapshot_begun_ns = 0
        self._snapshots: Snapshots | None = None  # made when the first is asked for

    def descriptors(self) -> list[int]:
        written = self._snapshots.descriptors() if self._snapshots is not None else []
        return [*self._control.descriptors(), *self._swaps.descriptors(), *written]

    def deadline_ns(self) -> int | None:
        """When somebody is answered who waits for others' answers, on CLOCK_MONOTONIC."""
        swaps_ns = self._swaps.deadline_ns()
        deadlines = [r.deadline_ns for r in self._ps_requests]
        return min([*deadlines, *([] if swaps_ns is None else [swaps_ns])], default=None)

    def turn(self, readable: set[int]) -> None:
        """Do what was asked for and answer what can be answered. MachineEnd for `down`."""
        for fd in readable.intersection(self._control.descriptors()):
            for client, request in self._control.readable(fd):
                self._obey(client, request)
        if self._snapshots is not None and readable.intersection(self._snapshots.descriptors()):
            self._snapshots.finish(self._processes.devices)
        self._swaps.turn()
        self._answer_ps()

    def take(self, node: str, reply: StatsReply) -> None:
        """A node's counters have come."""
        for request in self._ps_requests:
            request.counters[node] = reply.counters
            request.missing.discard(node)

    def close(self) -> None:
        self._swaps.close()
        if self._snapshots is not None:
            self._snapshots.close()
        self._control.close()

    def _obey(self, client: int, request: dict[str, Any]) -> None:
        match op := request["op"]:
            case "down":
                self._control.answer(client, {})
                raise MachineEnd(EXIT_OK, "ended by `launcher down`")
            case "pause" | "resume" | "swap" | "kill" | "leave" if self._busy:
                self._control.answer(client, {"error": "a snapshot is being written"})
            case "leave" if self._swaps.busy:
                self._control.answer(client, {"error": "a swap is under way"})
            case "leave":
                self._make_way(client, request)
            case "pause" | "resume":
                self._pause_or_resume(client, op == "pause")
            case "swap" | "kill":
                self._replace(client, op, request)
            case "snapshot":
                self._snapshot(client, request)
            case "trace":
                self._trace(client, request.get("on"))
            case "timing-on" | "timing-off":
                self._endpoint.send(CPU, Timing(op == "timing-on"))
                self._control.answer(client, {})
            case "ps" | "stats" | "metrics":
                asked = {node for node, process in self._processes.by_node.items() if process.ready}
                for node in asked:
                    self._endpoint.send(node, Stats())
                deadline_ns = time.monotonic_ns() + STATS_NS
                self._ps_requests.append(_PsRequest(client, op, deadline_ns, asked))

    def _trace(self, client: int, on: bool | None) -> None:
        launch = self._processes.launch
        if on is not None:
            recording.switch(launch, on)
            self._endpoint.send(CPU, Recording())
        meta = msgspec.to_builtins(recording.meta(launch))
        fds = list(recording.rings(launch).values())
        self._control.answer(client, {"meta": meta, "pid": os.getpid()}, fds)

    @property
    def _busy(self) -> bool:
        """With a snapshot."""
        return self._snapshots is not None and self._snapshots.busy

    def _make_way(self, client: int, request: dict[str, Any]) -> None:
        try:
            self._leave()
        except RuntimeError as e:
            self._control.answer(client, {"error": str(e)})
            return
        self._control.answer(client, {})
        end = MachineEnd(EXIT_OK, f"another launcher (pid {request.get('by')}) has taken over")
        end.left = True
        raise end

    def _pause_or_resume(self, client: int, pause: bool) -> None:
        try:
            (self._pausing.pause if pause else self._pausing.resume)(CPU, self._processes.devices)
        except NotQuiet as e:
            self._control.answer(client, {"error": str(e)})
        else:
            self._control.answer(client, {})

    def _replace(self, client: int, op: str, request: dict[str, Any]) -> None:
        node = str(request.get("device"))
        try:
            if op == "kill":
                self._control.answer(client, {"pid": self._processes.kill(node)})
            else:
                settings, folder = request.get("settings") or {}, str(request.get("folder") or "/")
                answer = self._control.answer_later(client)
                self._swaps.begin(node, request.get("type"), settings, folder, answer)
        except SwapRefused as e:
            self._control.answer(client, {"error": str(e), "status": e.exit_status})

    def _snapshot(self, client: int, request: dict[str, Any]) -> None:
        if self._snapshots is None:
            from launcher.snapshotting import Snapshots  # takes its time to import

            processes = self._processes
            self._snapshots = Snapshots(
                lambda: processes.launch, self._pausing, self._ask, self._answer_snapshot
            )
        if self._snapshots.busy:
            self._control.answer(client, {"error": "a snapshot is being written already"})
        elif self._swaps.busy:
            self._control.answer(client, {"error": "a swap is under way"})
        else:
            self._snapshot_begun_ns = time.monotonic_ns()
            self._snapshots.begin(client, request, self._processes.devices)

    def _answer_snapshot(self, client: int, reply: dict[str, Any]) -> None:
        self._control.answer(client, reply)
        attributes = {name: value for name, value in reply.items() if name in ("size", "stood_ns")}
        now_ns, error = time.monotonic_ns(), str(reply.get("error", ""))
        self._processes.spans.emit(Span("snapshot", self._snapshot_begun_ns, now_ns, attributes, error))

    def _answer_ps(self) -> None:
        for request in list(self._ps_requests):
            if not request.missing or time.monotonic_ns() >= request.deadline_ns:
                self._ps_requests.remove(request)
                rows = list(self._ps_rows(request))
                if request.op == "metrics":
                    from launcher import metrics  # seldom asked for

                    text = metrics.text(self._processes.launch.machine, rows)
                    self._control.answer(request.client, {"text": text})
                else:
                    self._control.answer(request.client, {"rows": rows})

    def _ps_rows(self, request: _PsRequest) -> Iterator[dict[str, Any]]:
        yield report.ps_row("launcher", os.getpid(), self._endpoint.stats())
        yield report.ps_row("forkserver", self._forkserver.pid, None)
        if self._pump is not None:
            yield report.ps_row("console", self._pump.pid, None)
        for node, process in self._processes.by_node.items():
            row = report.ps_row(node, process.child.pid, request.counters.get(node))
            row |= {"restarts": process.restarts.count, "swaps": process.swaps}
            if process.restarts.due_s is not None:
                row["state"] = process.restarts.state(time.monotonic())
            elif not process.ready:
                row["state"] = "starting"
            elif node in request.missing:
                row["state"] += ", silent"
            elif self._pausing.paused and node not in (MEMORY, RIM):
                row["state"] = "paused"
            if request.op != "ps":
                row["counters"] = request.counters.get(node, {})
                row["replaced"] = list(process.replaced)
            yield row

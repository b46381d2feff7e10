"""Swaps that users have asked for, while the launcher does other things.

A new process takes its time until it stands by, and the CPU may not come to it before other devices go on
that have ended meanwhile and are the launcher's to restart. So nothing waits for either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from launcher.errors import EXIT_DIED
from launcher.forkserver import ChildSpec
from launcher.processes import SECOND_NS, Processes
from launcher.spans import Span
from launcher.swapping import CONNECTED_S, Standby, Swapped, SwapRefused

Answer = Callable[[dict[str, Any]], None]


class _Swap(msgspec.Struct):
    """One under way. `done`: all but the CPU's connection."""

    standby: Standby
    new: ChildSpec
    old_pid: int
    answer: Answer
    done: Swapped | None = None
    begun_ns: int = 0
    deadline_ns: int = 0  # for the CPU, on CLOCK_MONOTONIC


class Swaps:
    """Of one machine, one for a node at a time. The loop waits on `descriptors` until `deadline_ns`
    and calls `turn`."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._swaps: dict[str, _Swap] = {}

    @property
    def busy(self) -> bool:
        """Some new process may take over at any time."""
        return any(swap.done is None for swap in self._swaps.values())

    def descriptors(self) -> list[int]:
        return [fd for s in self._swaps.values() if s.done is None for fd in s.standby.descriptors()]

    def deadline_ns(self) -> int | None:
        swaps = self._swaps.values()
        ends = (s.standby.deadline_ns() if s.done is None else s.deadline_ns for s in swaps)
        return min(ends, default=None)

    def begin(
        self, node: str, with_type: str | None, settings: dict[str, Any], folder: str, answer: Answer
    ) -> None:
        """SwapRefused at once, or `answer` later."""
        if node in self._swaps:
            raise SwapRefused(f"{node}: another swap of it is under way", EXIT_DIED)
        standby, new = self._processes.stand_by(node, with_type, settings, folder)
        old = self._processes.by_node[node].child
        self._swaps[node] = _Swap(standby, new, old.pid, answer, begun_ns=time.monotonic_ns())

    def turn(self) -> None:
        """Go on where it is possible, and answer."""
        for node, swap in list(self._swaps.items()):
            try:
                if swap.done is None and swap.standby.stands_by():
                    swap.old_pid = self._processes.by_node[node].child.pid
                    swap.done = self._processes.replace(swap.standby, swap.new)
                    swap.deadline_ns = time.monotonic_ns() + int(CONNECTED_S * SECOND_NS)
                if swap.done is not None and (reply := self._reply(node, swap, swap.done)) is not None:
                    del self._swaps[node]
                    swap.answer(reply)
                    self._tell(node, swap, swap.done, reply)
            except SwapRefused as e:
                del self._swaps[node]
                span = Span("swap", swap.begun_ns, time.monotonic_ns(), {"device": node}, str(e))
                self._processes.spans.emit(span)
                swap.answer({"error": str(e), "status": e.exit_status})

    def close(self) -> None:
        """End what stands by."""
        for swap in self._swaps.values():
            if swap.done is None:
                swap.standby.close()
        self._swaps.clear()

    def _tell(self, node: str, swap: _Swap, done: Swapped, reply: dict[str, Any]) -> None:
        """As a span, with the parts of the pause in it."""
        attributes: dict[str, str | int | bool] = {
            "device": node, "pid.old": reply["old"], "pid.new": reply["new"], "type": str(reply["type"]),
        }  # fmt: skip
        if reply["pause_ns"] is not None:
            attributes["pause_ns"] = reply["pause_ns"]
        children = [Span("the new one gets ready", swap.begun_ns, done.retired_ns)]
        at_ns = done.retired_ns
        for name, ns in reply["parts_ns"].items():
            children.append(Span(name, at_ns, at_ns + ns))
            at_ns += ns
        self._processes.spans.emit(Span("swap", swap.begun_ns, at_ns, attributes, "", children))

    def _reply(self, node: str, swap: _Swap, done: Swapped) -> dict[str, Any] | None:
        """What was done; None while the CPU is awaited."""
        connected = dict(self._processes.by_node[node].replaced).get(swap.old_pid)
        if connected is not None:
            done = done.connected(connected)
        elif done.pause_ns is None and time.monotonic_ns() < swap.deadline_ns:
            return None
        return {"type": swap.new.config.get("type"), "old": swap.old_pid, "new": done.child.pid,
                "pause_ns": done.pause_ns, "parts_ns": done.parts_ns}  # fmt: skip

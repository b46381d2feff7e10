"""Pause and resume: everything that moves stands still, and goes on as if no time had passed.

The CPU first, then the devices; then all are asked until every frame that was sent has arrived, so that an
interrupt on its way is in the state of whoever takes it. What each answers is where its clock stands; all go
on from the latest of these (docs/decisions/055-the-machines-time.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bus.frames import Continue, ContinueReply, Frame, Pause, PauseReply

DRAIN_S = 5.0  # for frames under way, once nobody makes new ones

Ask = Callable[[str, Frame], Frame]  # node, request; RuntimeError without an answer
AskAll = Callable[[Sequence[str], Frame], list[Frame]]  # several nodes, which answer side by side


class NotQuiet(RuntimeError):
    """A node gave no answer, or frames did not arrive."""


class Pausing:
    """Of one machine. `clock_ns`: where its clock stands; None while it runs."""

    def __init__(self, ask_all: AskAll, host_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._ask_all = ask_all
        self._host_ns = host_ns
        self.offset_ns = 0  # of the clock, while it runs
        self.clock_ns: int | None = None

    @property
    def paused(self) -> bool:
        return self.clock_ns is not None

    def begin_paused(self, clock_ns: int) -> None:
        """The nodes are started standing, at this time."""
        self.clock_ns = clock_ns

    def take_over(self, offset_ns: int, clock_ns: int | None) -> None:
        """The nodes run, or stand, already: as an earlier launcher's `offset_ns` and `clock_ns` say."""
        self.offset_ns, self.clock_ns = offset_ns, clock_ns

    def node_config(self) -> dict[str, int | None]:
        """What a node that starts now is told of the clock."""
        return {"clock_offset_ns": self.offset_ns, "clock_stopped_ns": self.clock_ns}

    def pause(self, cpu: str, devices: list[str]) -> None:
        """Returns when nothing moves. Raises NotQuiet; then whatever stands already goes on."""
        if self.paused:
            return
        try:
            replies = self._until_quiet(cpu, devices)
        except RuntimeError as error:
            self._undo([*devices, cpu])
            raise NotQuiet(f"not paused: {error}") from error
        self.clock_ns = max(reply.clock_ns for reply in replies.values())

    def resume(self, cpu: str, devices: list[str]) -> None:
        """The devices first, so that the CPU finds their clocks running. Raises NotQuiet."""
        if self.clock_ns is None:
            return
        go_on = Continue(self.clock_ns, self._host_ns())
        for nodes in (devices, [cpu]):
            try:
                replies = self._ask_all(nodes, go_on)
            except RuntimeError as error:
                raise NotQuiet(f"not resumed: {error}") from error
            for node, reply in zip(nodes, replies, strict=True):
                if not isinstance(reply, ContinueReply):
                    raise NotQuiet(f"not resumed: {node} answered Continue with {reply}")
        self.offset_ns, self.clock_ns = go_on.clock_ns - go_on.host_ns, None

    def _until_quiet(self, cpu: str, devices: list[str]) -> dict[str, PauseReply]:
        deadline_ns = self._host_ns() + int(DRAIN_S * 1e9)
        while True:
            replies = self._stop([cpu]) | self._stop(devices)
            waiting = under_way({node: reply.frames for node, reply in replies.items()})
            if not waiting:
                return replies
            if self._host_ns() > deadline_ns:
                raise NotQuiet(f"after {DRAIN_S:g} s frames are under way: {', '.join(waiting)}")

    def _stop(self, nodes: list[str]) -> dict[str, PauseReply]:
        replies = {}
        for node, reply in zip(nodes, self._ask_all(nodes, Pause()), strict=True):
            if not isinstance(reply, PauseReply):
                raise NotQuiet(f"{node} answered Pause with {reply}")
            replies[node] = reply
        return replies

    def _undo(self, nodes: list[str]) -> None:
        """No time is lost: the host's has gone on, and the clock with it."""
        now_ns = self._host_ns()
        for node in nodes:
            try:
                self._ask_all([node], Continue(now_ns + self.offset_ns, now_ns))
            except RuntimeError:  # one that runs refuses; one that is gone is somebody else's matter
                continue


def under_way(frames: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Connections on which what one end has sent and the other taken differ. `frames`: by node, as it says.

    Those with others are left out: the launcher's questions are no part of the machine.
    """
    ends: dict[str, dict[bool, tuple[int, int]]] = {}
    for node, positions in frames.items():
        for connection, (sent, taken) in positions.items():
            who, _, whom = connection.partition(">")
            if who.removesuffix(".io") in frames and whom in frames:
                ends.setdefault(connection, {})[whom != node] = (sent, taken)
    nothing = (0, 0)
    return sorted(connection for connection, end in ends.items()
                  if end.get(True, nothing) != end.get(False, nothing)[::-1])

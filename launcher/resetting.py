"""The RESET pin: the CPU stops, the devices begin anew, memory is as at the start, the CPU goes on.

A guest runs on for a while after it has pulled the pin, and may pull it again before the CPU stops: what was
asked for until all stood has been done then.
"""

from __future__ import annotations

import time
from typing import Any

from bus.endpoint import Endpoint
from bus.frames import Frame, Reset, ResetReply, Save, SaveReply
from launcher.memory import load_images
from launcher.names import CPU
from launcher.processes import Processes

ANSWER_NS = 5_000_000_000


class Resetting:
    """Of one supervisor."""

    def __init__(self, processes: Processes, endpoint: Endpoint) -> None:
        self._processes, self._endpoint = processes, endpoint
        self._stood_ns = 0

    def is_done(self, asked_ns: int) -> bool:
        """Whether a reset that was asked for then (CLOCK_MONOTONIC) has been done."""
        return asked_ns < self._stood_ns

    def reset(self) -> None:
        """RuntimeError: it can't be done."""
        launch = self._processes.launch
        self._request(CPU, Reset())  # with no registers to start from: stay in reset
        for node in self._processes.devices:
            self._request(node, Reset())
        self._stood_ns = time.monotonic_ns()
        load_images(launch.memory, launch.images)
        self._request(CPU, Reset(dict(launch.start)))

    def cpu_state(self) -> dict[str, Any]:
        """For people to look at."""
        try:
            reply = self._endpoint.request(CPU, Save(), ANSWER_NS)
        except RuntimeError as e:
            return {"unknown": str(e)}
        return reply.state["cpu"] if isinstance(reply, SaveReply) else {"unknown": repr(reply)}

    def _request(self, node: str, frame: Reset) -> None:
        reply: Frame = self._endpoint.request(node, frame, ANSWER_NS)
        if not isinstance(reply, ResetReply):
            raise RuntimeError(f"{node} answered Reset with {reply}")

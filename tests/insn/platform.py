"""What the guest's CPU sits on in the instruction tests: no devices, no interrupts; HLT ends the run."""

from __future__ import annotations

import time
from typing import Any

from cpu_node.engine import Engine


class RunnerPlatform:
    """Implements cpu_node.platform.Platform."""

    intr = False

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def port_read(self, port: int, width: int) -> int:
        return (1 << 8 * width) - 1

    def port_write(self, port: int, width: int, value: int) -> None:
        pass

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        return b"\xff" * width * count

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        pass

    def mmio_read(self, pa: int, width: int) -> int:
        raise AssertionError(f"read of {pa:#x}, which is no RAM")

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        raise AssertionError(f"write to {pa:#x}, which is no RAM")

    def int_ack(self) -> int | None:
        return None

    def eoi(self, vector: int) -> None:
        pass

    def poll(self) -> None:
        pass

    def idle(self, deadline_ns: int | None) -> None:
        assert self.engine is not None
        self.engine.stopping = True

    def set_alarm(self, deadline_ns: int | None) -> None:
        pass

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def rdtsc(self) -> int:
        return time.monotonic_ns()

    def report(self, kind: str, text: str, data: dict[str, Any]) -> None:
        pass

"""What the CPU needs of the machine around it; node.py implements it over the bus, tests in memory."""

from __future__ import annotations

from typing import Any, Protocol


class Platform(Protocol):
    """Ports, memory-mapped registers, interrupts and time. All calls come from the CPU's thread."""

    intr: bool  # level of the 8259's INT pin, or of LINT0 in virtual-wire mode

    def port_read(self, port: int, width: int) -> int: ...
    def port_write(self, port: int, width: int, value: int) -> None: ...
    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        """`count` reads of one port, in order."""

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        """Write `data` to one port, `width` bytes at a time."""

    def mmio_read(self, pa: int, width: int) -> int: ...
    def mmio_write(self, pa: int, width: int, value: int) -> None: ...

    def int_ack(self) -> int | None:
        """The INTA cycles: the vector, None when the 8259's INT is low by now."""

    def eoi(self, vector: int) -> None:
        """A level-triggered interrupt ended: broadcast to the I/O APICs."""

    def poll(self) -> None:
        """Take in what arrived since the last call (a signal said that something did)."""

    def idle(self, deadline_ns: int | None) -> None:
        """Wait for something to arrive, until `deadline_ns` at most."""

    def set_alarm(self, deadline_ns: int | None) -> None:
        """SIGALRM for this thread at `deadline_ns`."""

    def now_ns(self) -> int: ...

    def rdtsc(self) -> int: ...

    def report(self, kind: str, text: str, data: dict[str, Any]) -> None:
        """Tell the launcher."""

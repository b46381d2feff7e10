"""Before a process takes over a device: does its class fit the machine that runs, and the state that there
is?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from devices.base import ApicMessage, Device, StateMismatch

DECLARED = ("PORTS", "MMIO", "IRQS", "CHANNELS", "DMA", "DISKS", "CONTROLLER")


def shape(cls: type[Device[Any]]) -> dict[str, str]:
    """What a class declares and a running machine was built upon."""
    return {name: repr(getattr(cls, name)) for name in DECLARED}


def try_out(
    type_name: str, cls: type[Device[Any]], settings: Any, machine_has: dict[str, str], state: Any
) -> None:
    """Raises StateMismatch, and whatever the class raises. `state`: a saved record, None if there is none."""
    here = shape(cls)
    for name, there in machine_has.items():
        if here[name] != there:
            raise StateMismatch(f"{type_name} declares other {name} than the machine was started with")
    device = cls(Nowhere(), settings)
    device.reset()
    if state is not None:
        device.load(state)


class Nowhere:
    """A Wiring that leads nowhere."""

    def set_irq(self, line: str, level: bool) -> None:
        pass

    def send(self, channel: str, data: bytes) -> None:
        pass

    def now_ns(self) -> int:
        return 0

    def set_timer(self, name: str, deadline_ns: int | None) -> None:
        pass

    def mark(self, name: str, value: int) -> None:
        pass

    def event(self, kind: str, text: str) -> None:
        pass

    def intr(self, level: bool) -> None:
        pass

    def apic_message(self, message: ApicMessage) -> None:
        pass

    def line_level(self, irq: int) -> bool:
        return False

    def dma_read(self, pa: int, size: int) -> bytes:
        return bytes(size)

    def dma_write(self, pa: int, data: bytes) -> None:
        pass

    def disk_read(self, disk: str, tag: int, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        pass

    def disk_write(self, disk: str, tag: int, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        pass

    def disk_flush(self, disk: str, tag: int) -> None:
        pass

    def disk_size(self, disk: str) -> int:
        return 0

"""Watchdog card: unless port 0 is written again in time, the line goes high or the machine is reset.

Reference: none, it is this file. Left out: a read of the time that is left.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from devices.base import Device, DeviceState, MirrorValue, PortRange


@dataclass(frozen=True, slots=True)
class WatchdogSettings:  # what machine.toml may say under settings = { ... }
    action: Literal["irq", "reset"] = "irq"


@dataclass(slots=True)
class WatchdogState(DeviceState):  # all that the guest can tell; survives a swap
    VERSION: ClassVar[int] = 1
    deadline_ns: int = 0  # 0: not armed
    barked: bool = False


class Watchdog(Device[WatchdogState]):
    NAME = "watchdog"
    PORTS = (PortRange("regs", length=2, posted=frozenset({0}), mirrored=frozenset({1})),)
    IRQS = ("bark",)
    SETTINGS = WatchdogSettings
    STATE = WatchdogState

    def reset(self) -> None:
        self.state = WatchdogState()
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        return int(self.state.barked) if offset == 1 else 0xFF  # port 0 is write-only

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        if offset == 0:  # seconds from now; 0 disarms; both end the barking
            self.state.deadline_ns = self.wiring.now_ns() + value * 1_000_000_000 if value else 0
            self.state.barked = False
        self.drive_lines()

    def timer(self, name: str) -> None:
        self.state.deadline_ns, self.state.barked = 0, True
        if self.settings.action == "reset":
            self.wiring.event("reset", "watchdog")
        self.drive_lines()

    def drive_lines(self) -> None:  # outputs are functions of the state
        self.wiring.set_irq("bark", self.state.barked)
        self.wiring.set_timer("deadline", self.state.deadline_ns or None)

    def mirror(self) -> dict[tuple[str, int], MirrorValue]:
        return {("regs", 1): int(self.state.barked)}

"""POST code port and debug console.

Reference: IBM PC/AT Technical Reference, 1984, "I/O address map"; Bochs user manual, "port_e9_hack".
Port 0x80 is a page register of the PC/AT's DMA block, otherwise unused, so that firmware writes its progress
codes there and Linux its delays. Port 0xE9: each byte written is a character, reading gives 0xE9.
Left out: the DMA controllers and the other page registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from devices.base import Channel, Device, DeviceState, MirrorValue, PortRange

DEBUG_PRESENT = 0xE9
ALL = frozenset({0})


@dataclass(frozen=True, slots=True)
class PostCodeSettings:
    backend: Literal["console", "log", "null"] = "log"


@dataclass(slots=True)
class PostCodeState(DeviceState):
    VERSION: ClassVar[int] = 1
    code: int = 0


class PostCode(Device[PostCodeState]):
    NAME = "postcode"
    PORTS = (
        PortRange("post", length=1, posted=ALL, mirrored=ALL, names={0: "POST"}),
        PortRange("debug", length=1, posted=ALL, mirrored=ALL, relaxed=ALL, names={0: "DEBUG"}),
    )
    CHANNELS = (Channel("debug"),)
    SETTINGS = PostCodeSettings
    STATE = PostCodeState

    def reset(self) -> None:
        self.state = PostCodeState()

    def read(self, region: str, offset: int, width: int) -> int:
        return self.state.code if region == "post" else DEBUG_PRESENT

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        if region == "post":
            self.state.code = value
        else:
            self.wiring.send("debug", bytes([value]))

    def drive_lines(self) -> None:
        pass  # it has none

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        return {("post", 0): self.state.code, ("debug", 0): DEBUG_PRESENT}

"""A device on a FakeWiring, for the data-sheet tests."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from devices.base import Device
from devices.fake import FakeWiring
from devices.registry import make_settings

START_NS = 1_000_000_000_000
D = TypeVar("D", bound=Device[Any])


class Rig(Generic[D]):
    """`r` and `w` access `region` by offset, one byte wide unless told otherwise."""

    def __init__(self, cls: type[D], region: str, width: int = 1, **settings: Any) -> None:
        self.wiring = FakeWiring(START_NS)
        self.device = cls(self.wiring, make_settings(cls, settings))
        self.device.reset()
        self.region = region
        self.width = width

    def r(self, offset: int, region: str | None = None, width: int | None = None) -> int:
        return self.device.read(region or self.region, offset, width or self.width)

    def w(self, offset: int, value: int, region: str | None = None, width: int | None = None) -> None:
        self.device.write(region or self.region, offset, width or self.width, value)

    def advance(self, ns: int) -> None:
        self.wiring.advance(self.device, ns)

    def edges(self, line: str) -> int:
        """Rising edges of a line since the last call."""
        count = self.wiring.changes.count((line, True))
        self.wiring.changes.clear()
        return count

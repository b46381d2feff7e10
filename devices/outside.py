"""Where a device's effects go, and those of them that a slot may still change before they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from bus.frames import ApicMessage, Event, Frame, Intr, Line

if TYPE_CHECKING:
    from devices.slot import Slot


class Outside(Protocol):
    """Where a device's effects go."""

    def to_controllers(self, frame: Line) -> None: ...

    def to_boot_cpu(self, frame: Intr) -> None: ...

    def to_cpus(self, frame: ApicMessage) -> None: ...

    def to_launcher(self, frame: Event) -> None: ...

    def output(self, channel: str, data: bytes) -> None: ...

    def begin(self, source: str, number: int) -> bool:
        """A step about this input begins; False if it is to be set aside, too many processes ended in it."""

    def commit(self, slot: Slot, effects: Sequence[Callable[[], None]], answer: Frame | None) -> None:
        """A step ends. Each effect calls one of the functions above; none may be seen yet."""

    def put_off(self) -> bool:
        """A step ends that is about a frame and has no effects: whether it may be committed with a later one.
        If so, and the process ends before that, the frame comes again."""

    def dma_written(self, count: int) -> None:
        """So many of the DMA writes of the step are done."""

    def perform(self) -> None:
        """Let the effects of the step be seen."""


class Immediately:
    """The end of a step for an Outside that need not survive: a test's."""

    _effects: Sequence[Callable[[], None]] = ()

    def begin(self, source: str, number: int) -> bool:
        return True

    def commit(self, slot: Slot, effects: Sequence[Callable[[], None]], answer: Frame | None) -> None:
        self._effects = effects

    def put_off(self) -> bool:
        return False

    def dma_written(self, count: int) -> None:
        pass

    def perform(self) -> None:
        effects, self._effects = self._effects, ()
        for effect in effects:
            effect()


class InputLines(msgspec.Struct):
    """Input lines of a controller: who drives each high; the level is the OR of them."""

    drivers: dict[int, set[str]]

    def change(self, frame: Line) -> bool | None:
        """The line's new level, None if it stays as it was."""
        drivers = self.drivers.setdefault(frame.irq, set())
        before = bool(drivers)
        (drivers.add if frame.level else drivers.discard)(frame.source)
        return bool(drivers) if bool(drivers) != before else None

    def to_plain(self) -> list[list[Any]]:
        return [[irq, sorted(sources)] for irq, sources in sorted(self.drivers.items()) if sources]

    @classmethod
    def from_plain(cls, plain: Any) -> InputLines:
        return cls({irq: set(sources) for irq, sources in plain})


class OutputEffect(msgspec.Struct):
    """An effect: bytes for the host side."""

    outside: Outside
    channel: str
    data: bytearray

    def __call__(self) -> None:
        self.outside.output(self.channel, bytes(self.data))


class LevelEffect(msgspec.Struct):
    """An effect: a new level of one of the device's own lines."""

    outside: Outside
    frame: Line

    def __call__(self) -> None:
        self.outside.to_controllers(self.frame)

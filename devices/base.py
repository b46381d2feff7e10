"""The contract that every peripheral implements.

A Device is pure logic: it owns no socket, thread, file or clock. The process that hosts it
(devices/host.py) hands it a Wiring and its settings and calls the methods below, one at a time.
All that it is, is in `state`; lines, timers and the mirror are functions of the state, so a swap
cannot forget them. A call of the host is a step: what the device does to the outside in it, DMA and disk I/O
included, is collected and done when the call has returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from bus.frames import ApicMessage
from bus.mirror import Counter, Latch, MirrorValue, Step
from bus.ranges import BadRange, IoRange, MmioRange, PortRange

__all__ = [
    "ApicMessage",
    "BadDma",
    "BadRange",
    "Channel",
    "Counter",
    "Device",
    "DeviceState",
    "Disk",
    "IoRange",
    "Latch",
    "MirrorValue",
    "MmioRange",
    "NoSettings",
    "PortRange",
    "StateMismatch",
    "Step",
    "Wiring",
]


class Channel(msgspec.Struct, frozen=True):
    """A byte stream between a device and its host side.

    `sends` is the channel name for Wiring.send, `receives` the one handed to Device.receive ("" if nothing
    comes back), `setting` the SETTINGS field (a str) that picks the back end: "console", "log" or "null".
    """

    sends: str
    receives: str = ""
    setting: str = "backend"


class Disk(msgspec.Struct, frozen=True):
    """A file or block device of the host's that a device reads and writes in place.

    `setting` names the SETTINGS field with its path (str), `read_only` the one that forbids writes (bool).
    """

    name: str
    setting: str = "file"
    read_only: str = "read_only"


class BadDma(ValueError):
    """A device asks for memory that is not there."""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """SETTINGS of a device that has none."""


class Wiring(Protocol):
    """What a device may do to the outside world."""

    def set_irq(self, line: str, level: bool) -> None:
        """Drive one of the device's own IRQS lines; saying the same level again costs nothing."""

    def send(self, channel: str, data: bytes) -> None:
        """Bytes out to the host side of one of CHANNELS."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC, the same for all processes of the machine."""

    def set_timer(self, name: str, deadline_ns: int | None) -> None:
        """Call Device.timer(name) once when now_ns() has reached the deadline; None cancels it."""

    def event(self, kind: str, text: str) -> None:
        """Tell the launcher: "poweroff", "reset", "log"; text is one line."""

    def intr(self, level: bool) -> None:
        """8259 only: drive the INT pin of the boot processor."""

    def apic_message(self, message: ApicMessage) -> None:
        """I/O APIC only: put a message on the APIC bus."""

    def line_level(self, irq: int) -> bool:
        """Controllers only: the present level of an input line, the OR of all devices that drive it."""

    def mark(self, name: str, value: int) -> None:
        """Note a number in the trace, as a part of this step; nothing else happens. See docs/tracing.md."""

    def dma_read(self, pa: int, size: int) -> bytes:
        """Guest memory as it is now, without this step's own dma_writes; BadDma outside of RAM."""

    def dma_write(self, pa: int, data: bytes) -> None:
        """Write guest memory after the step, before its lines and its answer; BadDma (now) outside of RAM."""

    def disk_read(self, disk: str, tag: int, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        """Bytes from `offset` of one of DISKS into guest memory, (pa, size) after (pa, size).

        After the step's lines and answer. Then disk_done(disk, tag, error) is called, as a step of its own,
        before any other step; requests are done in the order in which they were asked for. BadDma (now)
        outside of RAM; what goes wrong on the disk is the `error` of disk_done.
        """

    def disk_write(self, disk: str, tag: int, offset: int, segments: Sequence[tuple[int, int]]) -> None:
        """As disk_read, from guest memory to the disk, of which the host may keep it in a cache for now."""

    def disk_flush(self, disk: str, tag: int) -> None:
        """As disk_read; it is done when all that was written before is on stable storage (fdatasync)."""

    def disk_size(self, disk: str) -> int:
        """Bytes; a multiple of 512."""


class StateMismatch(ValueError):
    """A saved state does not fit the class that should load it."""


@dataclass(slots=True)
class DeviceState:
    """Guest-visible state. Ints, bools, strings, bytes, lists of them, and nested dataclasses of the same."""

    VERSION: ClassVar[int] = 1

    def dump(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "version": self.VERSION, "fields": asdict(self)}


S = TypeVar("S", bound=DeviceState)


class Device(ABC, Generic[S]):
    NAME: ClassVar[str]
    PORTS: ClassVar[tuple[PortRange, ...]] = ()
    MMIO: ClassVar[tuple[MmioRange, ...]] = ()  # region names are unique over PORTS and MMIO together
    IRQS: ClassVar[tuple[str, ...]] = ()
    CHANNELS: ClassVar[tuple[Channel, ...]] = ()
    SETTINGS: ClassVar[type] = NoSettings  # a dataclass; the machine file's settings are checked against it
    DMA: ClassVar[bool] = False  # reads and writes guest memory
    DISKS: ClassVar[tuple[Disk, ...]] = ()  # needs DMA
    CONTROLLER: ClassVar[bool] = False  # gets every device's Line frames through line_in
    STATE: ClassVar[type[DeviceState]]
    UPGRADES: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    state: S

    def __init__(self, wiring: Wiring, settings: Any) -> None:
        """`settings` is an instance of SETTINGS. The host calls reset() before anything else."""
        self.wiring = wiring
        self.settings = settings

    @abstractmethod
    def reset(self) -> None:
        """Power-on and the RESET pin: what the data sheet says reset changes, nothing more.

        A controller keeps the levels of its input lines: they belong to the devices that drive them.
        """

    @abstractmethod
    def read(self, region: str, offset: int, width: int) -> int:
        """`width` is one of the region's widths, `offset` naturally aligned and inside the region."""

    @abstractmethod
    def write(self, region: str, offset: int, width: int, value: int) -> None:
        """As read; `value` fits into `width` bytes."""

    @abstractmethod
    def drive_lines(self) -> None:
        """Recompute every output line and every timer from `state`.

        Called after load, and by the device itself after each change.
        """

    def receive(self, channel: str, data: bytes) -> None:
        """Bytes from the host side; never more than room(channel) said."""
        raise NotImplementedError(f"{self.NAME} has no input channel {channel!r}")

    def room(self, channel: str) -> int:
        """How many bytes receive() can take now without losing any.

        The host keeps the rest and asks again after each access.
        """
        return 0

    def timer(self, name: str) -> None:
        """A deadline set with Wiring.set_timer has come; it is no longer set."""
        raise NotImplementedError(f"{self.NAME} has no timer {name!r}")

    def disk_done(self, disk: str, tag: int, error: str) -> None:
        """A disk_read, disk_write or disk_flush with this tag is done; `error` is "" or one line."""
        raise NotImplementedError(f"{self.NAME} has no disk {disk!r}")

    def line_in(self, irq: int, level: bool) -> None:
        """Controllers: an input line changed (ISA IRQ number, level after the OR of its drivers)."""
        raise NotImplementedError(f"{self.NAME} is no interrupt controller")

    def int_ack(self) -> int:
        """8259: the INTA cycles; returns the vector. Called only while the INT pin is driven high."""
        raise NotImplementedError(f"{self.NAME} answers no INTA")

    def eoi(self, vector: int) -> None:
        """I/O APIC: the end of a level-triggered interrupt."""
        raise NotImplementedError(f"{self.NAME} takes no EOI")

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        """What the mirror page shows, by (region, offset), derived from `state`; asked after every operation.

        A byte value for one register, or a Counter or Step that starts at this offset. A declared register
        that is missing here is read synchronously until it is back: leave one out while reading it would
        have a side effect.
        """
        return {}

    def seen(self, region: str, offset: int, value: int) -> None:
        """The guest has read `value` from the Latch that mirror() showed, set, at this offset: clear it.

        In order with posted writes. The guest has read it by now, whatever has happened since.
        """
        raise NotImplementedError(f"{self.NAME} has no latch")

    def save(self) -> dict[str, Any]:
        return self.state.dump()

    def load(self, saved: dict[str, Any]) -> None:
        """Replace the state with a saved one, upgrading old versions first."""
        cls = self.STATE
        try:
            kind, version, values = saved["kind"], saved["version"], saved["fields"]
        except (KeyError, TypeError) as error:
            raise StateMismatch(f"{self.NAME}: saved state {saved!r} is no state record") from error
        while version in self.UPGRADES and version < cls.VERSION:
            values, version = self.UPGRADES[version](values), version + 1
        if kind != cls.__name__ or version != cls.VERSION:
            raise StateMismatch(f"{self.NAME}: saved state {kind} version {version} is not "
                                f"{cls.__name__} version {cls.VERSION}, and there is no upgrade")  # fmt: skip
        self.state = _fit(cls, values, self.NAME)
        self.drive_lines()


def _fit(cls: type[Any], values: Any, device: str) -> Any:
    """Plain data -> an instance of the dataclass `cls`, field for field and type for type."""
    try:
        state = msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise StateMismatch(f"{device}: saved state does not fit {cls.__name__}: {error}") from error
    stray = _stray_keys(state, values)
    if stray:
        raise StateMismatch(f"{device}: saved state does not fit {cls.__name__}: fields {sorted(stray)}")
    return state


def _stray_keys(state: Any, values: Any) -> set[str]:
    """Keys missing from or unknown in `values`: msgspec fills in the first and ignores the second."""
    if is_dataclass(state):
        names = {f.name for f in fields(state)}
        stray = names ^ set(values)
        for name in names & set(values):
            stray |= _stray_keys(getattr(state, name), values[name])
        return stray
    if isinstance(state, list | tuple):
        return set().union(*(_stray_keys(a, b) for a, b in zip(state, values, strict=True)))
    return set()

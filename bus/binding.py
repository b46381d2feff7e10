"""From an address and a width to a function that does the access.

An access is bound once; from then on it is one dictionary lookup and one call. What a device does not
take whole is split in halves, low half first, down to single bytes; bytes that nobody answers are open bus:
reads give all ones, writes vanish, both are reported. One access that nobody answers at all is one report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from bus.addressmap import AddressMap, Entry
from bus.asking import LatchState, Target
from bus.frames import Read, ReadReply, Write, WriteReply
from bus.mirror import SLOT_BYTE, SLOT_FORMULA, Latch, MirrorReader, page_of
from bus.ranges import Space

OnOpenBus = Callable[[Space, int, int, bool, int], None]  # space, address, width, is_write, value
Reader = Callable[[], int]
Writer = Callable[[int], None]
F = TypeVar("F")


class Bindings(dict[int, F]):
    """`address << 3 | width` -> what does the access; made when first used.

    `bind` also says whether to keep it: the ports that nobody owns are few, the memory isn't.
    """

    def __init__(self, bind: Callable[[int, int], tuple[F, bool]]) -> None:
        super().__init__()
        self._bind = bind

    def __missing__(self, key: int) -> F:
        access, keep = self._bind(key >> 3, key & 7)
        if keep:
            self[key] = access
        return access


class Binder:
    """Makes the functions for one IoClient."""

    def __init__(
        self,
        address_map: AddressMap,
        targets: Mapping[str, Target],
        mirror: memoryview | None,
        now_ns: Callable[[], int],
        on_open_bus: OnOpenBus,
    ) -> None:
        self._map = address_map
        self._targets = targets
        self._now_ns = now_ns
        self._on_open_bus = on_open_bus
        self._mirrors: dict[int, MirrorReader] = {}
        if mirror is not None:
            entries = [*address_map.entries("port"), *address_map.entries("mmio")]
            pages = {e.mirror_page for e in entries if e.mirror_page is not None}
            self._mirrors = {page: MirrorReader(page_of(mirror, page)) for page in pages}

    def reader(self, space: Space, address: int, width: int) -> Reader:
        entry = self._map.find(space, address)
        if entry is not None and entry.range.accepts(address - entry.base, width):
            return self._register_reader(entry, address - entry.base, width)
        if width == 1 or not self._anyone_at(space, address, width):
            return self._open_bus_reader(space, address, width)
        half = width // 2
        low, high = self.reader(space, address, half), self.reader(space, address + half, half)
        return lambda: low() | high() << 8 * half

    def writer(self, space: Space, address: int, width: int) -> Writer:
        entry = self._map.find(space, address)
        if entry is not None and entry.range.accepts(address - entry.base, width):
            return self._register_writer(entry, address - entry.base, width)
        if width == 1 or not self._anyone_at(space, address, width):
            return lambda value: self._on_open_bus(space, address, width, True, value)
        half = width // 2
        low, high = self.writer(space, address, half), self.writer(space, address + half, half)
        mask = (1 << 8 * half) - 1

        def write(value: int) -> None:
            low(value & mask)
            high(value >> 8 * half)

        return write

    def _anyone_at(self, space: Space, address: int, width: int) -> bool:
        return any(self._map.find(space, address + byte) is not None for byte in range(width))

    def _open_bus_reader(self, space: Space, address: int, width: int) -> Reader:
        on_open_bus, ones = self._on_open_bus, (1 << 8 * width) - 1

        def read() -> int:
            on_open_bus(space, address, width, False, ones)
            return ones

        return read

    def _register_reader(self, entry: Entry, offset: int, width: int) -> Reader:
        target, ask = self._targets[entry.node], Read(entry.range.name, offset, width)

        def read() -> int:
            return target.ask(ask, ReadReply).value

        if width == 1 and offset in dict(entry.range.latched) and entry.mirror_page in self._mirrors:
            latch = next(t for t in target.latches if t.where == (entry.range.name, offset))
            return _latched_reader(
                self._mirrors[entry.mirror_page], entry.mirror_slots[offset], target, latch, read
            )
        if width == 1 and offset in entry.range.own and entry.mirror_page in self._mirrors:
            where = entry.range.name, offset
            return _own_reader(
                self._mirrors[entry.mirror_page], entry.mirror_slots[offset], target, where, read
            )
        covered = range(offset, offset + width)
        mirror = self._mirrors.get(entry.mirror_page) if entry.mirror_page is not None else None
        if mirror is None or not entry.range.mirrored.issuperset(covered):
            return read
        relaxed = entry.range.relaxed.issuperset(covered)
        return _mirrored_reader(
            mirror, entry.mirror_slots[offset], width, target, relaxed, read, self._now_ns
        )

    def _register_writer(self, entry: Entry, offset: int, width: int) -> Writer:
        target, region = self._targets[entry.node], entry.range.name
        if offset in entry.range.posted:
            return target.poster(region, offset, width, offset in entry.range.prompt)

        def write(value: int) -> None:
            target.ask(Write(region, offset, width, value), WriteReply)

        return write


def _own_reader(
    mirror: MirrorReader,
    slot: int,
    target: Target,
    where: tuple[str, int],
    read_synchronously: Reader,
) -> Reader:
    """Read a register that only posted writes of itself change."""
    slots, last = mirror.slots, target.last

    def read() -> int:
        if last[where] <= mirror.done:
            entry = slots[slot]
            if entry & SLOT_BYTE:
                target.mirrored += 1
                return entry & 0xFF
        return read_synchronously()

    return read


def _latched_reader(
    mirror: MirrorReader, slot: int, target: Target, latch: LatchState, read_synchronously: Reader
) -> Reader:
    """Read a register that reading clears, without asking: what is on its way to the device is known here,
    what has arrived is in the mirror."""
    slots, note = mirror.slots, target.noter(latch)

    def read() -> int:
        done = mirror.done  # first: the page may show more by the time we look, but not less
        if latch.unknown_at > done:
            return read_synchronously()
        entry = slots[slot]
        if entry & SLOT_BYTE:
            target.mirrored += 1
            return entry & 0xFF
        shown = mirror.record(entry) if entry & SLOT_FORMULA else None
        if not isinstance(shown, Latch):
            return read_synchronously()
        target.mirrored += 1
        if not (latch.is_set if latch.known_at > done else shown.is_set):
            return shown.low
        note(shown.high)
        return shown.high

    return read


def _mirrored_reader(
    mirror: MirrorReader,
    slot: int,
    width: int,
    target: Target,
    relaxed: bool,
    read_synchronously: Reader,
    now_ns: Callable[[], int],
) -> Reader:
    """Read `width` bytes from slot on; registers next to each other have slots next to each other."""
    slots, formula = mirror.slots, mirror.formula

    def read() -> int:
        if relaxed or not target.dirty:
            entry = slots[slot]
            if entry & SLOT_BYTE and width == 1:
                target.mirrored += 1
                return entry & 0xFF
            value = read_formula(entry) if entry & SLOT_FORMULA else read_bytes()
            if value is not None:
                target.mirrored += 1
                return value
        return read_synchronously()

    def read_formula(entry: int) -> int | None:
        return formula(entry, width, now_ns())

    def read_bytes() -> int | None:
        value = 0
        for byte in range(width):
            entry = slots[slot + byte]
            if not entry & SLOT_BYTE:
                return None
            value |= (entry & 0xFF) << 8 * byte
        return value

    return read

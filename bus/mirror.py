"""The mirror page: registers that the CPU node reads without a message.

One 4 KiB page per device in the memory node's region "mirror". The device's host is its only writer.
Layout, little-endian:
  bytes 0-2047     1024 slots of 2 bytes, one per mirrored register byte, in the order of `slots()`:
                   0 = read it synchronously; 0x4000 | value; 0x8000 | record << 4 | byte of the formula
  bytes 2048-4095  32 formula records of eight signed 64-bit words: generation (odd while being written),
                   kind, six parameters
Left out: a multi-byte register made of single bytes may be seen half updated; only a Counter is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bus.ranges import BadRange, IoRange

PAGE_SIZE = 4096
SLOTS = 1024
RECORDS = 32
RECORD_WORDS = 8
SLOT_BYTE, SLOT_FORMULA = 0x4000, 0x8000
KIND_COUNTER, KIND_STEP = 1, 2
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Counter:
    """A register that counts by itself: `(start + (now - base_ns) * freq_hz // 10**9) & mask`.

    Covers `width` bytes from its offset on, and answers accesses of any width inside them.
    """

    base_ns: int
    freq_hz: int
    mask: int
    width: int
    start: int = 0

    def at(self, now_ns: int) -> int:
        return (self.start + (now_ns - self.base_ns) * self.freq_hz // NS) & self.mask


@dataclass(frozen=True, slots=True)
class Step:
    """A one-byte register that changes once: `before` until at_ns, `after` from then on.

    The bits of `toggle` are inverted in every other period of `toggle_ns`, counted from clock zero.
    """

    before: int
    after: int
    at_ns: int
    width: int = 1
    toggle: int = 0
    toggle_ns: int = 1

    def at(self, now_ns: int) -> int:
        value = self.after if now_ns >= self.at_ns else self.before
        return value ^ self.toggle if now_ns // self.toggle_ns & 1 else value


MirrorValue = int | Counter | Step
MirrorKey = tuple[str, int]  # region, offset


def slots(ranges: Iterable[IoRange]) -> dict[MirrorKey, int]:
    """Slot number of every mirrored (region, offset) of a device, in the order of its declarations."""
    keys = [(r.name, offset) for r in ranges for offset in sorted(r.mirrored)]
    if len(keys) > SLOTS:
        raise BadRange(f"{len(keys)} mirrored registers do not fit into {SLOTS} slots")
    return {key: slot for slot, key in enumerate(keys)}


def page_of(mirror: memoryview, index: int) -> memoryview:
    """The page of one device in the whole region."""
    return mirror[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]


class MirrorWriter:
    """The host's side of a page."""

    def __init__(self, page: memoryview, slot_of: Mapping[MirrorKey, int]) -> None:
        self._slots = page[: SLOTS * 2].cast("H")
        self._words = page[SLOTS * 2 :].cast("q")
        self._slot_of = dict(slot_of)
        self._records: dict[MirrorKey, int] = {}
        self._shown: dict[MirrorKey, MirrorValue] = {}
        for slot in self._slot_of.values():
            self._slots[slot] = 0

    def publish(self, values: Mapping[MirrorKey, MirrorValue]) -> None:
        """Make the page show `values`; ValueError for a register that isn't declared mirrored."""
        if values == self._shown:
            return
        new: dict[int, int] = {}
        for key, value in values.items():
            if isinstance(value, int):
                if not 0 <= value <= 0xFF:
                    raise ValueError(f"mirror value {value:#x} of {key} is not a byte")
                new[self._slot(key)] = SLOT_BYTE | value
                continue
            record = self._records.setdefault(key, len(self._records))
            if record >= RECORDS:
                raise ValueError(f"more than {RECORDS} formulas in one mirror page")
            for byte in range(value.width):
                new[self._slot((key[0], key[1] + byte))] = SLOT_FORMULA | record << 4 | byte
            if self._shown.get(key) != value:
                self._write_record(record, value)
        for slot in self._slot_of.values():
            entry = new.get(slot, 0)
            if self._slots[slot] != entry:
                self._slots[slot] = entry
        self._shown = dict(values)

    def _slot(self, key: MirrorKey) -> int:
        if key not in self._slot_of:
            raise ValueError(f"{key} is not declared as mirrored")
        return self._slot_of[key]

    def _write_record(self, record: int, value: Counter | Step) -> None:
        at = record * RECORD_WORDS
        generation = self._words[at] & ~1
        if isinstance(value, Counter):
            words = (KIND_COUNTER, value.base_ns, value.freq_hz, value.mask, value.width, value.start, 0)
        else:
            step = (value.before, value.after, value.at_ns, value.width, value.toggle, value.toggle_ns)
            words = (KIND_STEP, *step)
        self._words[at] = generation + 1
        for i, word in enumerate(words, start=1):
            self._words[at + i] = word
        self._words[at] = generation + 2


class MirrorReader:
    """The CPU node's side of a page."""

    def __init__(self, page: memoryview) -> None:
        self.slots = page[: SLOTS * 2].cast("H")
        self._words = page[SLOTS * 2 : PAGE_SIZE].cast("q")
        self._cache: dict[int, tuple[int, Counter | Step]] = {}  # record -> generation, formula

    def formula(self, entry: int, width: int, now_ns: int) -> int | None:
        """The value behind a SLOT_FORMULA entry; None when it has to be read synchronously."""
        record, byte = entry >> 4 & 0xFF, entry & 0xF
        at = record * RECORD_WORDS
        generation = self._words[at]
        cached = self._cache.get(record)
        if cached is None or cached[0] != generation:
            words = self._words[at + 1 : at + RECORD_WORDS].tolist()
            if generation & 1 or self._words[at] != generation:
                return None
            if words[0] == KIND_COUNTER:
                formula: Counter | Step = Counter(*words[1:6])
            else:
                formula = Step(*words[1:])
            cached = self._cache[record] = (generation, formula)
        formula = cached[1]
        if byte + width > formula.width:
            return None
        return formula.at(now_ns) >> 8 * byte & (1 << 8 * width) - 1

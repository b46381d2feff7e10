"""The mirror page: registers that the CPU node reads without a message.

One 4 KiB page per device in the memory node's region "mirror". The device's host is its only writer.
Layout, little-endian:
  bytes 0-2047     1024 slots of 2 bytes, one per mirrored register byte, in the order of `slots()`:
                   0 = read it synchronously; 0x4000 | value; 0x8000 | record << 4 | byte of the formula
  bytes 2048-4031  31 formula records of eight signed 64-bit words: generation (odd while being written),
                   kind, six parameters
  bytes 4032-4039  how many posted operations of the CPU's the page shows the results of
Left out: a multi-byte register made of single bytes may be seen half updated; only a Counter is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from bus.ranges import BadRange, IoRange

PAGE_SIZE = 4096
SLOTS = 1024
RECORDS = 31
RECORD_WORDS = 8
SLOT_BYTE, SLOT_FORMULA = 0x4000, 0x8000
KIND_COUNTER, KIND_STEP, KIND_LATCH = 1, 2, 3
DONE = RECORDS * RECORD_WORDS  # word, from the first record on
NS = 1_000_000_000


class Counter(msgspec.Struct, frozen=True):
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


class Step(msgspec.Struct, frozen=True):
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


class Latch(msgspec.Struct, frozen=True):
    """A one-byte register that reads as `high` once after something set it, then as `low`: reading clears it.

    What sets it is a posted write of the register that IoRange.latched names with it, and nothing else that
    the CPU posts; nothing but such reads clears it. So the CPU node knows what a read will find without
    asking, and posts what it has read: Device.seen. `is_set`: as the device has it now.
    """

    high: int
    low: int
    is_set: bool
    width: int = 1

    def at(self, now_ns: int) -> int:
        return self.high if self.is_set else self.low


MirrorValue = int | Counter | Step | Latch
MirrorKey = tuple[str, int]  # region, offset


def slots(ranges: Iterable[IoRange]) -> dict[MirrorKey, int]:
    """Slot number of every mirrored (region, offset) of a device, in the order of its declarations."""
    keys = [(r.name, offset) for r in ranges
            for offset in sorted({*r.mirrored, *(offset for offset, _ in r.latched)})]
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
        self._words[DONE] = 0

    def publish(self, values: Mapping[MirrorKey, MirrorValue], done: int = 0) -> None:
        """Make the page show `values`; ValueError for a register that isn't declared mirrored.

        `done`: operations that the CPU had posted and that are done, from the start on.
        """
        if values != self._shown:
            self._show(values)
        self._words[DONE] = done  # last: what it counts is there to be seen

    def shows(self, values: Mapping[MirrorKey, MirrorValue], done: int) -> bool:
        """Whether publish() of these would change nothing."""
        return values == self._shown and self._words[DONE] == done

    def _show(self, values: Mapping[MirrorKey, MirrorValue]) -> None:
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

    def _write_record(self, record: int, value: Counter | Step | Latch) -> None:
        at = record * RECORD_WORDS
        generation = self._words[at] & ~1
        if isinstance(value, Counter):
            words = (KIND_COUNTER, value.base_ns, value.freq_hz, value.mask, value.width, value.start, 0)
        elif isinstance(value, Latch):
            words = (KIND_LATCH, value.high, value.low, int(value.is_set), value.width, 0, 0)
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
        self._cache: dict[int, tuple[int, Counter | Step | Latch]] = {}  # record -> generation, formula

    @property
    def done(self) -> int:
        """Operations posted by the CPU whose results the page shows, at least."""
        return self._words[DONE]

    def formula(self, entry: int, width: int, now_ns: int) -> int | None:
        """The value behind a SLOT_FORMULA entry; None when it has to be read synchronously."""
        formula, byte = self.record(entry), entry & 0xF
        if formula is None or byte + width > formula.width:
            return None
        return formula.at(now_ns) >> 8 * byte & (1 << 8 * width) - 1

    def record(self, entry: int) -> Counter | Step | Latch | None:
        """The formula of a SLOT_FORMULA entry; None while it is being written."""
        record = entry >> 4 & 0xFF
        at = record * RECORD_WORDS
        generation = self._words[at]
        cached = self._cache.get(record)
        if cached is None or cached[0] != generation:
            words = self._words[at + 1 : at + RECORD_WORDS].tolist()
            if generation & 1 or self._words[at] != generation:
                return None
            formula: Counter | Step | Latch
            if words[0] == KIND_COUNTER:
                formula = Counter(*words[1:6])
            elif words[0] == KIND_LATCH:
                formula = Latch(words[1], words[2], bool(words[3]))
            else:
                formula = Step(*words[1:])
            cached = self._cache[record] = (generation, formula)
        return cached[1]

"""Records of a ring (bus/recorder.py), from blocks of bytes to tuples.

Left out: what they mean together, which is tracing/chains.py's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from bus import recorder
from bus.recorder import ACCESS, BLOCK, BLOCK_BEGINS, DATA_MAX, DMA, FRAME, SPACE

_HEAD = struct.Struct("<HBBI").unpack_from
_FRAME = struct.Struct("<QQ").unpack_from
_ACCESS = struct.Struct("<IIQ").unpack_from
_WORD = struct.Struct("<Q").unpack_from
_WORDS = [struct.Struct(f"<{n}Q").unpack_from for n in range(5)]
NAMED = {  # kind -> number of words before the name
    recorder.PROCESS: 1, recorder.ASK: 2, recorder.BATCH: 2, recorder.TIMER: 4, recorder.INPUT: 4,
    recorder.DISK_DONE: 4, recorder.DISK: 4, recorder.OUTPUT: 2, recorder.MARK: 2, recorder.RIM_OUT: 2,
    recorder.RIM_IN: 2, recorder.RESUMED: 4,
}  # fmt: skip
# time, done, trace, position
STEPS = (recorder.TIMER, recorder.INPUT, recorder.DISK_DONE, recorder.DISK, recorder.RESUMED)


class Record(NamedTuple):
    """One of any kind, see the layouts in bus/recorder.py.

    `one` and `two` by kind: ACCESS address, value; ASK and BATCH span, 0; steps and DISK trace, position;
    OUTPUT, RIM_OUT, RIM_IN position, 0; MARK value, 0; BLOCK_BEGINS count, 0; others 0.
    """

    kind: int
    flags: int
    number: int
    time_ns: int  # DMA: 0
    done_ns: int  # 0: it wasn't, or not yet
    one: int
    two: int
    cr3: int  # ACCESS, VECTOR, EOI; -1: not known
    name: str
    data: bytes  # FRAME: the frame, perhaps cut; DMA: pairs of words


class Damage(ValueError):
    """Bytes that are no records; `at`: offset from the block's begin."""

    def __init__(self, line: str, at: int) -> None:
        super().__init__(line)
        self.at = at


class Reader:
    """Of one ring: carries CR3 from record to record."""

    def __init__(self) -> None:
        self._cr3 = -1

    def records(self, block: bytes | memoryview, start: int = 0) -> Iterator[Record]:
        """Those of a block or of the part of it that is there, from an offset on. Raises Damage after the
        last good one."""
        at, end = start, len(block)
        while at < end:
            if end - at < 8:
                raise Damage("a record is cut short", at)
            size, kind, flags, number = _HEAD(block, at)
            if not size:
                return
            behind = at + 8 * size
            if behind > end or behind > BLOCK:
                raise Damage(f"a record of {8 * size} bytes, where {end - at} are left", at)
            try:
                record = self._record(block, at, behind, kind, flags, number)
            except (struct.error, UnicodeDecodeError) as error:
                raise Damage(f"a record of kind {kind} with {8 * size} bytes: {error}", at) from error
            if record is not None:
                yield record
            at = behind

    def _record(
        self, block: bytes | memoryview, at: int, behind: int, kind: int, flags: int, number: int
    ) -> Record | None:
        if kind == ACCESS:
            address, value, time_ns = _ACCESS(block, at + 8)
            return Record(kind, flags, number, time_ns, 0, address, value, self._cr3, "", b"")
        if kind == FRAME:
            time_ns, done_ns = _FRAME(block, at + 8)
            text = at + 24 + flags
            name = str(block[at + 24 : text], "latin-1")
            data = bytes(block[text : text + min(number, DATA_MAX, behind - text)])
            return Record(kind, flags, number, time_ns, done_ns, 0, 0, -1, name, data)
        if kind in NAMED:
            count = NAMED[kind]
            words = _WORDS[count](block, at + 8)
            begin = at + 8 + 8 * count
            if begin + flags > behind:
                raise Damage("a name is longer than its record", at)
            name = str(block[begin : begin + flags], "utf-8")
            if kind in STEPS:
                return Record(kind, flags, number, words[0], words[1], words[2], words[3], -1, name, b"")
            return Record(kind, flags, number, words[0], 0, words[-1] if count > 1 else 0, 0, -1, name, b"")
        (word,) = _WORD(block, at + 8)
        if kind == SPACE:
            self._cr3 = number
            return None
        if kind == BLOCK_BEGINS:
            self._cr3 = -1
            return Record(kind, flags, number, 0, 0, word, 0, -1, "", b"")
        if kind == DMA:
            return Record(kind, flags, number, 0, 0, 0, 0, -1, "", bytes(block[at + 8 : behind]))
        if kind in (recorder.VECTOR, recorder.EOI, recorder.ACCEPTED):
            return Record(kind, flags, number, word, 0, 0, 0, self._cr3, "", b"")
        raise Damage(f"a record of unknown kind {kind}", at)

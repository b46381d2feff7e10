"""What a device process must not forget when it ends: its last committed step, in memory that outlives it.

A journal is a memfd that the launcher holds and gives to each process of the device in turn. A step is
committed by one 8-byte store, after its record lies in the other of two halves: a process that is killed at
any point leaves the last step or the one before, whole. docs/live-swap.md says what is in a record and why
that is enough. Layout: 512 64-bit words (see the constants), then two halves of HALF bytes; what is never
written takes no memory. Left out: the end of the host (a snapshot is for that).
"""

from __future__ import annotations

import functools
import mmap
import os
from typing import Any
from zlib import crc32

import msgspec

HALF = 64 << 20
WORDS = 512
_MAGIC, _COMMITTED, _LENGTHS, _DMA, _BEGUN = 0, 1, 2, 4, 8  # words; two of _LENGTHS and _DMA
_UNFINISHED = 8  # steps begun and not committed: pairs of words from _BEGUN on, input and how often
MAGIC = 0x33304C4E524A5042  # "BPJRNL03"


class JournalFull(RuntimeError):
    """A record is too long."""


class BadJournal(ValueError):
    """A descriptor that is no journal of this version."""


class Record(msgspec.Struct, array_like=True, frozen=True):
    """What is committed at the end of a step. `kind` to `fields`: the device's state (DeviceState.dump)."""

    kind: str
    version: int
    fields: Any
    slot: Any  # Slot.to_plain
    streams: Any  # Endpoint.to_plain
    outputs: dict[str, int]  # bytes ever put out, by channel, without those of `output`
    output: list[tuple[str, bytes]]  # of this step
    inputs: dict[str, int]  # bytes ever taken in, by channel
    clock: tuple[int, int | None]  # MachineClock: offset, where it stands

    def device(self) -> dict[str, Any]:
        """The device's state as Device.load takes it."""
        return {"kind": self.kind, "version": self.version, "fields": self.fields}


@functools.cache
def _crc(source: str) -> int:
    """In the upper bits of a word, the number of the input below."""
    return crc32(source.encode()) << 31


class Journal:
    """See the module's docstring. One process at a time writes it."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != WORDS * 8 + 2 * HALF:
            raise BadJournal("not a journal: its size is wrong")
        self._memory = memoryview(mmap.mmap(fd, WORDS * 8 + 2 * HALF))
        self._words = self._memory[: WORDS * 8].cast("q")
        if self._words[_MAGIC] not in (0, MAGIC):
            raise BadJournal("not a journal of this version")
        self._words[_MAGIC] = MAGIC
        self._begun: int | None = None  # the word of the step that this process has begun
        self._unfinished = any(self._words[_BEGUN : _BEGUN + 2 * _UNFINISHED])  # there may be such of others
        self._encoder = msgspec.msgpack.Encoder()

    @staticmethod
    def make(name: str) -> int:
        """An empty one: its descriptor."""
        fd = os.memfd_create(f"{name}.journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, WORDS * 8 + 2 * HALF)
        return fd

    def begin(self, source: str, number: int) -> int:
        """A step about this input begins, of a peer, timer, channel or disk; how often it has begun, this
        time included, without being committed. Two inputs of a source have different numbers."""
        words, word = self._words, _crc(source) | number & 0x7FFF_FFFF
        if not self._unfinished and self._begun is None:
            words[_BEGUN] = word  # the count is 0
            words[_BEGUN + 1] = 1
            self._begun = _BEGUN
            return 1
        self._unfinished = True
        pairs = range(_BEGUN, _BEGUN + 2 * _UNFINISHED, 2)
        at = next((at for at in pairs if words[at] == word), None)
        if at is None:
            at = min(pairs, key=lambda at: words[at + 1])
            words[at + 1] = 0  # first: a process that ends here has begun nothing
            words[at] = word
        words[at + 1] = begun = words[at + 1] + 1
        self._begun = at
        return begun

    def put_off(self) -> None:
        """The step that was begun has ended, and is committed with a later one: no process ended in it."""
        if self._begun is not None:
            self._words[self._begun + 1] = self._words[self._begun] = 0
            self._begun = None

    def commit(self, record: tuple[Any, ...], dma_done: int = 0) -> None:
        """From here on this is what a new process finds. `record` has Record's fields, in their order."""
        data = self._encoder.encode(record)
        if len(data) > HALF:
            raise JournalFull(f"{len(data)} bytes of state, there is room for {HALF}")
        number = self._words[_COMMITTED] + 1
        half = number & 1
        start = WORDS * 8 + half * HALF
        self._memory[start : start + len(data)] = data
        self._words[_LENGTHS + half] = len(data)
        self._words[_DMA + half] = dma_done
        self._words[_COMMITTED] = number
        self.put_off()

    def amend(self, peer: str, stream: Any) -> None:
        """The last step again, but with this stream to a peer: what is sent outside of any step."""
        record, done = self.latest(), self.dma_done()
        if record is None:
            return
        asked, asking = record.streams
        self._begun, self._unfinished = None, True
        self.commit(msgspec.structs.astuple(
            msgspec.structs.replace(record, streams=(asked, {**asking, peer: stream}))
        ), done)  # fmt: skip

    def latest(self) -> Record | None:
        """The last step committed; None before the first."""
        number = self._words[_COMMITTED]
        if not number:
            return None
        half = number & 1
        start = WORDS * 8 + half * HALF
        data = bytes(self._memory[start : start + self._words[_LENGTHS + half]])
        return msgspec.msgpack.decode(data, type=Record)

    def dma_written(self, count: int) -> None:
        """So many DMA writes of the last step are done."""
        self._words[_DMA + (self._words[_COMMITTED] & 1)] = count

    def dma_done(self) -> int:
        """How many DMA writes of the last step are known to be done; one more may be."""
        return self._words[_DMA + (self._words[_COMMITTED] & 1)]

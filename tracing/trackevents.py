"""TrackEvents as Perfetto has them: tracks, names, arguments, arrows. What they say: tracing/perfetto.py.

Events are written in any order of time: the trace processor sorts. An event waits here until the next of its
chain is known, as its last arrow has to be marked. Memory is bounded.

Numbers of fields: protos/perfetto/trace/perfetto_trace.proto of Perfetto 55.
"""

from __future__ import annotations

from struct import Struct
from typing import IO, TypeVar

from tracing.protobuf import LAST, MASK, MORE, message, tag, text, uint, varint

SEQUENCE = uint(10, 1)  # of TracePacket: trusted_packet_sequence_id
CLEARED, NEEDS = uint(13, 1), uint(13, 2)  # sequence_flags: names begin anew; names are needed
EVENT = SEQUENCE + NEEDS + tag(11, 2)
# By the packet's length: what an event's packet begins with, up to the timestamp's value
HEADS = [tag(1, 2) + varint(length) + tag(8) for length in range(1024)]
BEGIN, END, INSTANT, COUNTER = (uint(9, n) for n in (1, 2, 3, 4))  # TrackEvent.type
TRACK, NAME, CATEGORY = tag(11), tag(10), tag(3)
COUNT = tag(30)
FLOW, LAST_FLOW = tag(47, 1), tag(48, 1)
ARGUMENT = tag(4, 2)
ARG_UINT, ARG_POINTER, ARG_TEXT, ARG_INTERNED = tag(3), tag(7), tag(6, 2), tag(17)
CATEGORIES, NAMES, ARGUMENT_NAMES, STRINGS = 1, 2, 3, 29  # of InternedData
REALTIME, MONOTONIC = 1, 3  # builtin clocks
PARTS_MAX = 1 << 15  # pieces of bytes that are written at once, six for an event
FORGET_NS = 2_000_000_000  # a chain that was quiet for so long is taken for over
CHAINS_MAX = 20_000  # that are not over
CACHE_MAX = 1 << 15  # entries of each cache
FOREVER = 1 << 64
_ID = Struct("<Q").pack
K = TypeVar("K")
V = TypeVar("V")


class Event:
    """Waits for its arrows."""

    __slots__ = ("body", "time_ns", "waits")

    def __init__(self, time_ns: int, body: bytes) -> None:
        self.time_ns, self.body, self.waits = time_ns, body, 0


class Track:
    """Slices that overlap go to lanes of their own, with the same name: viewers show these together."""

    __slots__ = ("begins", "ends", "heads", "name", "parent")

    def __init__(self, name: str, parent: int) -> None:
        self.name, self.parent = name, parent
        self.heads: list[bytes] = []
        self.ends: list[list[int]] = []
        self.begins: list[int] = []


class TrackEvents:
    """OSError is the caller's."""

    def __init__(self, file: IO[bytes], monotonic_ns: int, realtime_ns: int) -> None:
        """The times: one moment on both clocks."""
        self._file = file
        self.parts: list[bytes] = []
        self._uuid = 0
        self._interned: dict[tuple[int, str], int] = {}
        self._arguments: dict[str, bytes] = {}  # by name
        self.waiting: dict[int, tuple[Event, bool]] = {}  # chain -> its last event; is it the first, too?
        self._chains: dict[int, bytes] = {}
        self._high, self._behind = -1, b""  # the upper part of the last event's time, as bytes
        now = ((MONOTONIC, monotonic_ns), (REALTIME, realtime_ns))
        clocks = [message(1, uint(1, clock), uint(2, ns)) for clock, ns in now]
        self.packet(SEQUENCE, message(6, *clocks, uint(2, MONOTONIC)))
        self.packet(SEQUENCE, CLEARED, uint(87, 1), message(59, uint(58, MONOTONIC)))
        self._chain_arg = self.argument_head("chain") + ARG_POINTER

    def end(self) -> None:
        """The last arrows of all chains."""
        self.forget(FOREVER)
        self.write()
        self._file.flush()

    # --- events

    def event(self, time_ns: int, chain: int, cause: int, also: tuple[int, ...], body: bytes) -> None:
        """With its arrows: it waits until the next event of each of its chains comes, or none does."""
        waiting = self.waiting
        if not chain and not cause:
            return self.out(time_ns, body)
        if chain:
            arg = self._chains.get(chain)
            if arg is None:
                arg = cached(self._chains, chain, argument(self._chain_arg, varint(chain)))
            body += arg
        event = Event(time_ns, body)
        if not cause and not also:  # most
            before = waiting.pop(chain, None)
            if before is not None:
                earlier = before[0]
                earlier.body += FLOW + _ID(chain)
                earlier.waits -= 1
                if not earlier.waits:
                    self.out(earlier.time_ns, earlier.body)
            event.waits = 1
            waiting[chain] = event, before is None
            return
        if cause and chain not in waiting:
            self._arrow(cause, event)
        if chain:
            self._arrow(chain, event)
        for other in also:
            self._arrow(other, event)

    def _arrow(self, chain: int, event: Event) -> None:
        before = self.waiting.pop(chain, None)
        if before is not None:
            earlier = before[0]
            if earlier is not event:
                earlier.body += FLOW + _ID(chain)
            earlier.waits -= 1
            if not earlier.waits and earlier is not event:
                self.out(earlier.time_ns, earlier.body)
        event.waits += 1
        self.waiting[chain] = event, before is None

    def forget(self, until_ns: int) -> None:
        """Chains without an event since then, and the oldest if there are too many."""
        waiting = self.waiting
        crowded = len(waiting) - CHAINS_MAX // 2 if len(waiting) > CHAINS_MAX else 0
        for chain in list(waiting):
            event, alone = waiting[chain]
            if event.time_ns >= until_ns and crowded <= 0:
                break
            crowded -= 1
            del waiting[chain]
            if not alone:
                event.body += LAST_FLOW + _ID(chain)
            event.waits -= 1
            if not event.waits:
                self.out(event.time_ns, event.body)

    def out(self, time_ns: int, body: bytes) -> None:
        if time_ns >> 28 != self._high:  # most are of the same quarter of a second
            self._high = time_ns >> 28
            self._behind = varint(self._high) + EVENT
        length = len(body)
        size = LAST[length] if length <= MASK else varint(length)
        length += 5 + len(self._behind) + len(size)
        head = HEADS[length] if length < 1024 else tag(1, 2) + varint(length) + tag(8)
        self.parts += (head, MORE[time_ns & MASK], MORE[time_ns >> 14 & MASK], self._behind, size, body)

    def close(self, time_ns: int, head: bytes) -> None:
        self.out(time_ns, END + head)

    # --- tracks

    def lane(self, track: Track, begin_ns: int, end_ns: int) -> bytes:
        """The head of an event in the first lane in which the slice lies within another or behind all."""
        lane = 0
        for ends in track.ends:
            while ends and ends[-1] <= begin_ns:
                ends.pop()
            if begin_ns >= track.begins[lane] and (not ends or end_ns <= ends[-1]):
                break
            lane += 1
        else:
            head = TRACK + varint(self.describe(track.name, track.parent))
            track.heads.append(head)
            track.begins.append(0)
            ends = []
            track.ends.append(ends)
        track.begins[lane] = begin_ns
        if end_ns > begin_ns:
            ends.append(end_ns)
        return track.heads[lane]

    def process(self, pid: int, name: str, command: str) -> int:
        """Its track; the uuid."""
        self._uuid += 1
        process = message(3, uint(1, pid), text(6, name), text(2, command))
        self.packet(SEQUENCE, message(60, uint(1, self._uuid), process))
        return self._uuid

    def counter(self, name: str, unit: str, parent: int) -> bytes:
        """What a counter's event begins with; a varint follows."""
        uuid = self.describe(name, parent, message(8, text(6, unit) if unit else b""))
        return COUNTER + TRACK + varint(uuid) + COUNT

    def describe(self, name: str, parent: int, more: bytes = b"") -> int:
        self._uuid += 1
        self.packet(SEQUENCE, message(60, uint(1, self._uuid), uint(5, parent), text(2, name), more))
        return self._uuid

    # --- names and arguments

    def intern(self, table: int, value: str) -> int:
        iid = self._interned.get((table, value))
        if iid is None:
            iid = self._interned[table, value] = len(self._interned) + 1
            what = text(2, value)
            self.packet(SEQUENCE, NEEDS, message(12, message(table, uint(1, iid), what)))
        return iid

    def named(self, category: str, name: str) -> bytes:
        return (CATEGORY + varint(self.intern(CATEGORIES, category))
                + NAME + varint(self.intern(NAMES, name)))  # fmt: skip

    def argument_head(self, name: str) -> bytes:
        head = self._arguments.get(name)
        if head is None:
            head = self._arguments[name] = uint(1, self.intern(ARGUMENT_NAMES, name))
        return head

    def arg_uint(self, name: str, value: int) -> bytes:
        return argument(self.argument_head(name) + ARG_UINT, varint(value & FOREVER - 1))

    def arg_pointer(self, name: str, value: int) -> bytes:
        return argument(self.argument_head(name) + ARG_POINTER, varint(value & FOREVER - 1))

    def arg_uint_if(self, head: bytes, value: object) -> bytes:
        if isinstance(value, int) and 0 <= value < FOREVER:
            return argument(head, varint(value))
        return b""

    def arg_string(self, name: str, value: str) -> bytes:
        """One of few."""
        return argument(self.argument_head(name) + ARG_INTERNED, varint(self.intern(STRINGS, value)))

    def arg_text(self, name: str, value: str) -> bytes:
        data = value.encode()
        return argument(self.argument_head(name) + ARG_TEXT, varint(len(data)) + data)

    def arg_any(self, name: str, value: object) -> bytes:
        if isinstance(value, int):
            return self.arg_uint(name, int(value))
        return self.arg_text(name, f"{value}"[:1000])

    # --- bytes

    def packet(self, *parts: bytes) -> None:
        self.parts.append(message(1, *parts))

    def write(self) -> None:
        self._file.write(b"".join(self.parts))
        self.parts.clear()


def argument(head: bytes, value: bytes) -> bytes:
    return ARGUMENT + varint(len(head) + len(value)) + head + value


def cached(cache: dict[K, V], key: K, value: V) -> V:
    if len(cache) >= CACHE_MAX:
        cache.clear()
    cache[key] = value
    return value

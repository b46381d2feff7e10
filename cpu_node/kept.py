"""A line as a record of bytes, to be kept on disk, and back.

A record is the line's host code moved together into one piece, the maps that belong to it, and the guest
bytes that it was made from: with their place, mode and kind they are its key, compared in full, so that no
hash can be wrong. Host code reaches everything but its own line through registers, and so may lie anywhere.
Whether the translator is the same one is the store's business (store.py).
Left out: anything but x86 byte order.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from bisect import bisect_right

import msgspec

from cpu_node import mode as modes
from cpu_node.line import Chunk, Line
from cpu_node.rdtsc import RDTSC

_HEAD = struct.Struct("<IHBBHHIIIIII")
_VERIFY, _SINGLE = 1, 2
_BLOCK = 32  # an instruction, and what is looked at behind it, depend on bytes of its block and the next
_PROBE = 64  # guest bytes, at most, that a probe is of
MAX_CODE = 1 << 19  # bytes of host code in a record

Key = tuple[int, int, int]  # linear address, mode, kind
Probe = tuple[int, int, int]  # offset, length, CRC-32 of the first guest bytes: others mostly differ there


def key_of(line: Line) -> Key:
    """What a record must agree in before its bytes are compared.

    An offset of the time-stamp counter is nothing to code without RDTSC: a restored machine finds that.
    """
    mode = line.mode
    if mode & modes.TSC_OFFSET and RDTSC not in line.code:
        mode &= ~modes.TSC_OFFSET
    return line.va, mode, (_VERIFY if line.verify else 0) | (_SINGLE if line.starts == 1 else 0)


class Kept(msgspec.Struct, eq=False):
    """A record, taken apart."""

    key: Key
    size: int
    ranges: array[int]  # (first, behind the last) offsets of the guest bytes it was made from
    source: bytes  # these bytes
    hosts: array[int]  # as those of Chunk, for the whole line
    offsets: array[int]
    jumps: array[int]  # those whose target is not translated
    entries: array[int]  # guest offsets worth a dispatch entry
    places: array[int]  # their host offsets, from the start of the code
    devices: array[int]  # as those of Line
    code: bytes

    def fits(self, line: Line) -> bool:
        """Is it a translation of this line's bytes, as they are now?"""
        return (line.size == self.size and source_of(line.code, self.ranges) == self.source
                and line.devices.issubset(self.devices))

    def covers(self, other: Kept) -> bool:
        """Would it do wherever `other` does, and be the same code or more of it?"""
        if self.key != other.key or self.size != other.size or not set(other.offsets) <= set(self.offsets):
            return False
        if self.ranges == other.ranges:
            return self.source == other.source
        page, known = bytearray(self.size), bytearray(self.size)
        at = 0
        for a, b in _pairs(self.ranges):
            page[a:b], known[a:b] = self.source[at : at + b - a], b"\1" * (b - a)
            at += b - a
        pairs = _pairs(other.ranges)
        return (all(known.find(0, a, b) < 0 for a, b in pairs)
                and b"".join([page[a:b] for a, b in pairs]) == other.source)


def source_of(code: bytes, ranges: array[int]) -> bytes:
    """The bytes of `code` in these ranges."""
    return b"".join([code[a:b] for a, b in _pairs(ranges)])


def pack(line: Line, chunks: list[Chunk], cache: memoryview) -> bytes:
    """The record of a line, of all its chunks; `cache` is the code cache."""
    starts = [chunk.start for chunk in chunks]
    moves = []  # what to add to a code cache offset in the chunk
    hosts, offsets, pending = array("I"), array("H"), array("I")
    at = 0
    for chunk in chunks:
        moves.append(at - chunk.start)
        hosts.extend([at + host for host in chunk.hosts])
        offsets.extend(chunk.offsets)
        at += chunk.end - chunk.start
    code = bytearray(b"".join([cache[chunk.start : chunk.end] for chunk in chunks]))
    place_of = dict(zip(offsets, hosts, strict=True))
    for chunk, move in zip(chunks, moves, strict=True):
        jumps = iter(chunk.jumps)
        for behind, target in zip(jumps, jumps, strict=True):
            behind += chunk.start + move
            place = place_of.get(target)
            if place is None:
                pending.append(behind)
                pending.append(target)
            else:
                code[behind - 4 : behind] = (place - behind).to_bytes(4, "little", signed=True)
    entries, places = array("H"), array("I")
    for offset, place in line.entries.items():
        entries.append(offset)
        places.append(place + moves[bisect_right(starts, place) - 1])
    ranges = _ranges(offsets, line.size)
    source = source_of(line.code, ranges)
    devices = array("H", sorted(line.devices))
    va, mode, kind = key_of(line)
    head = _HEAD.pack(va, mode, kind, 0, line.size, len(ranges), len(source), len(hosts), len(pending),
                      len(entries), len(devices), len(code))
    arrays = (ranges, hosts, offsets, pending, entries, places, devices)
    return b"".join([head, *[a.tobytes() for a in arrays], source, code])


def unpack(record: bytes) -> Kept:
    """Takes a record apart. Raises ValueError where it can't be one."""
    if len(record) < _HEAD.size:
        raise ValueError("no record")
    va, mode, kind, _, size, n_ranges, n_source, count, n_jumps, n_entries, n_devices, n_code = (
        _HEAD.unpack_from(record))
    shapes = (("H", n_ranges), ("I", count), ("H", count), ("I", n_jumps), ("H", n_entries), ("I", n_entries),
              ("H", n_devices))
    code_at = _HEAD.size + sum((2 if item == "H" else 4) * length for item, length in shapes) + n_source
    if code_at + n_code != len(record) or n_code > MAX_CODE or not count:
        raise ValueError("a record of the wrong length")
    at, parts = _HEAD.size, []
    for item, length in shapes:
        end = at + (2 if item == "H" else 4) * length
        parts.append(array(item, record[at:end]))
        at = end
    ranges, hosts, offsets, jumps, entries, places, devices = parts
    return Kept((va, mode, kind), size, ranges, record[at:code_at], hosts, offsets, jumps, entries, places,
                devices, record[code_at:])


def label(record: bytes) -> tuple[Key, Probe]:
    """What an index says of a record of `pack`."""
    va, mode, kind, _, _, _, n_source, _, _, _, _, n_code = _HEAD.unpack_from(record)
    start, end = struct.unpack_from("<HH", record, _HEAD.size)
    length, source_at = min(end - start, _PROBE), len(record) - n_code - n_source
    return (va, mode, kind), (start, length, zlib.crc32(record[source_at : source_at + length]))


def take_over(kept: Kept, line: Line, position: int) -> Chunk:
    """Makes a fitting record the line's translation, its code to be put at `position` of the code cache."""
    chunk = Chunk(line, position, position + len(kept.code), kept.hosts, kept.offsets, kept.jumps)
    line.kept = chunk
    line.stored = 1
    line.entries = dict(zip(kept.entries, [position + place for place in kept.places], strict=True))
    line.devices.update(kept.devices)
    return chunk


def _pairs(ranges: array[int]) -> list[tuple[int, int]]:
    return list(zip(ranges[::2], ranges[1::2], strict=True))


def _ranges(offsets: array[int], size: int) -> array[int]:
    """Where the guest bytes lie that these instructions, and what follows each, may depend on."""
    ranges = array("H")
    end = -1
    for block in sorted({offset // _BLOCK for offset in offsets}):
        start = block * _BLOCK
        if start > end:
            if end >= 0:
                ranges.append(end)
            ranges.append(start)
        end = min(start + 2 * _BLOCK, size)
    ranges.append(end)
    return ranges

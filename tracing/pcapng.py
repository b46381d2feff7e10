"""pcapng: every frame of a trace as a packet, for Wireshark and tshark with tracing/backplane.lua.

One section; one interface per ring, link type USER0; one packet per FRAME record, at the time of day at which
the frame was taken, in ns. A packet is a pseudo header (big endian) and the frame (bus/codec.py):

  u8 version, 1; u8 zero; u8 length of the sender's name; u8 of the receiver's; u64 when it was taken;
  u64 when all it asked for was done, 0: it wasn't, or not yet (both CLOCK_MONOTONIC, ns); the two names

A frame of which only the beginning was noted is a packet cut by its snapshot length. A new process in a ring
is a comment on the ring's next packet; records that a ring lost are in the statistics at the end.

Left out: records that are no frames (accesses, DMA, interrupts): those are in the other formats.
Layout of the blocks: draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from bus.recorder import FRAME, PROCESS
from tracing.file import Trace
from tracing.meta import Meta
from tracing.records import Record

DISSECTOR = Path(__file__).with_name("backplane.lua")
LINKTYPE_USER0 = 147
VERSION = 1  # of the pseudo header
SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
BYTE_ORDER = 0x1A2B3C4D
# Options
COMMENT = 1
SHB_APPLICATION = 4
IF_NAME, IF_RESOLUTION = 2, 9
ISB_RECEIVED, ISB_DROPPED = 4, 5
EPB_FLAGS = struct.pack("<HHIHH", 2, 4, 1, 0, 0)  # inbound, then the end of the options
BUFFER = 1 << 16  # bytes that are written at once
_PACKET = struct.Struct("<IIIIIII").pack
_PSEUDO = struct.Struct(">BBBBQQ").pack
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")  # by length & 3


class Writer:
    """Takes records as they come and writes packets; OSError (BrokenPipeError) is the caller's."""

    def __init__(self, file: IO[bytes], meta: Meta) -> None:
        self._file = file
        self._offset = meta.realtime_ns - meta.monotonic_ns
        self._buffer = bytearray()
        self._names: list[bytes] = []  # of the receivers, by ring
        self._counts: list[int] = []
        self._comments: dict[int, str] = {}
        self._last = meta.monotonic_ns
        section = struct.pack("<IHHq", BYTE_ORDER, 1, 0, -1)
        why = f": {meta.why}" if meta.why else ""
        options = _option(COMMENT, f"machine {meta.machine}{why}") + _option(SHB_APPLICATION, "backplane")
        self._block(SECTION, section + options)
        for ring in meta.rings:
            self.ring(ring)

    def ring(self, name: str) -> int:
        """A ring that has come up since; its number."""
        body = struct.pack("<HHI", LINKTYPE_USER0, 0, 0)
        self._block(INTERFACE, body + _option(IF_NAME, name) + _option(IF_RESOLUTION, b"\x09"))
        self._names.append(name.encode()[:255])
        self._counts.append(0)
        return len(self._names) - 1

    def record(self, ring: int, record: Record) -> None:
        """A packet, if it is a frame."""
        kind = record.kind
        if kind != FRAME:
            if kind == PROCESS:
                self._comments[ring] = f"process {record.number} begins: {record.name}"
            return
        receiver = self._names[ring]
        data = record.data
        sender = record.name.encode("latin-1")
        self._counts[ring] += 1
        self._last = taken = record.time_ns
        head = _PSEUDO(VERSION, 0, len(sender), len(receiver), taken, record.done_ns) + sender + receiver
        captured = len(head) + len(data)
        at = taken + self._offset
        padded = captured + 3 & ~3
        if self._comments and ring in self._comments:
            options = _option(COMMENT, self._comments.pop(ring)) + EPB_FLAGS
        else:
            options = EPB_FLAGS
        size = 32 + padded + len(options)
        buffer = self._buffer
        buffer += _PACKET(
            PACKET, size, ring, at >> 32 & 0xFFFFFFFF, at & 0xFFFFFFFF, captured, len(head) + record.number
        )
        buffer += head
        buffer += data
        buffer += _PAD[captured & 3]
        buffer += options
        buffer += size.to_bytes(4, "little")
        if len(buffer) > BUFFER:
            self._write()

    def flush(self) -> None:
        """What was taken so far is with the reader."""
        self._write()
        self._file.flush()

    def end(self, lost: Mapping[int, int] | None = None) -> None:
        """Statistics, with the records that were lost by ring."""
        at = self._last + self._offset
        for ring, count in enumerate(self._counts):
            body = struct.pack("<III", ring, at >> 32, at & 0xFFFFFFFF)
            body += _option(ISB_RECEIVED, struct.pack("<Q", count))
            dropped = (lost or {}).get(ring, 0)
            self._block(STATISTICS, body + _option(ISB_DROPPED, struct.pack("<Q", dropped)))
        self.flush()

    def _write(self) -> None:
        self._file.write(self._buffer)
        self._buffer.clear()

    def _block(self, kind: int, body: bytes) -> None:
        """`body` ends with options, without their end."""
        size = 12 + len(body) + 4
        self._buffer += struct.pack("<II", kind, size) + body + bytes(4) + struct.pack("<I", size)


def export(trace: Trace, file: IO[bytes], devices: frozenset[str] = frozenset()) -> None:
    """All of a trace file in order of time, or what these nodes have sent and taken."""
    writer = Writer(file, trace.meta)
    for ring, record in by_time(trace):
        nodes = {record.name.removesuffix(".io"), trace.meta.rings[ring].removesuffix(".io")}
        if not devices or record.kind != FRAME or devices & nodes:
            writer.record(ring, record)
    writer.end(trace.lost)


def by_time(trace: Trace) -> Iterator[tuple[int, Record]]:
    """Frames and beginnings of processes, with the number of their ring."""
    rings = [_packets(number, records) for number, records in enumerate(trace.rings())]
    since_ns = trace.meta.since_ns
    for ring, record in heapq.merge(*rings, key=lambda of: of[1].time_ns):
        if record.time_ns >= since_ns or record.kind == PROCESS:
            yield ring, record


def _packets(ring: int, records: Iterator[Record]) -> Iterator[tuple[int, Record]]:
    return ((ring, record) for record in records if record.kind in (FRAME, PROCESS))


def _option(code: int, value: str | bytes) -> bytes:
    data = value.encode()[:0xFFFC] if isinstance(value, str) else value
    return struct.pack("<HH", code, len(data)) + data + _PAD[len(data) & 3]

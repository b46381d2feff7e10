"""Every message that travels on the bus: one frozen dataclass each, numbered in one table.

On the wire a frame is a msgpack array `[version, kind, seq, trace, span, clock_ns, *fields]`
(bus/codec.py). docs/bus-protocol.md is generated from this file; the first line of each docstring
goes there. Left out: DMA as messages (it comes with devices on another host), injection frames.

Rules
- One-way frames get no answer. A request is answered by its reply, or by `Refused`, with the request's
  trace and span in the header.
- A frame caused by another carries the cause's trace and a span of its own.
- The writes of one PostedBatch are spans `span`, `span + 1`, ... of the batch's trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PROTOCOL_VERSION = 1
Direction = Literal["one-way", "request", "reply"]


class Header(NamedTuple):
    """What every frame carries besides its fields. All four are 64-bit and unsigned."""

    seq: int  # 1, 2, 3, ... per (sender, receiver) stream
    trace: int  # the causal chain, allocated by the originator of an I/O; 0 = none
    span: int  # this step of the chain
    clock_ns: int  # CLOCK_MONOTONIC of the sender when it encoded the frame


PostedWrite = tuple[str, int, int, int]  # region, offset, width, value


@dataclass(frozen=True, slots=True)
class Frame:
    """Base of all messages."""


# --- register access: CPU node -> device ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read(Frame):
    """Read one register of `region` (a port range or MMIO range); synchronous."""

    region: str
    offset: int
    width: int


@dataclass(frozen=True, slots=True)
class ReadReply(Frame):
    """The value read, zero-extended."""

    value: int


@dataclass(frozen=True, slots=True)
class Write(Frame):
    """Write one register; synchronous."""

    region: str
    offset: int
    width: int
    value: int


@dataclass(frozen=True, slots=True)
class WriteReply(Frame):
    """The write and all its effects are done, and the mirror page shows them."""


@dataclass(frozen=True, slots=True)
class PostedBatch(Frame):
    """Register writes in program order, without an answer."""

    writes: tuple[PostedWrite, ...]


@dataclass(frozen=True, slots=True)
class StringIn(Frame):
    """`rep ins`: read the same register `count` times."""

    region: str
    offset: int
    width: int
    count: int


@dataclass(frozen=True, slots=True)
class StringInReply(Frame):
    """`count * width` bytes, in the order in which they were read."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StringOut(Frame):
    """`rep outs`: write `data`, `width` bytes at a time, to the same register."""

    region: str
    offset: int
    width: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StringOutReply(Frame):
    """All of the string is written."""


# --- interrupts -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line(Frame):
    """An interrupt line changed: device -> every controller. `source` names the driver, as `node.line`."""

    irq: int
    level: bool
    source: str


@dataclass(frozen=True, slots=True)
class Intr(Frame):
    """The 8259's INT pin changed: PIC -> CPU node."""

    level: bool


@dataclass(frozen=True, slots=True)
class IntAck(Frame):
    """The CPU's INTA cycles: CPU node -> PIC; synchronous."""


@dataclass(frozen=True, slots=True)
class IntAckReply(Frame):
    """The vector, or nil when INT was no longer high: then no INTA took place and nothing is acknowledged."""

    vector: int | None


@dataclass(frozen=True, slots=True)
class ApicMessage(Frame):
    """An interrupt message on the APIC bus: I/O APIC -> every CPU node, which matches `dest` itself."""

    vector: int
    delivery_mode: int  # 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 start-up, 7 ExtINT
    dest: int
    dest_mode: int  # 0 physical, 1 logical
    trigger_level: bool  # level-triggered: the local APIC sends Eoi
    level_assert: bool


@dataclass(frozen=True, slots=True)
class Eoi(Frame):
    """End of a level-triggered interrupt: CPU node -> every I/O APIC."""

    vector: int


# --- control --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping(Frame):
    """Are you there?"""


@dataclass(frozen=True, slots=True)
class Pong(Frame):
    """Yes, and all frames sent to me on this stream before the Ping are handled."""


@dataclass(frozen=True, slots=True)
class Reset(Frame):
    """The RESET pin. `start` is empty for devices; for a CPU node it holds the registers to start with."""

    start: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResetReply(Frame):
    """Reset is done, lines are driven anew."""


@dataclass(frozen=True, slots=True)
class Stats(Frame):
    """Ask for the counters."""


@dataclass(frozen=True, slots=True)
class StatsReply(Frame):
    """Counters by name, see bus/counters.py."""

    counters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Timing(Frame):
    """Begin or end to measure where a CPU's time goes; beginning anew starts from zero."""

    on: bool


@dataclass(frozen=True, slots=True)
class TimingReply(Frame):
    """It will be so from the next instruction on."""


@dataclass(frozen=True, slots=True)
class Save(Frame):
    """Ask for the state record."""


@dataclass(frozen=True, slots=True)
class SaveReply(Frame):
    """The versioned state record, plain data."""

    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Load(Frame):
    """Replace the state by a saved record and drive all lines again."""

    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadReply(Frame):
    """The record fits and is in force."""


@dataclass(frozen=True, slots=True)
class Shutdown(Frame):
    """Handle what has arrived, flush the host side, exit 0."""


@dataclass(frozen=True, slots=True)
class Event(Frame):
    """News for the launcher: `kind` is a word such as ready, poweroff, reset, log; `text` is one line."""

    kind: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused(Frame):
    """The answer to a frame that is malformed or can't be served; `reason` is one line."""

    reason: str


# kind id -> class, direction. Ids are never reused; a new message gets the next free one.
TABLE: dict[int, tuple[type[Frame], Direction]] = {
    1: (Read, "request"),
    2: (ReadReply, "reply"),
    3: (Write, "request"),
    4: (WriteReply, "reply"),
    5: (PostedBatch, "one-way"),
    6: (StringIn, "request"),
    7: (StringInReply, "reply"),
    8: (StringOut, "request"),
    9: (StringOutReply, "reply"),
    16: (Line, "one-way"),
    17: (Intr, "one-way"),
    18: (IntAck, "request"),
    19: (IntAckReply, "reply"),
    20: (ApicMessage, "one-way"),
    21: (Eoi, "one-way"),
    32: (Ping, "request"),
    33: (Pong, "reply"),
    34: (Reset, "request"),
    35: (ResetReply, "reply"),
    36: (Stats, "request"),
    37: (StatsReply, "reply"),
    38: (Save, "request"),
    39: (SaveReply, "reply"),
    40: (Load, "request"),
    41: (LoadReply, "reply"),
    42: (Shutdown, "one-way"),
    43: (Event, "one-way"),
    44: (Refused, "reply"),
    45: (Timing, "request"),
    46: (TimingReply, "reply"),
}
KIND_OF: dict[type[Frame], int] = {cls: kind for kind, (cls, _) in TABLE.items()}

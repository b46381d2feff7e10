"""Every message that travels on the bus: one frozen struct each, numbered in one table.

On the wire a frame is a msgpack array `[version, kind, seq, ack, trace, span, clock_ns, *fields]`
(bus/codec.py). docs/bus-protocol.md is generated from this file; the first line of each docstring
goes there. Left out: DMA as messages (it comes with devices on another host), injection frames.

Rules
- One-way frames get no answer. A request is answered by its reply, or by `Refused`, with the request's
  trace and span in the header.
- A frame caused by another carries the cause's trace and a span of its own.
- The writes of one PostedBatch are spans `span`, `span + 1`, ... of the batch's trace.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

PROTOCOL_VERSION = 4
Direction = Literal["one-way", "request", "reply"]


class Header(NamedTuple):
    """What every frame carries besides its fields. All five are 64-bit and unsigned."""

    seq: int  # consecutive per (sender, receiver) stream; 0 for Ack and Resume, which are in none
    ack: int  # the last frame of the other direction that the sender has committed
    trace: int  # the causal chain, allocated by the originator of an I/O; 0 = none
    span: int  # this step of the chain
    clock_ns: int  # CLOCK_MONOTONIC of the sender when it encoded the frame


PostedWrite = tuple[str, int, int, int]  # region, offset, width, value


class Frame(msgspec.Struct, frozen=True):
    """Base of all messages."""


# --- register access: CPU node -> device ------------------------------------------------------------


class Read(Frame, frozen=True):
    """Read one register of `region` (a port range or MMIO range) after `writes`, posted ones that were still
    waiting for the same device; synchronous."""

    region: str
    offset: int
    width: int
    writes: tuple[PostedWrite, ...] = ()


class ReadReply(Frame, frozen=True):
    """The value read, zero-extended."""

    value: int


class Write(Frame, frozen=True):
    """Write one register; synchronous."""

    region: str
    offset: int
    width: int
    value: int


class WriteReply(Frame, frozen=True):
    """The write and all its effects are done, and the mirror page shows them."""


class PostedBatch(Frame, frozen=True):
    """Register writes in program order, without an answer."""

    writes: tuple[PostedWrite, ...]


class StringIn(Frame, frozen=True):
    """`rep ins`: read the same register `count` times."""

    region: str
    offset: int
    width: int
    count: int


class StringInReply(Frame, frozen=True):
    """`count * width` bytes, in the order in which they were read."""

    data: bytes


class StringOut(Frame, frozen=True):
    """`rep outs`: write `data`, `width` bytes at a time, to the same register."""

    region: str
    offset: int
    width: int
    data: bytes


class StringOutReply(Frame, frozen=True):
    """All of the string is written."""


# --- interrupts -----------------------------------------------------------------------------------


class Line(Frame, frozen=True):
    """An interrupt line changed: device -> every controller. `source` names the driver, as `node.line`."""

    irq: int
    level: bool
    source: str


class Intr(Frame, frozen=True):
    """The 8259's INT pin changed: PIC -> CPU node."""

    level: bool


class IntAck(Frame, frozen=True):
    """The CPU's INTA cycles: CPU node -> PIC; synchronous."""


class IntAckReply(Frame, frozen=True):
    """The vector, or nil when INT was no longer high: then no INTA took place and nothing is acknowledged."""

    vector: int | None


class ApicMessage(Frame, frozen=True):
    """An interrupt message on the APIC bus: I/O APIC -> every CPU node, which matches `dest` itself."""

    vector: int
    delivery_mode: int  # 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 start-up, 7 ExtINT
    dest: int
    dest_mode: int  # 0 physical, 1 logical
    trigger_level: bool  # level-triggered: the local APIC sends Eoi
    level_assert: bool


class Eoi(Frame, frozen=True):
    """End of a level-triggered interrupt: CPU node -> every I/O APIC."""

    vector: int


# --- control --------------------------------------------------------------------------------------


class Ping(Frame, frozen=True):
    """Are you there?"""


class Pong(Frame, frozen=True):
    """Yes, and all frames sent to me on this stream before the Ping are handled."""


class Reset(Frame, frozen=True):
    """The RESET pin. `start` is empty for devices; for a CPU node it holds the registers to start with."""

    start: dict[str, Any] = msgspec.field(default_factory=dict)


class ResetReply(Frame, frozen=True):
    """Reset is done, lines are driven anew."""


class Stats(Frame, frozen=True):
    """Ask for the counters."""


class StatsReply(Frame, frozen=True):
    """Counters by name, see bus/counters.py."""

    counters: dict[str, Any]


class Timing(Frame, frozen=True):
    """Begin or end to measure where a CPU's time goes; beginning anew starts from zero."""

    on: bool


class TimingReply(Frame, frozen=True):
    """It will be so from the next instruction on."""


class Save(Frame, frozen=True):
    """Ask for the state record."""


class SaveReply(Frame, frozen=True):
    """The versioned state record, plain data."""

    state: dict[str, Any]


class Load(Frame, frozen=True):
    """Replace the state by a saved record and drive all lines again."""

    state: dict[str, Any]


class LoadReply(Frame, frozen=True):
    """The record fits and is in force."""


class Pause(Frame, frozen=True):
    """Stand still: a CPU between two instructions, a device's timers and input, the machine's clock.

    Asked again, it says which frames have arrived by now.
    """


class PauseReply(Frame, frozen=True):
    """It stands, at `clock_ns` of the machine's clock.

    `frames`: for each connection, "who connected>to whom", the numbers of the last frames sent and taken.
    Where both ends agree, nothing is under way.
    """

    clock_ns: int
    frames: dict[str, Any]


class Continue(Frame, frozen=True):
    """Go on; the machine's clock is `clock_ns` when CLOCK_MONOTONIC is `host_ns`."""

    clock_ns: int
    host_ns: int


class ContinueReply(Frame, frozen=True):
    """It goes on."""


class Shutdown(Frame, frozen=True):
    """Handle what has arrived, flush the host side, exit 0."""


class Event(Frame, frozen=True):
    """News for the launcher: `kind` is a word such as ready, poweroff, reset, log; `text` is one line."""

    kind: str
    text: str
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class Ack(Frame, frozen=True):
    """Nothing but the `ack` of its header, where no other frame goes that way. With a `first` it begins a
    repetition: frames from that number on come again, or are yet to be sent."""

    first: int = 0


class Resume(Frame, frozen=True):
    """Send again what you retain from `ack` + 1 on: the answer to a gap; and, with a `first` as in Ack, to a
    connection."""

    first: int = 0


class Attend(Frame, frozen=True):
    """A new process is `node` from now on: see what it says on the CPU thread's own sockets. Launcher -> CPU
    node."""

    node: str


class Recording(Frame, frozen=True):
    """Whether to note what happens has changed: look at the trace ring. Launcher -> CPU node."""


class Refused(Frame, frozen=True):
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
    64: (Pause, "request"),
    65: (PauseReply, "reply"),
    66: (Continue, "request"),
    67: (ContinueReply, "reply"),
    47: (Ack, "one-way"),
    48: (Resume, "one-way"),
    49: (Attend, "one-way"),
    50: (Recording, "one-way"),
}
KIND_OF: dict[type[Frame], int] = {cls: kind for kind, (cls, _) in TABLE.items()}

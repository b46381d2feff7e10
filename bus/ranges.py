"""A block of device registers and the class of I/O of each: posted, mirrored or synchronous.

Devices declare ranges (devices/base.py), the address map carries them to the CPU node (bus/addressmap.py).
Why three classes: docs/decisions/002-three-classes-of-io.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec

Space = Literal["port", "mmio"]
WIDTHS = (1, 2, 4)  # bytes; what IN, OUT and a 32-bit load or store can carry


class BadRange(ValueError):
    """A device declares a register range that makes no sense."""


class IoRange(msgspec.Struct, frozen=True):
    """Registers of one device at consecutive addresses; the machine file supplies the base address.

    `widths`: access sizes in bytes that the device accepts whole and naturally aligned; wider or misaligned
    accesses are split, little-endian, before they reach it.
    The other sets hold offsets; a register in none of them is synchronous both ways.
    `names`: of registers by offset, as the data sheet has them, for people who read traces; "RBR|THR" where
    reading and writing reach different ones.
    """

    SPACE: ClassVar[Space]

    name: str
    length: int
    widths: tuple[int, ...] = (1,)
    posted: frozenset[int] = frozenset()  # writes without an answer, sent in batches
    prompt: frozenset[int] = frozenset()  # posted, but the batch leaves at once: a doorbell, an EOI
    mirrored: frozenset[int] = frozenset()  # reads without side effect, served from the shared page
    relaxed: frozenset[int] = frozenset()  # mirrored, and no posted write can change what is read
    own: frozenset[int] = frozenset()  # mirrored, and of posted writes only its own change what is read
    latched: tuple[tuple[int, int], ...] = ()  # (read, posted): one-byte registers, see bus.mirror.Latch
    names: Mapping[int, str] = {}

    def __post_init__(self) -> None:
        def require(truth: bool, complaint: str) -> None:
            if not truth:
                raise BadRange(f"range {self.name!r}: {complaint}")

        require(bool(self.name), "has no name")
        require(self.length > 0, f"length {self.length} is not above 0")
        widths = set(self.widths)
        require(bool(widths) and widths <= set(WIDTHS) and len(widths) == len(self.widths),
                f"widths {self.widths} are not distinct members of {WIDTHS}")  # fmt: skip
        for label in ("posted", "prompt", "mirrored", "relaxed", "own"):
            strays = sorted(offset for offset in getattr(self, label) if not 0 <= offset < self.length)
            require(not strays, f"{label} offsets {strays} lie outside its {self.length} bytes")
        require(
            self.prompt <= self.posted, f"prompt offsets {sorted(self.prompt - self.posted)} aren't posted"
        )
        require(self.relaxed <= self.mirrored,
                f"relaxed offsets {sorted(self.relaxed - self.mirrored)} aren't mirrored")  # fmt: skip
        require(self.own <= self.mirrored & self.posted - self.relaxed,
                f"own offsets {sorted(self.own)} aren't all mirrored, posted and not relaxed")  # fmt: skip
        for offset, setter in self.latched:
            require(0 <= offset < self.length and offset not in self.mirrored,
                    f"latched offset {offset} is mirrored or outside its {self.length} bytes")  # fmt: skip
            require(setter in self.posted, f"offset {setter}, which sets a latch, isn't posted")
        for offset, name in self.names.items():
            inside = 0 <= offset < self.length and name != ""
            require(inside, f"name {name!r} of offset {offset} is empty or outside its {self.length} bytes")

    def __hash__(self) -> int:
        return hash((self.name, self.length))

    def __repr__(self) -> str:
        """Without names: what a running machine was built upon (devices/tryout.py)."""
        said = [f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "names"]
        return f"{type(self).__name__}({', '.join(said)})"

    def register(self, offset: int, write: bool) -> str:
        """Name of the register at an offset: `LSR`, `QueueDesc+2` inside of a wider one, `range+0x5` of one
        without a name."""
        for inside in range(max(self.widths)):
            if name := self.names.get(offset - inside):
                first, _, second = name.partition("|")
                return (second if write and second else first) + (f"+{inside}" if inside else "")
        return f"{self.name}+{offset:#x}"

    def accepts(self, offset: int, width: int) -> bool:
        """Whether the device takes this access whole."""
        return width in self.widths and offset % width == 0 and 0 <= offset <= self.length - width


class PortRange(IoRange, frozen=True):
    """A block of I/O ports."""

    SPACE: ClassVar[Space] = "port"


class MmioRange(IoRange, frozen=True):
    """A block of memory-mapped registers."""

    SPACE: ClassVar[Space] = "mmio"

"""The regions of guest physical memory, and the E820 map that follows from them.

Sources: ACPI 6.5 section 15 (address range types); IBM PC/AT memory map for the range from 640 KiB
to 1 MiB. RAM is one region from 0 upwards, so a guest physical address is also the offset in its file.
Left out: RAM above 4 GiB, hot plug.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Any

import msgspec
from msgspec.structs import asdict

from bus import codemap

PAGE = 4096
E820_RAM, E820_RESERVED = 1, 2
LEGACY_HOLE = (0xA0000, 0x60000)  # video memory and ROMs of the PC/AT, 640 KiB to 1 MiB
APIC_RANGE = (0xFEC0_0000, 0x40_0000)  # I/O APICs at FEC0_0000, local APICs at FEE0_0000, firmware

Range = tuple[int, int, int]  # base, length, E820 type


class Kind(StrEnum):
    RAM = "ram"
    ROM = "rom"  # readers get a descriptor they cannot write through
    VRAM = "vram"
    RESERVED = "reserved"  # addresses only, nothing behind them
    MIRROR = "mirror"  # the bus's mirrored registers; not in the guest's address space
    CODE = "code"  # which pages hold translated code (bus/codemap.py); neither


class BadRegions(ValueError):
    """A set of regions that cannot be one machine's memory."""


class Region(msgspec.Struct, frozen=True):
    """`size` bytes at guest physical `base` (0 for what has no guest address)."""

    name: str
    kind: Kind
    base: int
    size: int
    file: str | None = None  # a file the user named; None: anonymous memory

    @property
    def end(self) -> int:
        return self.base + self.size

    def to_plain(self) -> dict[str, Any]:
        return {**asdict(self), "kind": str(self.kind)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Region:
        try:
            region = cls(**{**plain, "kind": Kind(plain["kind"])})
        except (TypeError, ValueError, KeyError) as e:
            raise BadRegions(f"not a region: {plain!r} ({e})") from e
        if region.size <= 0 or region.size % PAGE or region.base % PAGE or region.end > 1 << 32:
            raise BadRegions(f"region {region.name}: {region.base:#x}+{region.size:#x} is not made of pages")
        return region


def pc_regions(memory_size: int, mirror_pages: int, file: str | None = None) -> list[Region]:
    """RAM of `memory_size` bytes as a PC has it and the ranges it keeps free.

    With `mirror_pages` also what only the machine's processes see.
    """
    regions = [
        Region("ram", Kind.RAM, 0, memory_size, file),
        Region("legacy-hole", Kind.RESERVED, *LEGACY_HOLE),
        Region("apics", Kind.RESERVED, *APIC_RANGE),
    ]
    if mirror_pages:
        regions.append(Region("mirror", Kind.MIRROR, 0, mirror_pages * PAGE))
        regions.append(Region(codemap.REGION, Kind.CODE, 0, codemap.size_of(memory_size)))
    return regions


def check_regions(regions: Sequence[Region]) -> None:
    """Names are unique; what has bytes behind it does not overlap. RESERVED may lie over RAM."""
    names = [r.name for r in regions]
    if len(set(names)) != len(names):
        raise BadRegions(f"two regions have one name: {', '.join(names)}")
    backed = sorted((r for r in regions if r.kind in (Kind.RAM, Kind.ROM, Kind.VRAM)), key=lambda r: r.base)
    for low, high in pairwise(backed):
        if low.end > high.base:
            raise BadRegions(f"regions {low.name} and {high.name} overlap at {high.base:#x}")


def e820(regions: Iterable[Region], overlay: Iterable[Range] = ()) -> list[Range]:
    """The map for the guest: RAM, cut by everything reserved, then by `overlay` (a BootPlan's tables).

    Sorted, without overlaps, neighbours of one type joined. ROM and VRAM are reserved for E820.
    """
    regions = list(regions)
    layers = [(r.base, r.size, E820_RAM) for r in regions if r.kind is Kind.RAM]
    layers += [
        (r.base, r.size, E820_RESERVED) for r in regions if r.kind in (Kind.ROM, Kind.VRAM, Kind.RESERVED)
    ]
    result: list[Range] = []
    for base, length, kind in [*layers, *overlay]:
        result = [*_cut(result, base, base + length), (base, length, kind)]
    return _joined(sorted(r for r in result if r[1]))


def _cut(ranges: list[Range], start: int, end: int) -> list[Range]:
    """`ranges` without what lies in start..end."""
    kept: list[Range] = []
    for base, length, kind in ranges:
        if base < start:
            kept.append((base, min(base + length, start) - base, kind))
        if base + length > end:
            kept.append((max(base, end), base + length - max(base, end), kind))
    return kept


def _joined(ranges: list[Range]) -> list[Range]:
    joined: list[Range] = []
    for base, length, kind in ranges:
        if joined and joined[-1][2] == kind and joined[-1][0] + joined[-1][1] == base:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, kind)
        else:
            joined.append((base, length, kind))
    return joined

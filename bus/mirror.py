"""The mirror page: registers that the CPU node reads without a message.

One 4 KiB page per device in the memory node's region "mirror". The device's host is its only writer.
Layout: 1024 slots of 2 bytes, one per mirrored register byte in the order of `slots()`, each
`0x100 | value`, or 0 while the register has to be read synchronously; then, from byte 2048 on, 32 formula
records of 64 bytes: generation (odd while being written), kind, and five parameters, all 64-bit.
A slot that starts a formula holds `0x200 | record number`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bus.ranges import BadRange, IoRange

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Counter:
    """A register that counts by itself: `(start + (now - base_ns) * freq_hz / 10**9) & mask`.

    Covers `width` bytes from its offset on, and answers accesses of any width inside them.
    """

    base_ns: int
    freq_hz: int
    mask: int
    width: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A one-byte register that changes once: `before` until at_ns, `after` from then on."""

    before: int
    after: int
    at_ns: int


MirrorValue = int | Counter | Step
SLOTS = 1024


def slots(ranges: Iterable[IoRange]) -> dict[tuple[str, int], int]:
    """Slot number of every mirrored (region, offset) of a device, in the order of its declarations."""
    keys = [(r.name, offset) for r in ranges for offset in sorted(r.mirrored)]
    if len(keys) > SLOTS:
        raise BadRange(f"{len(keys)} mirrored registers do not fit into {SLOTS} slots")
    return {key: slot for slot, key in enumerate(keys)}

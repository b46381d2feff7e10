"""Writes that belong together, by device: what chance alone would take long to find.

A phrase is a sequence of (region, offset, values to choose from), or with the width of the access behind:
else it is the least that the region takes. The region "memory" is guest memory: offsets in it, dwords.
"""

from __future__ import annotations

from collections.abc import Sequence

BITS = (0, 0xFF, *(1 << n for n in range(8)))
BYTES = (*BITS, *range(0x10))

Word = tuple[str, int, Sequence[int]] | tuple[str, int, Sequence[int], int]

RING, DATA, STATUS = 0x4000, 0x6000, 0x7000  # where the phrases put a virtio driver's memory


def virtio_start(queues: int) -> tuple[Word, ...]:
    """A driver that takes all features but FLUSH and sets up every queue with 8 descriptors."""
    writes = [(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 28), (0x24, 1), (0x20, 1), (0x70, 0xB)]
    for queue in range(queues):
        at = RING + 0x800 * queue
        writes += [(0x30, queue), (0x38, 8), (0x80, at), (0x90, at + 0x200), (0xA0, at + 0x400), (0x44, 1)]
    return tuple(("regs", offset, (value,), 4) for offset, value in [*writes, (0x70, 0xF)])


def virtio_chain(queue: int, head: int, *parts: tuple[int, int, int]) -> tuple[Word, ...]:
    """Descriptors from `head` on: (pa, length, flags), each but the last with a next one."""
    words: list[Word] = []
    for n, (pa, length, flags) in enumerate(parts):
        at = RING + 0x800 * queue + 16 * (head + n)
        more = n + 1 < len(parts)
        words += [("memory", at, (pa,)), ("memory", at + 4, (0,)), ("memory", at + 8, (length,)),
                  ("memory", at + 12, (flags | more | head + n + 1 << 16,))]
    return tuple(words)


def virtio_offer(queue: int, heads: Sequence[int], indices: Sequence[int]) -> tuple[Word, ...]:
    """Heads in the available ring, one of the flags and indices given, the doorbell."""
    at = RING + 0x800 * queue + 0x200
    ring = tuple(("memory", at + 4 * n, (heads[n - 1] | heads[n] << 16,)) for n in range(1, len(heads), 1))
    first = (("memory", at, [index << 16 | flags for index in indices for flags in (0, 1)]),)
    return (*ring, *first, ("regs", 0x50, (queue,), 4))


PHRASES: dict[str, tuple[tuple[Word, ...], ...]] = {
    "uart16550": (
        (("regs", 3, (0x03,)), ("regs", 2, (0x00, 0x01, 0x87, 0xC1)), ("regs", 4, (0x08, 0x0B)),
         ("regs", 1, (1, 5, *range(16)))),
        (("regs", 3, (0x03, 0x83)), ("regs", 4, (0x10, 0x1A)), ("regs", 0, BITS), ("regs", 0, BITS)),
        (("regs", 3, (0x80,)), ("regs", 0, (0, 1, 12)), ("regs", 1, (0, 1)), ("regs", 3, (0x03, 0x07))),
    ),
    "pit8254": tuple(
        (
            ("port_b", 0, (0, 1, 3)),
            ("counters", 3, [n << 6 | access << 4 | mode << 1 | bcd
                             for access in (1, 2, 3) for mode in range(8) for bcd in (0, 1)]),
            ("counters", n, BYTES),
            ("counters", n, BYTES),
            ("port_b", 0, (0, 1, 3)),
            ("counters", 3, (n << 6, 0xC0 | 2 << n, 0xE0 | 2 << n)),
        )
        for n in range(3)
    ),
    "pic8259": tuple(
        phrase
        for chip in ("master", "slave")
        for phrase in (
            ((chip, 0, (0x11, 0x13)), (chip, 1, (0x30, 0x70)), (chip, 1, (4, 2)),
             (chip, 1, (0x01, 0x03, 0x11, 0x13)), (chip, 1, (0, 0, 0xFB, 0x55))),
            ((chip, 0, (0x0A, 0x0B, 0x0C, 0x48, 0x68)),),
            ((chip, 0, (0x20, 0x60, 0x64, 0x80, 0x00, 0xA0, 0xC3, 0xE2)),),
        )
    ),
    "rtc_cmos": (
        (("regs", 0, range(0x0E)), ("regs", 1, (*BYTES, *range(0x10, 0x30)))),
        (("regs", 0, (0x0A,)), ("regs", 1, (0x20, 0x23, 0x26, 0x2F, 0x60)), ("regs", 0, (0x0B,)),
         ("regs", 1, (0x00, 0x02, 0x12, 0x22, 0x42, 0x72, 0x06, 0x82)), ("regs", 0, (0x0C,))),
        tuple(("regs", n & 1, ((1, 3, 5)[n >> 1],) if not n & 1 else (0xC0, 0x00, 0x13)) for n in range(6)),
    ),
    "i8042": (
        (("command", 0, (0x60,)), ("data", 0, (0x00, 0x01, 0x41, 0x45, 0x55))),
        (("data", 0, (0xED, 0xF0, 0xF3)), ("data", 0, range(8))),
        (("data", 0, (0xEE, 0xF2, 0xF4, 0xF5, 0xF6, 0xFE, 0xFF)),),
        (("command", 0, (0x20, 0xA9, 0xAA, 0xAB, 0xAD, 0xAE, 0xC0, 0xD0, 0xDD, 0xDF, 0xE0, 0xFE)),),
        (("command", 0, range(0xD1, 0xD5)), ("data", 0, BITS)),
    ),
    "acpi_pm": ((("pm", 2, (0, 1)), ("pm", 3, (0, 1, 3)), ("pm", 0, BITS), ("pm", 5, (0, 0x14, 0x34))),),
    "ioapic": (
        (("regs", 0, range(0x10, 0x40)), ("regs", 0x10, (0x31, 0x8931, 0xA131, 0x18031, 0x10031, 0x8731))),
    ),
    "virtio_blk": (
        virtio_start(1),
        (("memory", DATA, (0, 1, 4, 8, 5)), ("memory", DATA + 8, (0, 1, 7, 8)), ("memory", DATA + 12, (0,)),
         *virtio_chain(0, 0, (DATA, 16, 0), (DATA + 0x100, 512, 2), (STATUS, 1, 2)),
         *virtio_offer(0, (0, 0, 0), range(5))),
        (("memory", DATA + 0x800, (1, 4)), ("memory", DATA + 0x808, (2,)), ("memory", DATA + 0x80C, (0,)),
         *virtio_chain(0, 3, (DATA + 0x800, 16, 0), (DATA + 0xA00, 1024, 0), (STATUS + 1, 1, 2)),
         *virtio_offer(0, (3, 3, 3, 3), range(6))),
        (("regs", 0x64, (0, 1, 2, 3), 4),),
        (("memory", RING + 0x200, [n << 16 for n in (1, 2, 3, 5, 9, 100)]), ("regs", 0x50, (0,), 4)),
    ),
    "virtio_console": (
        virtio_start(2),
        (*virtio_chain(0, 0, (DATA, 16, 2), (DATA + 0x20, 5, 2)), *virtio_offer(0, (0, 0, 0), range(5))),
        (("memory", DATA + 0x100, (0x6C6C6568,)), *virtio_chain(1, 2, (DATA + 0x100, 4, 0)),
         *virtio_offer(1, (2, 2, 2), range(5))),
        (("regs", 0x64, (0, 1, 2, 3), 4),),
    ),
}  # fmt: skip

"""Writes that belong together, by device: what chance alone would take long to find.

A phrase is a sequence of (region, offset, values to choose from).
"""

from __future__ import annotations

from collections.abc import Sequence

BITS = (0, 0xFF, *(1 << n for n in range(8)))
BYTES = (*BITS, *range(0x10))

PHRASES: dict[str, tuple[tuple[tuple[str, int, Sequence[int]], ...], ...]] = {
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
}  # fmt: skip

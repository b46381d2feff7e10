"""The segments of the tests: flat ones by the selectors that Linux gives user code, others in an LDT.

The host's LDT (modify_ldt) and the guest's hold the same descriptors, so that selectors mean the same on both
sides: data with a base and a limit, read-only, expand-down, not present; code with a base, execute-only code.

Source: Intel SDM volume 3, 3.4.5; Linux asm/ldt.h (user_desc).
Left out: 16-bit code and stacks, call and task gates and conforming code (no host process may have them).
"""

from __future__ import annotations

import struct
from random import Random
from typing import NamedTuple

from cpu_node.descriptor import pack

ES, CS, SS, DS, FS, GS = range(6)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
USER_CODE, USER_DATA = 0x23, 0x2B
FLAT = (USER_DATA, USER_CODE, USER_DATA, USER_DATA, 0, 0)
LDT_SELECTOR = 0x07  # index 0, table indicator, RPL 3

# user_desc.contents and bits of its flags word [asm/ldt.h]
DATA, EXPAND_DOWN, CODE = range(3)
FLAG_32BIT, CONTENTS_SHIFT, FLAG_READ_EXEC_ONLY, FLAG_PAGES, FLAG_NOT_PRESENT = 0x01, 1, 0x08, 0x10, 0x20
FLAG_USEABLE = 0x40
GRANULAR, BIG, AVAILABLE, PRESENT, DPL3, NOT_SYSTEM = 0x8000, 0x4000, 0x1000, 0x80, 0x60, 0x10


class LdtEntry(NamedTuple):
    """A descriptor; limit in units of `pages`."""

    base: int
    limit: int
    contents: int = DATA
    read_exec_only: bool = False
    pages: bool = False
    present: bool = True

    def user_desc(self, number: int) -> bytes:
        flags = FLAG_32BIT | self.contents << CONTENTS_SHIFT
        flags |= FLAG_READ_EXEC_ONLY if self.read_exec_only else 0
        flags |= (FLAG_PAGES if self.pages else 0) | (0 if self.present else FLAG_NOT_PRESENT)
        return struct.pack("<IIII", number, self.base, self.limit, flags)

    def descriptor(self) -> int:
        """As Linux makes it: accessed, DPL 3."""
        kind = 1 | self.contents << 2 | (0 if self.read_exec_only else 2)
        rights = kind | NOT_SYSTEM | DPL3 | BIG | (PRESENT if self.present else 0)
        return pack(self.base, self.limit, rights | (GRANULAR if self.pages else 0))


LDT = (
    LdtEntry(0x30000000, 0x1FFF),  # two writable pages
    LdtEntry(0x30000010, 0xFFFFF, pages=True),  # all of 4 GiB from an odd place: offsets wrap
    LdtEntry(0xE0001000, 0x0FFF),
    LdtEntry(0x30001000, 0x0FFF, read_exec_only=True),
    LdtEntry(0x2FFF0000, 0x0FFFF, EXPAND_DOWN),  # offsets from 10000h on
    LdtEntry(0x7F000000, 0x1FFF),
    LdtEntry(0x00000000, 0xFFFFF, pages=True),  # flat, by another selector
    LdtEntry(0x30000000, 0x0FFF, present=False),
    LdtEntry(0x20000000, 0x1FFF, CODE),
    LdtEntry(0x20000000, 0x1FFF, CODE, read_exec_only=True),
    LdtEntry(0x00000000, 0xFFFFF, CODE, pages=True),
)


def ldt_selector(number: int) -> int:
    return number << 3 | LDT_SELECTOR


DATA_SELECTORS = tuple(ldt_selector(n) for n, e in enumerate(LDT) if e.present and e.contents <= EXPAND_DOWN)
WRITABLE_SELECTORS = tuple(
    ldt_selector(n)
    for n, e in enumerate(LDT)
    if e.present and e.contents <= EXPAND_DOWN and not e.read_exec_only
)
STACK_SELECTOR = ldt_selector(5)
CODE_SELECTORS = (USER_CODE, *(ldt_selector(n) for n, e in enumerate(LDT) if e.contents == CODE))
# What an instruction may try to load: good, null, beyond the table, not present, supervisor's, code.
ANY_SELECTORS = (
    *(ldt_selector(n) for n in range(len(LDT) + 1)), *(ldt_selector(n) & ~3 for n in range(3)),
    0, 1, 3, USER_CODE, USER_DATA, USER_DATA & ~3, 0x10, 0x18, 0xFFFF, 0xFFF8,
)  # fmt: skip


def inside(selector: int, rng: Random, width: int) -> int | None:
    """An offset in the segment, at times across its end; None for a segment of 4 GiB."""
    number = selector >> 3
    if selector & LDT_SELECTOR != LDT_SELECTOR or number >= len(LDT) or LDT[number].pages:
        return None
    entry = LDT[number]
    if entry.contents == EXPAND_DOWN:
        return entry.limit + 1 + rng.randint(-2, 0x2000)
    return (
        rng.randrange(entry.limit + 2 - width)
        if rng.randrange(8)
        else entry.limit + 1 - rng.randint(0, width)
    )


def base_of(selector: int) -> int:
    """0 for anything that is not a good LDT selector."""
    number = selector >> 3
    return LDT[number].base if selector & LDT_SELECTOR == LDT_SELECTOR and number < len(LDT) else 0

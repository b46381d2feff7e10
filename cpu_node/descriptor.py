"""Segment registers and gates, parsed from descriptors once and interned.

Source: Intel SDM vol. 3A, sections 3.4.5 (segment descriptors), 3.5 (system descriptors), 6.11 (gates).
A Segment is the whole segment register, hidden part included, and immutable: loading one replaces the
object, and the same selector with the same descriptor gives the very same object (while the cache holds it).
Left out: the L bit and 16-byte system descriptors (no long mode).
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

ES, CS, SS, DS, FS, GS = range(6)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

# Descriptor access rights as Segment.rights holds them: bits 8..23 of the descriptor's high dword.
TYPE_MASK = 0x000F
TYPE_ACCESSED = 0x0001
TYPE_WRITABLE_OR_READABLE = 0x0002
TYPE_EXPAND_DOWN_OR_CONFORMING = 0x0004
TYPE_CODE = 0x0008
RIGHTS_S = 0x0010  # 0: system descriptor, 1: code or data
RIGHTS_DPL_SHIFT = 5
RIGHTS_PRESENT = 0x0080
RIGHTS_BIG = 0x4000  # D/B
RIGHTS_GRANULARITY = 0x8000
RIGHTS_MASK = 0xF0FF
ACCESSED_RAW = 1 << 40  # the accessed bit in the 64-bit descriptor
BUSY_RAW = 1 << 41  # the busy bit of a TSS descriptor

# System descriptor types [table 3-2].
TSS16_AVAILABLE, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16 = range(1, 8)
TSS32_AVAILABLE, TSS32_BUSY, CALL_GATE32, INTERRUPT_GATE32, TRAP_GATE32 = 9, 11, 12, 14, 15

SELECTOR_RPL = 0x0003
SELECTOR_TI = 0x0004
SELECTOR_INDEX = 0xFFF8

NEVER = -1  # Segment.data_cpl of a segment that no data register may hold


class Segment(msgspec.Struct, frozen=True, eq=False):
    """A segment register: the visible selector and the hidden descriptor cache.

    `limit` is in bytes, granularity applied. n bytes at offset o are inside iff lowest <= o and
    o + n - 1 <= highest; nothing is inside an unusable one.
    """

    selector: int
    base: int
    limit: int
    rights: int  # type, S, DPL, P in bits 0..7; AVL, L, D/B, G in bits 12..15
    usable: bool  # False: a null selector was loaded; any access is #GP(0)
    raw: int  # the 64-bit descriptor, 0 when there is none (real mode, V86, SYSENTER)
    type: int  # bits 0..3 of rights
    system: bool  # LDT, TSS or gate
    dpl: int
    present: bool
    big: bool  # D/B: 32-bit code, ESP instead of SP, 4 GiB expand-down
    code: bool
    conforming: bool
    expand_down: bool
    readable: bool
    writable: bool
    accessed: bool
    lowest: int
    highest: int
    flat: bool  # usable, base 0, all 4 GiB inside the limit
    mode: int  # what translated code can depend on besides the base and an unflat limit; 0..255
    data_cpl: int  # least privileged CPL that may load this selector into DS..GS, or NEVER

    @property
    def span(self) -> int:
        """65535 or 2^32 - 1: the mask of stack pointers in this segment."""
        return 0xFFFFFFFF if self.big else 0xFFFF


def build(selector: int, base: int, limit: int, rights: int, usable: bool = True, raw: int = 0) -> Segment:
    """A Segment from its hidden parts, everything derived filled in."""
    kind = rights & TYPE_MASK
    system = not rights & RIGHTS_S
    code = not system and bool(kind & TYPE_CODE)
    data = not system and not code
    big = bool(rights & RIGHTS_BIG)
    dpl = rights >> RIGHTS_DPL_SHIFT & 3
    present = bool(rights & RIGHTS_PRESENT)
    conforming = code and bool(kind & TYPE_EXPAND_DOWN_OR_CONFORMING)
    expand_down = data and bool(kind & TYPE_EXPAND_DOWN_OR_CONFORMING)
    readable = usable and (data or bool(kind & TYPE_WRITABLE_OR_READABLE)) and not system
    writable = usable and data and bool(kind & TYPE_WRITABLE_OR_READABLE)
    if not usable:
        lowest, highest = 0, -1
    elif expand_down:
        lowest, highest = limit + 1, 0xFFFFFFFF if big else 0xFFFF
    else:
        lowest, highest = 0, limit
    flat = usable and base == 0 and lowest == 0 and highest == 0xFFFFFFFF
    if not readable or not present:
        data_cpl = NEVER
    elif conforming:
        data_cpl = 3
    else:
        data_cpl = dpl if selector & SELECTOR_RPL <= dpl else NEVER
    bits = (big, flat, readable, writable, usable, expand_down, code, base == 0)
    mode = sum(bit << position for position, bit in enumerate(bits))
    return Segment(
        selector=selector, base=base, limit=limit, rights=rights, usable=usable, raw=raw, type=kind,
        system=system, dpl=dpl, present=present, big=big, code=code, conforming=conforming,
        expand_down=expand_down, readable=readable, writable=writable, accessed=bool(kind & TYPE_ACCESSED),
        lowest=lowest, highest=highest, flat=flat, mode=mode, data_cpl=data_cpl,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def parse(selector: int, raw: int) -> Segment:
    """The Segment for a selector and its 64-bit descriptor [3.4.5]."""
    base = raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000
    limit = raw & 0xFFFF | raw >> 32 & 0xF0000
    rights = raw >> 40 & RIGHTS_MASK
    if rights & RIGHTS_GRANULARITY:
        limit = limit << 12 | 0xFFF
    return build(selector, base, limit, rights, raw=raw)


@lru_cache(maxsize=64)
def null(selector: int, dpl: int = 0) -> Segment:
    """An unusable segment register: selectors 0 to 3."""
    return build(selector, 0, 0, dpl << RIGHTS_DPL_SHIFT | RIGHTS_S, usable=False)


@lru_cache(maxsize=1024)
def real_mode(selector: int, limit: int, big: bool) -> Segment:
    """A segment loaded with PE = 0: the base is selector * 16; limit and D/B stay what they were."""
    return build(selector, selector << 4, limit, 0x93 | (RIGHTS_BIG if big else 0))


@lru_cache(maxsize=64)
def flat(selector: int, rights: int) -> Segment:
    """A 4 GiB segment that no descriptor backs: SYSENTER and SYSEXIT [5.8.7]."""
    return build(selector, 0, 0xFFFFFFFF, rights)


@lru_cache(maxsize=1024)
def virtual8086(selector: int) -> Segment:
    """A segment in virtual-8086 mode [20.1.2]: base = selector * 16, 64 KiB, writable, DPL 3."""
    return build(selector, selector << 4, 0xFFFF, 0xF3)


class Gate(msgspec.Struct, frozen=True, eq=False):
    """A call, interrupt, trap or task gate [5.8.3, 6.11]."""

    type: int
    selector: int
    offset: int
    dpl: int
    present: bool
    parameters: int  # call gates: words or dwords to copy
    size: int  # operand size of the frame in bytes: 2 or 4
    is_interrupt: bool  # clears IF
    valid_in_idt: bool


@lru_cache(maxsize=1024)
def gate(raw: int) -> Gate:
    """The Gate for a 64-bit descriptor; ask `type` what it is."""
    rights = raw >> 40 & 0xFF
    kind = rights & TYPE_MASK if not rights & RIGHTS_S else 0
    wide = kind in (CALL_GATE32, INTERRUPT_GATE32, TRAP_GATE32)
    offset = raw & 0xFFFF | (raw >> 32 & 0xFFFF0000 if wide else 0)
    return Gate(
        type=kind,
        selector=raw >> 16 & 0xFFFF,
        offset=offset,
        dpl=rights >> RIGHTS_DPL_SHIFT & 3,
        present=bool(rights & RIGHTS_PRESENT),
        parameters=raw >> 32 & 0x1F,
        size=4 if wide else 2,
        is_interrupt=kind in (INTERRUPT_GATE16, INTERRUPT_GATE32),
        valid_in_idt=kind in (TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16, INTERRUPT_GATE32, TRAP_GATE32),
    )


def pack(base: int, limit: int, rights: int) -> int:
    """The 64-bit descriptor with a raw 20-bit limit and rights as in Segment.rights: the inverse of parse."""
    return (
        limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (base & 0xFF000000) << 32
        | (limit & 0xF0000) << 32 | (rights & RIGHTS_MASK) << 40
    )  # fmt: skip


def pack_gate(
    kind: int, selector: int, offset: int, dpl: int = 0, present: bool = True, parameters: int = 0
) -> int:
    """The 64-bit descriptor of a gate: the inverse of `gate`."""
    rights = kind | dpl << RIGHTS_DPL_SHIFT | (RIGHTS_PRESENT if present else 0)
    return offset & 0xFFFF | selector << 16 | parameters << 32 | rights << 40 | (offset & 0xFFFF0000) << 32

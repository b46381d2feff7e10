"""EFLAGS: the masks, and PUSHF, POPF, CLI, STI by privilege.

Source: Intel SDM vol. 1 section 3.4.3, vol. 3A section 2.3, instruction pages of vol. 2.
Left out: VME and PVI, so VIF and VIP are never changed by CLI, STI and POPF.
"""

from __future__ import annotations

CF, PF, AF, ZF, SF = 0x0001, 0x0004, 0x0010, 0x0040, 0x0080
TF, IF, DF, OF = 0x0100, 0x0200, 0x0400, 0x0800
IOPL, IOPL_SHIFT, NT = 0x3000, 12, 0x4000
RF, VM, AC, VIF, VIP, ID = 0x01_0000, 0x02_0000, 0x04_0000, 0x08_0000, 0x10_0000, 0x20_0000
FIXED = 0x0002  # bit 1 reads as one, bits 3, 5, 15 and 22..31 as zero
STATUS = CF | PF | AF | ZF | SF | OF
DEFINED = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID


def popf_merged(old: int, value: int, cpl: int, size: int) -> int:
    """EFLAGS after POPF (size 2) or POPFD (size 4) of `value`; the caller has refused V86 with IOPL < 3."""
    changeable = STATUS | TF | DF | NT
    if size == 4:
        changeable |= AC | ID
    if cpl == 0:
        changeable |= IOPL
    if cpl <= (old & IOPL) >> IOPL_SHIFT:
        changeable |= IF
    kept = old & ~changeable
    if size == 4:
        kept &= ~RF
    return kept | value & changeable | FIXED

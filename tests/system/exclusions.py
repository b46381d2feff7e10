"""Where QEMU's TCG is known to differ from the manual, so that a difference there says nothing about us.

Source: Intel SDM vol. 3A (sections in brackets); what QEMU does was seen with its version 7.2. An exclusion
covers single words of the arena, never a whole scenario.
"""

# ruff: noqa: E501 (tables of text)
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.system import places as p

FLAG_PLACES = re.compile(r"(stack|V86 stack|log|TSS|data)")


@dataclass(frozen=True, slots=True)
class Exclusion:
    """`covers(place, ours, theirs)`: is this word's difference the known one?"""

    name: str
    section: str
    reason: str
    covers: Callable[[str, int, int], bool]
    subjects: tuple[str, ...] = ()  # () is all


def _flag_bits(place: str, changed: int) -> int:
    """The same in EFLAGS where that lies across two dwords, behind an odd number of 16-bit pushes."""
    return changed << 16 if "stack" in place and changed < 0x20 else changed


def _resume_flag(place: str, ours: int, theirs: int) -> bool:
    return bool(FLAG_PLACES.match(place)) and _flag_bits(place, ours ^ theirs) == 0x10000


def _virtual_interrupt(place: str, ours: int, theirs: int) -> bool:
    changed = _flag_bits(place, ours ^ theirs)
    return bool(FLAG_PLACES.match(place)) and bool(changed & 0x180000) and not changed & ~0x190000


def _code_accessed(place: str, ours: int, theirs: int) -> bool:
    return place[:3] in ("GDT", "LDT") and ours ^ theirs == 0x100 and ours & 0x1900 == 0x1900


def _read_modify_write(place: str, ours: int, theirs: int) -> bool:
    if place.startswith(("page table", "page directory")):
        return theirs == ours | 0x20
    return place.startswith(("log", "stack")) and ours & 2 != 0 and theirs == ours & ~2 and ours < 8


def _data_accessed(place: str, ours: int, theirs: int) -> bool:
    return place[:3] in ("GDT", "LDT") and ours ^ theirs == 0x100 and ours & 0x1900 == 0x1100


def _external(place: str, ours: int, theirs: int) -> bool:
    return place.startswith(("log", "stack")) and ours & 1 == 1 and theirs == ours & ~1 and ours < 0x800


def _directory_accessed(place: str, ours: int, theirs: int) -> bool:
    return place.startswith("page directory") and theirs == ours | 0x20


def _other_hits(place: str, ours: int, theirs: int) -> bool:
    return place.endswith(".dr6") and theirs & ~0xF == ours & ~0xF and bool(ours & 0x400F)


def _new_task_eip(place: str, ours: int, theirs: int) -> bool:
    return place in ("TSS B+20", "TSS D+20", "TSS E+20", "TSS 16+e") and ours ^ theirs < 0x1000


def _general_detect(place: str, ours: int, theirs: int) -> bool:
    return place.endswith(".dr7") and theirs & ~ours == 0x2000 and not ours & ~theirs


def _last_of_repeated(place: str, ours: int, theirs: int) -> bool:
    return (place.endswith(".frame0") or place.startswith("stack")) and ours - theirs == 2 and ours >= p.CODE


def _conforming(place: str, ours: int, theirs: int) -> bool:
    return place.startswith(("log", "stack")) and ours < 0x200 and ours & 3 != 0 and theirs == ours & ~3


EXCLUSIONS = (
    Exclusion("RF", "17.3.1.1", "QEMU neither sets RF in the EFLAGS that a fault pushes, nor clears it behind the "
              "instruction that IRET returned to", _resume_flag),
    Exclusion("VIF, VIP", "2.3, vol. 2 IRET", "QEMU's IRET at CPL 0 keeps VIF and VIP; the manual loads them",
              _virtual_interrupt),
    Exclusion("accessed bit of code", "3.4.5.1", "QEMU does not set the accessed bit of a code segment's descriptor "
              "when a transfer, gate or return loads CS", _code_accessed),
    Exclusion("read-modify-write", "4.7", "QEMU reads first: the page fault's error code says read, and A is set where "
              "the write is refused; a processor asks for write access at once", _read_modify_write,
              ("read-modify-write paging",)),
    Exclusion("accessed bit of data", "3.4.5.1", "nor that of a data segment which a transfer, return or task loads", _data_accessed,
              ("returns", "far transfers", "gates", "task switches")),
    Exclusion("EXT", "6.13", "error codes of gates that can't deliver an exception: QEMU leaves EXT clear", _external),
    Exclusion("accessed bit of directory entries", "4.8", "where the page-table entry refuses: QEMU has set A in the "
              "directory by then, ours sets it with a translation that succeeds; the manual leaves it open",
              _directory_accessed),
    Exclusion("DR6.B0-B3", "17.2.3", "QEMU also reports breakpoints that are not enabled, or were hit before, "
              "and only one of two at the same place", _other_hits),
    Exclusion("data breakpoint in the last REP", "17.2.5", "the trap comes behind the whole instruction: its EIP is the "
              "next; QEMU pushes the REP's own, with ECX = 0", _last_of_repeated, ("debugging",)),
    Exclusion("RPL of a conforming CS", "vol. 2 CALL", "a call gate to conforming code: QEMU gives CS the segment's DPL "
              "as RPL, the manual the CPL", _conforming, ("far transfers",)),
    Exclusion("EIP of a task that can't start", "7.3", "a fault in the new task: QEMU mixes in EIP of the old one",
              _new_task_eip, ("task switches",)),
    Exclusion("DR7.GD", "17.2.4", "QEMU leaves GD set when a debug exception is delivered", _general_detect),
)  # fmt: skip


# (what, SDM section, what QEMU does). Scenarios keep off these.
AVOIDED = (
    (
        "accesses beyond a segment's limit, or against its type",
        "5.3, 5.5",
        "checks neither; tests/insn has them, with the host's processor as the judge",
    ),
    (
        "operands across offset FFFFh in virtual-8086 mode",
        "20.1.1, 22.34.1, and each instruction's virtual-8086 mode exceptions",
        "accesses the byte behind; the manual says #GP(0), #SS(0) in the stack segment",
    ),
    (
        "JMP through a call gate to a code segment that isn't present",
        "vol. 2 JMP, CALL-GATE",
        "#GP of its selector; the manual says #NP of it",
    ),
    ("CR0: PG without PE, NW without CD", "2.5", "raises no #GP"),
    ("CR4: reserved bits", "2.5", "takes some of them and stops"),
    ("LTR with a null selector", "vol. 2 LTR", "takes it; the manual says #GP(0)"),
    ("RDMSR, WRMSR of an MSR that isn't there", "vol. 2 RDMSR", "reads 0; the manual says #GP"),
    (
        "SYSENTER with IA32_SYSENTER_CS of 1 to 3",
        "vol. 2 SYSENTER",
        "looks at the whole value; the manual at bits 15 to 2",
    ),
    ("DR7.GD", "17.2.4", "has no general detect"),
    ("DR6 bit 12", "17.2.3", "keeps what is written; the manual has it read 0"),
    ("INT1 (F1h)", "vol. 2 INT", "#UD; the manual says #DB"),
    ("EMMS with CR0.EM", "vol. 2 EMMS", "executes it; the manual says #UD"),
    (
        "MMX and SSE where #UD (CR0.EM, CR4.OSFXSR) and #NM (CR0.TS) meet",
        "2.5",
        "#NM comes first; on ours #UD",
    ),
    ("task gates whose selector is of the LDT", "7.2.5", "#TS; the manual says #GP"),
    (
        "faults in a new task without a stack segment yet",
        "7.3",
        "pushes to what SS was; ours, having no stack, goes "
        "on to a double fault. So handlers of 10 to 13 are tasks where tasks are switched",
    ),
    (
        "a task's CS that is conforming code of a lower DPL than RPL",
        "table 7-1",
        "#TS; ours takes it, as transfers do",
    ),
    (
        "null selectors 1 to 3 when privilege is lowered",
        "vol. 2 IRET",
        "sets them to 0; ours, pointing to no segment, stay",
    ),
    ("the upper halves of registers after a switch to a 16-bit task", "7.6", "keeps some; undefined"),
    ("gates that lead from virtual-8086 mode to CPL 1 or 2", "20.3.1", "takes them; the manual says #GP"),
    ("STI; MOV SS: a shadow in a shadow", "vol. 2 MOV", "ends it with the first; the manual allows both"),
    ("read-modify-writes across two pages", "4.7", "looks at both pages before it faults; open"),
    ("a frame that runs below address 0", "6.12", "has written part of it when it faults; open"),
    ("data breakpoints with single steps", "17.3.1", "loses or doubles some when both meet"),
    (
        "unaligned accesses near a data breakpoint",
        "17.2.5",
        "hits breakpoints beside the operand, in the same dword",
    ),
    ("bits 19 to 16 of what LAR loads", "vol. 2 LAR", "clears them; undefined"),
)


def excluded(subject: str, place: str, ours: int, theirs: int) -> Exclusion | None:
    """The exclusion that covers a word's difference."""
    for exclusion in EXCLUSIONS:
        if (not exclusion.subjects or subject in exclusion.subjects) and exclusion.covers(
            place, ours, theirs
        ):
            return exclusion
    return None

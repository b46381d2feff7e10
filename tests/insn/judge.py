"""Whether two outcomes of a case agree, and where a difference doesn't count.

Source: Intel SDM volume 3, 5.3 (limits), 6.15 (vectors).
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

from cpu_node.decode import MAX_LENGTH, TooLong, Truncated, Undefined, decode
from tests.insn.draft import HLTS_BEHIND, READ_ONLY_PAGES, RW_PAGES, TOP
from tests.insn.exclusions import Reason
from tests.insn.segments import FLAT
from tests.insn.state import (
    EBP,
    ESP,
    PAGE_FAULT,
    PAGE_SIZE,
    TRANSLATED_INSTEAD,
    Blind,
    Case,
    CpuState,
    differences,
)

ALIGNMENT_CHECK, GENERAL_PROTECTION = 17, 13
DATA_PAGES = frozenset((*RW_PAGES, *READ_ONLY_PAGES))
OPERAND_VECTORS = frozenset((12, 13, 14))
LIMIT_VECTORS = frozenset((12, 13))
WRAPPING = 0xFFFFFE00  # an FXSAVE image before 4 GiB
NO_MASKS = Blind()
ENTER_ROW = "C8 enter"
_NO_VERDICT = {"hung": Reason.NO_END, "syscall": Reason.SYSTEM_CALL, "crashed": Reason.ENDED_PROCESS}


class Verdict(Enum):
    AGREED = auto()
    MASKED = auto()  # agreed but for what the architecture leaves undefined
    DIFFERS = auto()


def no_verdict(native: CpuState) -> Reason | None:
    """Why the outcome on the host is nothing to compare with."""
    return _NO_VERDICT.get(native.stop.kind)


def judge(case: Case, native: CpuState, other: CpuState) -> tuple[Verdict | Reason, list[str]]:
    """The verdict or the reason why there is none, and for DIFFERS the differences."""
    lines = differences(case, native, other)
    if lines:
        reason = excluded(case, native, other)
        return (reason, []) if reason else (Verdict.DIFFERS, lines)
    if case.blind != NO_MASKS and differences(replace(case, blind=NO_MASKS), native, other):
        return Verdict.MASKED, []
    return Verdict.AGREED, []


def excluded(case: Case, native: CpuState, other: CpuState) -> Reason | None:
    """Why a difference doesn't count."""
    if other.stop.kind == TRANSLATED_INSTEAD:
        return Reason.NOT_DIRECT
    if native.stop.vector == ALIGNMENT_CHECK and any("0F" in row for row in case.rows):
        return Reason.ALIGNED_16
    both_fault = native.stop.kind == other.stop.kind == "fault"
    if both_fault and native.eip == other.eip and any("cmps" in row for row in case.rows):
        return Reason.CMPS_ORDER
    returns = any(row.endswith((" retf", " iret")) for row in case.rows)
    looked = returns and native.stop.vector in (PAGE_FAULT, ALIGNMENT_CHECK)
    if looked and other.stop.vector == GENERAL_PROTECTION and other.stop.error:
        return Reason.OUTER_STACK
    ordered = case.selectors == FLAT and not case.blind.fault_page_only
    if both_fault and not ordered and native.eip == other.eip and native.stop.vector in OPERAND_VECTORS:
        return Reason.OPERAND_ORDER
    if any(_in_data(case, state.eip) for state in (native, other)):
        return Reason.IN_DATA
    if _wraps(case, native, other):
        return Reason.WRAPS
    if _overwrites_itself(case, native):
        return Reason.OWN_STRING
    if other.served and _overwrites_its_display(case):
        return Reason.OWN_DISPLAY
    return None


def _in_data(case: Case, eip: int) -> bool:
    """Not the case's code, nor the HLTs behind it."""
    return eip & -PAGE_SIZE in DATA_PAGES and not 0 <= eip - case.eip < case.code_length + HLTS_BEHIND


def _wraps(case: Case, native: CpuState, other: CpuState) -> bool:
    stop = other.stop
    if native.stop.vector not in LIMIT_VECTORS:
        return False
    if stop.vector == ALIGNMENT_CHECK:
        return native.eip == other.eip and _operand_wraps(case, native)
    if stop.vector != PAGE_FAULT:
        return False
    return stop.va >= WRAPPING or (stop.va < -WRAPPING % (1 << 32) and any(p.va == TOP for p in case.pages))


def _operand_wraps(case: Case, state: CpuState) -> bool:
    """Does the ModRM operand of the instruction that faulted run past the end of its segment's offsets?"""
    code = case.code()[state.eip - case.eip & 0xFFFFFFFF :]
    try:
        insn = decode(code)
    except (Undefined, TooLong, Truncated):
        return False
    if not insn.is_memory or insn.addr16:
        return False
    pieces = [0 if r is None else state.regs[r] for r in (insn.base, insn.index)]
    offset = pieces[0] + (pieces[1] << insn.scale) + insn.disp & 0xFFFFFFFF
    return offset + insn.row.memory_width(insn.opsize16) > 1 << 32


def _overwrites_itself(case: Case, native: CpuState) -> bool:
    """A repeated string instruction stored to its own bytes: is it still itself in the next iteration?"""
    if not any("sb" in row or "sv" in row for row in case.rows):
        return False
    before = case.code()
    after = replace(case, pages=tuple(p._replace(data=native.changed.get(p.va, p.data)) for p in case.pages))
    return after.code() != before


def _overwrites_its_display(case: Case) -> bool:
    """Is the case a nested ENTER that pushes into the pointers it copies? What it has pushed stays when the
    last page that it looks at is absent, on the host as well (test_native.py)."""
    if case.rows != (ENTER_ROW,):
        return False
    insn = decode(case.code().ljust(MAX_LENGTH, b"\xf4"))
    size = 2 if insn.opsize16 else 4
    level = insn.imm2 & 31
    copied_from, copied_to = case.regs[EBP] - size * (level - 1), case.regs[EBP]
    pushed_from, pushed_to = case.regs[ESP] - size * (level + 1), case.regs[ESP]
    return level > 1 and pushed_from < copied_to and copied_from < pushed_to

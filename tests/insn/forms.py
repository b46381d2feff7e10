"""Which forms of instructions the cases have, counted: what "every addressing form" comes to.

Only cases of one instruction are looked at: their registers are known when it begins.
Source: Intel SDM volume 2, tables 2-1 to 2-3 (addressing forms).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cpu_node.decode import Insn, TooLong, Truncated, Undefined, decode
from cpu_node.table import Row
from tests.insn.exclusions import TESTED_ROWS
from tests.insn.segments import base_of
from tests.insn.state import DF, ECX, PAGE_FAULT, PAGE_SIZE, Case, CpuState

MASK = 0xFFFFFFFF
NOT_OPERANDS = frozenset(("lea", "hintnop"))  # their address is never used
ABSENT, PROTECTED = 0, 1  # bit 0 of a page fault's error code
REPEATS = {0: "once", 0xF2: "repne", 0xF3: "rep"}
SEGMENT_PREFIXES = 6


def has_memory_operand(row: Row) -> bool:
    """Can ModRM name a memory operand that is accessed?"""
    return (
        row.mod != "r" and row.rm is None and row.rm_operand[:1] in tuple("EMWQ") and row.access != "-"
        and row.action not in NOT_OPERANDS
    )  # fmt: skip


MEMORY_ROWS = tuple(row for row in TESTED_ROWS if has_memory_operand(row))
WRITING_ROWS = tuple(row for row in MEMORY_ROWS if row.access in "wm")
LOCKABLE_ROWS = tuple(row for row in TESTED_ROWS if row.lockable)
STRING_ROWS = tuple(row for row in TESTED_ROWS if row.action == "string")


def count_forms(forms: Counter[str], cases: Iterable[Case], native: Sequence[CpuState]) -> None:
    """Add what the cases are; `native` is what each did on the host."""
    last, insn = b"", None
    for case, state in zip(cases, native, strict=True):
        if len(case.rows) != 1 or state.stop.kind not in ("hlt", "fault"):
            continue
        code = case.code()
        if code != last:
            last, insn = code, _decoded(code)
        if insn is not None:
            forms["instances"] += 1
            for form in _forms(case, insn, state):
                forms[form] += 1


def _decoded(code: bytes) -> Insn | None:
    try:
        return decode(code)
    except (Undefined, TooLong, Truncated):
        return None


def _forms(case: Case, insn: Insn, state: CpuState) -> Iterable[str]:
    row = insn.row
    yield f"row {row.key}"
    if case.code_va % PAGE_SIZE + insn.length > PAGE_SIZE:
        yield f"across {row.key}"
    if insn.segment is not None:
        yield f"segment {insn.segment}"
    if row.action == "string":
        down = "down" if case.eflags & DF else "up"
        yield f"string {row.key} {REPEATS[insn.rep]} {down} {16 if insn.addr16 else 32}"
        if insn.rep and state.stop.vector == PAGE_FAULT and state.regs[ECX] != case.regs[ECX]:
            yield f"middle {row.key} {down}"
    if not insn.is_memory or row.access == "-" or row.action in NOT_OPERANDS:
        return
    if insn.addr16:
        yield f"a16 {insn.mod} {insn.rm}"
    elif insn.sib >= 0:
        yield f"sib {insn.mod} {insn.sib >> 6} {insn.sib >> 3 & 7} {insn.sib & 7}"
    else:
        yield f"a32 {insn.mod} {insn.rm}"
    if insn.lock:
        yield f"lock {row.key}"
    yield from _operand(case, insn, state)


def _operand(case: Case, insn: Insn, state: CpuState) -> Iterable[str]:
    key, width = insn.row.key, insn.row.memory_width(insn.opsize16)
    pieces = [0 if r is None else case.regs[r] for r in (insn.base, insn.index)]
    total = pieces[0] + (pieces[1] << insn.scale) + (insn.disp & MASK)
    mask = 0xFFFF if insn.addr16 else MASK
    va = base_of(case.selectors[insn.default_segment]) + (total & mask) & MASK
    if state.stop.kind == "hlt":
        yield f"memory {key}"
        if va % PAGE_SIZE + width > PAGE_SIZE:
            yield f"crossing {key}"
        if width in (2, 4, 8, 16) and va % width:
            yield f"unaligned {key}"
        if total > mask:
            yield f"wrapped {key}"
    elif state.stop.vector == PAGE_FAULT and state.eip == case.eip:
        yield f"{'read-only' if state.stop.error & PROTECTED else 'absent'} {key}"


def _distinct(forms: Counter[str], kind: str) -> int:
    return sum(1 for form in forms if form.startswith(kind + " "))


def summary(forms: Counter[str]) -> list[tuple[str, int, int]]:
    """(what, how many different ones were met, how many there are)."""
    rows, memory, writing, strings = map(len, (TESTED_ROWS, MEMORY_ROWS, WRITING_ROWS, STRING_ROWS))
    names = {row.key for row in MEMORY_ROWS}

    def of(kind: str) -> int:
        return sum(f"{kind} {name}" in forms for name in names)

    return [
        ("rows of the instruction table that can be judged", _distinct(forms, "row"), rows),
        ("... in instructions that lie across two pages", _distinct(forms, "across"), rows),
        ("forms of 32-bit addresses without SIB (mod, r/m)", _distinct(forms, "a32"), 21),
        ("forms with SIB (mod, scale, index, base)", _distinct(forms, "sib"), 768),
        ("forms of 16-bit addresses (mod, r/m)", _distinct(forms, "a16"), 24),
        ("segment prefixes", _distinct(forms, "segment"), SEGMENT_PREFIXES),
        ("rows that can have a memory operand: executed with one", of("memory"), memory),
        ("... with one across two pages", of("crossing"), sum(_is_wide(r) for r in MEMORY_ROWS)),
        ("... with one that isn't aligned", of("unaligned"), sum(_may_be_unaligned(r) for r in MEMORY_ROWS)),
        ("... with an address that wraps at 4 GiB or 64 KiB", of("wrapped"), memory),
        ("... stopped by an absent page", of("absent"), memory),
        ("rows that write memory: stopped by a read-only page", of("read-only"), writing),
        ("LOCK forms", _distinct(forms, "lock"), len(LOCKABLE_ROWS)),
        ("string instructions: once, REP, REPNE; DF 0 and 1; 16 and 32 bits", _distinct(forms, "string"),
         12 * strings),
        ("... stopped in the middle; DF 0 and 1", _distinct(forms, "middle"), 2 * strings),
    ]  # fmt: skip


def _is_wide(row: Row) -> bool:
    return row.memory_width(False) > 1 and not _always_aligned(row)


def _may_be_unaligned(row: Row) -> bool:
    widths = {row.memory_width(False), row.memory_width(True)}
    return not widths.isdisjoint((2, 4, 8, 16)) and not _always_aligned(row)


def _always_aligned(row: Row) -> bool:
    """An operand of 16 bytes that raises #GP where it isn't aligned."""
    return row.memory_width(False) >= 16 and row.mnemonic not in MAY_BE_UNALIGNED


MAY_BE_UNALIGNED = frozenset(
    ("movups", "movupd", "movdqu", "lddqu", "pcmpestri", "pcmpestrm", "pcmpistri", "pcmpistrm", "fnsave",
     "frstor", "fnstenv", "fldenv")
)  # fmt: skip

"""Opcode groups: the lines of the conformance table."""

from __future__ import annotations

from cpu_node.table import Row

SEQUENCE, SELF_MODIFYING, ILLEGAL = "sequences", "self-modifying code", "no instruction"
_BITS = frozenset(("bt", "bts", "btr", "btc", "bsf", "bsr", "popcnt", "bswap"))
_SHIFTS = frozenset(("rol", "ror", "rcl", "rcr", "shl", "shr", "sar", "shld", "shrd"))
_PRODUCTS = frozenset(("mul", "imul", "div", "idiv", "aam", "aad"))
_ATOMIC = frozenset(("cmpxchg", "cmpxchg8b", "xadd", "xchg"))
_STACK = frozenset(
    ("push", "pushimm", "pushm", "pop", "popm", "pusha", "popa", "pushf", "popf", "pushseg", "leave")
)
_CONTROL = frozenset(("jcc", "jmp", "call", "ret", "icall", "ijmp", "loop"))
_TRAPS = frozenset(("int", "int1", "int3", "into", "bound", "ud2"))
_SEGMENTS = frozenset(
    ("les", "lds", "lss", "lfs", "lgs", "lar", "lsl", "verr", "verw", "arpl", "mov", "pop", "call", "jmp",
     "retf", "iret")
)  # fmt: skip
_ADJUST = frozenset(("daa", "das", "aaa", "aas", "salc"))

GROUPS = (
    "arithmetic and moves", "multiply and divide", "shifts", "bits", "exchanges", "stack", "control transfer",
    "segments and far transfer", "string", "x87", "mmx", "sse", "sse2, sse3", "ssse3, sse4", "traps",
    "system", SEQUENCE, SELF_MODIFYING, ILLEGAL,
)  # fmt: skip


def group_of(row: Row) -> str:
    """One of GROUPS."""
    name = row.mnemonic
    if row.group in ("string", "x87", "mmx"):
        return row.group if row.map < 2 else "ssse3, sse4"
    if row.group == "sse":
        if row.map >= 2:
            return "ssse3, sse4"
        return "sse" if row.prefix in (0, 0xF3) else "sse2, sse3"
    for names, group in (
        (_PRODUCTS, "multiply and divide"), (_SHIFTS, "shifts"), (_BITS, "bits"), (_ATOMIC, "exchanges"),
        (_TRAPS, "traps"),
    ):  # fmt: skip
        if name in names:
            return group
    if row.action in _STACK or name == "enter":
        return "stack"
    if row.action in _CONTROL:
        return "control transfer"
    if row.action == "movfromseg" or (row.group == "system" and name in _SEGMENTS and not _is_control(row)):
        return "segments and far transfer"
    if row.group == "system" and name not in _ADJUST and name != "crc32":
        return "system"
    return "system" if row.action in ("cli", "sti") else "arithmetic and moves"


def _is_control(row: Row) -> bool:
    """MOV to or from a control or debug register."""
    return any(operand[0] in "CD" and operand[1:] == "d" for operand in row.operands)

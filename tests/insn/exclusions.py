"""What the host CPU cannot judge, and why: rows that are not tried, and outcomes that are not compared.

Everything else in the table is tried, and every other difference is a failure.
"""

from __future__ import annotations

from enum import StrEnum

from cpu_node.table import Row, all_rows

HOST_KERNEL = "enters the host kernel"
EXCLUDED: dict[str, str] = {
    "rdtsc": "result depends on time",
    "rdpmc": "result depends on time",
    "cpuid": "the guest has a CPU model of its own",
    **dict.fromkeys(("sgdt", "sidt", "sldt", "str", "smsw"), "emulated by the host kernel (UMIP)"),
    **dict.fromkeys(("int", "sysenter", "sysexit"), HOST_KERNEL),
    "int1": "hypervisors disagree on the EIP that its #DB saves",
    "hlt": "ends every case",
}


def why_excluded(row: Row) -> str | None:
    return EXCLUDED.get(row.mnemonic)


# As kernel code (CPL 0) these do something else than at CPL 3, or push what differs there.
PRIVILEGED_ACTIONS = frozenset(("cli", "sti", "popf", "pushseg", "movfromseg"))
UNPRIVILEGED_SIMULATED = frozenset(
    ("daa", "das", "aaa", "aas", "aam", "aad", "salc", "enter", "bound", "arpl", "ud2")
)


def same_at_cpl0(row: Row) -> bool:
    """Kernel code may execute the row and must get what user code gets."""
    if row.action in ("sim", "stop"):
        return row.mnemonic in UNPRIVILEGED_SIMULATED
    return row.action not in PRIVILEGED_ACTIONS


TESTED_ROWS = tuple(row for row in all_rows() if why_excluded(row) is None)


class Reason(StrEnum):
    """Why a case that was tried has no verdict.  `judge.excluded` decides, by both outcomes."""

    NO_END = "on the host it runs on for ever"
    SYSTEM_CALL = "on the host it reaches a system call"
    ENDED_PROCESS = "on the host it leaves 32-bit mode"
    ALIGNED_16 = "whether operands of 16 bytes are checked for alignment is up to the processor"
    CMPS_ORDER = "which operand of CMPS faults first is up to the processor"
    OUTER_STACK = "a far return looks for the outer stack before it refuses a selector"
    OPERAND_ORDER = "which of two faults of an operand comes first is up to the processor"
    IN_DATA = "it jumps into data, which may be anything"
    WRAPS = "an operand runs past 4 GiB: a fault or not is up to the processor"
    NOT_DIRECT = "the direct executor leaves it to the translator"
    OWN_STRING = "a string instruction overwrites itself"
    OWN_DISPLAY = "an ENTER that faults at its end has overwritten what it copies when it begins again"

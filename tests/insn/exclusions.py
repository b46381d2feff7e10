"""Which rows the host CPU cannot judge, and why.  Everything else in the table is tested."""

from __future__ import annotations

from cpu_node.table import ROWS, Row

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


TESTED_ROWS = tuple(row for row in ROWS if why_excluded(row) is None)

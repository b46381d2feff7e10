"""docs/conformance.md, from a report and from what the code says is tried, masked and excluded."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from cpu_node.table import FLAG_BITS, all_rows
from tests.insn.exclusions import EXCLUDED, Reason
from tests.insn.executors import EXECUTORS
from tests.insn.forms import summary
from tests.insn.groups import GROUPS
from tests.insn.report import Report

COLUMNS = ("tried", "agreed", "masked", "excluded", "differ")
WANTED = 5_000_000


class Run(NamedTuple):
    """What was run."""

    seed: int
    cases: int
    jobs: int
    seconds: float
    executors: tuple[str, ...]


HEAD = """# Conformance

Written by `make conformance`; not to be edited. Random instances of every instruction that the host CPU can
judge, executed natively on the host and by each executor of the CPU node; registers, flags, x87, MMX and SSE
state, memory, selectors, the exception with its error code and address must be the same. How it works and how
to use it: [testing-the-cpu.md](testing-the-cpu.md).
"""


def page(run: Run, report: Report) -> str:
    """The whole document."""
    parts = [HEAD, _intro(run), "## Executors\n", _executors(run)]
    for name in EXECUTORS:
        parts += [f"## {name.capitalize()}\n", _groups(name, report)]
    parts += ["## Forms\n", _forms(report), "## Excluded\n", _excluded(report), "## Masked\n", _masked(),
              "## Not tried\n", _not_tried()]  # fmt: skip
    return "\n".join(parts)


def _intro(run: Run) -> str:
    speed = run.cases / run.seconds
    times = len(run.executors) + 1
    text = (
        f"This run: seed {run.seed}, {run.cases:,} instances by each executor, in {run.seconds / 60:.0f} "
        f"minutes with {run.jobs} jobs ({speed:,.0f} instances a second, each executed {times} times)."
    )
    if run.cases < WANTED:
        text += f" It is smaller than a run of {WANTED:,}, which the target's default asks for."
    return text + "\n"


def _executors(run: Run) -> str:
    lines = ["| executor | what | in this run |", "|---|---|---|"]
    for name, executor in EXECUTORS.items():
        lines.append(f"| {name} | {executor.what} | {'yes' if name in run.executors else 'no'} |")
    return "\n".join(lines) + "\n"


def _cells(numbers: tuple[int, ...]) -> str:
    return " | ".join(f"{n:,}" for n in numbers)


def _groups(name: str, report: Report) -> str:
    lines = [f"| opcode group | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for group in GROUPS:
        lines.append(f"| {group} | {_cells(report.row(name, group))} |")
    lines.append(f"| all | {_cells(report.row(name, None))} |")
    return "\n".join(lines) + "\n"


def _forms(report: Report) -> str:
    text = f"Of the {report.forms['instances']:,} instances of a single instruction:\n"
    lines = [text, "| what | met | there are |", "|---|---:|---:|"]
    lines += [f"| {what} | {met:,} | {there:,} |" for what, met, there in summary(report.forms)]
    return "\n".join(lines) + "\n"


def _excluded(report: Report) -> str:
    names = list(EXECUTORS)
    lines = [
        "Tried, but without a verdict; all but the first three only where the outcomes differed.\n",
        f"| why | {' | '.join(names)} |",
        "|---" + "|---:" * len(names) + "|",
    ]
    for reason in Reason:
        counts = tuple(
            sum(n for (e, _, r), n in report.excluded.items() if e == name and r is reason) for name in names
        )
        lines.append(f"| {reason} | {_cells(counts)} |")
    return "\n".join(lines) + "\n"


def _masked() -> str:
    by_flags: dict[str, set[str]] = defaultdict(set)
    for row in all_rows():
        if row.undefined:
            flags = "".join(f for f, bit in FLAG_BITS.items() if row.undefined & bit)
            by_flags[flags].add(row.mnemonic)
    lines = [
        "'masked' counts instances that agree but for something undefined. Flags (`u=` in\n"
        "`cpu_node/table.py`; shifts only where the count leaves them undefined):\n",
        "| flags | instructions |",
        "|---|---|",
    ]
    lines += [f"| {flags} | {', '.join(sorted(names))} |" for flags, names in sorted(by_flags.items())]
    lines += [
        "",
        "Besides: the x87 pointers that FNSTENV, FNSAVE and FXSAVE store, and what FXSAVE leaves reserved;\n"
        "memory below the stack pointer that PUSHA, ENTER and far CALL wrote before they faulted; what POPA\n"
        "loaded before it faulted; which byte of an operand longer than a register faulted first.\n",
    ]
    return "\n".join(lines)


def _not_tried() -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in EXCLUDED.items():
        by_reason[reason].append(name)
    lines = ["| instructions | why |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    lines.append("")
    lines.append("Of IN, OUT, LGDT and other privileged instructions only the fault at CPL 3 is tried here,")
    lines.append("and no 16-bit code (16-bit operands and addresses are): see `tests/cpu_node`.\n")
    return "\n".join(lines)


def skeleton(text: str) -> str:
    """A page without what differs from run to run: the sentence about the run, counts, and "in this run"."""
    text = re.sub(r"(?m)^(This run|Of the [\d,]+ inst).*$", "", text)
    text = re.sub(r"\| (yes|no) \|", "| |", text)
    return re.sub(r"\| +[\d,]+(?= +\|)", "| n", text)

"""Runs cases natively and translated, and compares: `python -m tests.insn.agree SEED START COUNT [KIND]`.

Both processes work at the same time: while one batch runs translated the next runs natively.  A case
that doesn't end natively is excluded (nothing to compare with), and never reaches the translated runner.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tests.insn.draft import HLTS_BEHIND, READ_ONLY_PAGES, RW_PAGES
from tests.insn.generate import Generator
from tests.insn.segments import FLAT
from tests.insn.state import PAGE_FAULT, PAGE_SIZE, Blind, Case, CpuState, differences
from tests.insn.worker import NATIVE, TRANSLATED, Worker

BATCH = 200
NATIVE_ENDS = frozenset(("hlt", "fault"))
ALIGNMENT_CHECK = 17
DATA_PAGES = frozenset((*RW_PAGES, *READ_ONLY_PAGES))
OPERAND_VECTORS = frozenset((12, 13, 14))
LIMIT_VECTORS = frozenset((12, 13))
WRAPPING = 0xFFFFFE00  # an FXSAVE image before 4 GiB
MAX_FAILURES = 40  # then a shard stops: there is enough to look at


@dataclass(frozen=True, slots=True)
class Failure:
    seed: int
    index: int
    case: Case
    lines: tuple[str, ...]

    def __str__(self) -> str:
        code = self.case.code().hex(" ")
        rows = ", ".join(self.case.rows) or self.case.group
        return f"{self.seed}:{self.index} [{rows}] {code}: " + "; ".join(self.lines)


@dataclass(slots=True)
class Report:
    """Counts by group; `excluded` by reason."""

    tried: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    excluded: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.tried += other.tried
        self.agreed += other.agreed
        self.masked += other.masked
        self.excluded += other.excluded
        self.failures += other.failures

    def table(self) -> str:
        lines = [f"{'group':<16}{'tried':>8}{'agreed':>8}{'masked':>8}{'excluded':>9}{'differ':>8}"]
        differ = Counter(failure.case.group for failure in self.failures)
        excluded = Counter[str]()
        for (group, _), count in self.excluded.items():
            excluded[group] += count
        for group in (*sorted(self.tried), "all"):
            pick = Counter.total if group == "all" else (lambda counter, group=group: counter[group])
            counts = [pick(c) for c in (self.tried, self.agreed, self.masked)]
            counts_text = "".join(f"{n:>8}" for n in counts)
            lines.append(f"{group:<16}{counts_text}{pick(excluded):>9}{pick(differ):>8}")
        lines += [f"excluded: {n} {group}: {reason}" for (group, reason), n in sorted(self.excluded.items())]
        return "\n".join(lines)


def _batches(seed: int, start: int, count: int) -> Iterator[list[tuple[int, Case]]]:
    generator = Generator(seed)
    for first in range(start, start + count, BATCH):
        yield [(index, generator.case(index)) for index in range(first, min(first + BATCH, start + count))]


def _wraps(native: CpuState, translated: CpuState) -> bool:
    """An operand runs past 4 GiB: whether that is #GP or #SS is up to the processor [volume 3, 5.3]."""
    stop = translated.stop
    return native.stop.vector in LIMIT_VECTORS and stop.vector == PAGE_FAULT and stop.va >= WRAPPING


def _overwrites_itself(case: Case, native: CpuState) -> bool:
    """A repeated string instruction stored to its own bytes: is it still itself in the next iteration?"""
    if not any("sb" in row or "sv" in row for row in case.rows):
        return False
    before = case.code()
    after = replace(case, pages=tuple(p._replace(data=native.changed.get(p.va, p.data)) for p in case.pages))
    return after.code() != before


def _in_data(case: Case, eip: int) -> bool:
    """Not the case's code, nor the HLTs behind it."""
    return eip & -PAGE_SIZE in DATA_PAGES and not 0 <= eip - case.eip < case.code_length + HLTS_BEHIND


def _excluded(case: Case, native: CpuState, translated: CpuState) -> str | None:
    """Why a difference doesn't count."""
    if native.stop.vector == ALIGNMENT_CHECK and any("0F" in row for row in case.rows):
        return "whether 16-byte operands are checked for alignment is up to the processor"
    both_fault = native.stop.kind == translated.stop.kind == "fault"
    if both_fault and any("cmps" in row for row in case.rows):
        return "which operand of CMPS faults first is up to the processor"
    looked = native.stop.vector in (PAGE_FAULT, ALIGNMENT_CHECK)
    if looked and translated.stop.vector == 13 and translated.stop.error:
        return "a far return looks for the outer stack before it refuses a selector"
    ordered = case.selectors == FLAT and not case.blind.fault_page_only
    if both_fault and not ordered and native.eip == translated.eip and native.stop.vector in OPERAND_VECTORS:
        return "which of two faults of an operand comes first is up to the processor"
    if any(_in_data(case, state.eip) for state in (native, translated)):
        return "jumped into data, which may be anything"
    if _wraps(native, translated):
        return "an operand wraps at 4 GiB"
    if _overwrites_itself(case, native):
        return "a string instruction overwrites itself"
    return None


def _judge(report: Report, seed: int, index: int, case: Case, native: CpuState, translated: CpuState) -> None:
    lines = differences(case, native, translated)
    reason = _excluded(case, native, translated) if lines else None
    if reason:
        report.excluded[case.group, reason] += 1
    elif lines:
        report.failures.append(Failure(seed, index, case, tuple(lines)))
    elif case.blind != Blind() and differences(replace(case, blind=Blind()), native, translated):
        report.masked[case.group] += 1
    else:
        report.agreed[case.group] += 1


def run(seed: int, start: int, count: int, kind: str = TRANSLATED) -> Report:
    """The cases start..start+count-1 of a seed, natively and by another kind of runner."""
    report = Report()
    pending: list[tuple[int, Case, CpuState]] = []

    def collect(worker: Worker) -> None:
        for (index, case, native), translated in zip(pending, worker.receive(), strict=True):
            _judge(report, seed, index, case, native, translated)

    with Worker(NATIVE) as native_worker, Worker(kind) as translated_worker:
        for batch in _batches(seed, start, count):
            native_worker.send([case for _, case in batch])
            outcomes = native_worker.receive()
            if pending:
                collect(translated_worker)
                if len(report.failures) >= MAX_FAILURES:
                    return report
            pending = []
            for (index, case), native in zip(batch, outcomes, strict=True):
                report.tried[case.group] += 1
                if native.stop.kind in NATIVE_ENDS:
                    pending.append((index, case, native))
                else:
                    report.excluded[case.group, f"native run ended with {native.stop}"] += 1
            translated_worker.send([case for _, case, _ in pending])
        if pending:
            collect(translated_worker)
    return report


def main() -> int:
    seed, start, count = (int(argument) for argument in sys.argv[1:4])
    report = run(seed, start, count, *sys.argv[4:5])
    print(report.table())
    for failure in report.failures:
        print(failure)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

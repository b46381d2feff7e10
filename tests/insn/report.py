"""What came of many cases, counted by executor and opcode group."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.insn.exclusions import Reason
from tests.insn.judge import Verdict
from tests.insn.state import Case

Place = tuple[str, str]  # executor, group


@dataclass(frozen=True, slots=True)
class Failure:
    """A difference that nothing explains."""

    seed: int
    index: int
    executor: str
    case: Case
    lines: tuple[str, ...]

    def __str__(self) -> str:
        code = self.case.code().hex(" ")
        rows = ", ".join(self.case.rows) or self.case.group
        what = f"{self.seed}:{self.index} {self.executor} [{rows}] {code}"
        return f"{what}: {'; '.join(self.lines)}\n    {self.command}"

    @property
    def command(self) -> str:
        return f"python -m tests.insn.repro {self.seed}:{self.index} --executor '{self.executor}'"


@dataclass(slots=True)
class Report:
    """tried = agreed + masked + excluded + failures, for every executor."""

    tried: Counter[Place] = field(default_factory=Counter)
    agreed: Counter[Place] = field(default_factory=Counter)
    masked: Counter[Place] = field(default_factory=Counter)
    excluded: Counter[tuple[str, str, Reason]] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.tried += other.tried
        self.agreed += other.agreed
        self.masked += other.masked
        self.excluded += other.excluded
        self.forms += other.forms
        self.failures += other.failures

    def count(self, executor: str, group: str, verdict: Verdict | Reason) -> None:
        """A case that was tried; differences are added to `failures` by the caller."""
        self.tried[executor, group] += 1
        if isinstance(verdict, Reason):
            self.excluded[executor, group, verdict] += 1
        elif verdict is Verdict.AGREED:
            self.agreed[executor, group] += 1
        elif verdict is Verdict.MASKED:
            self.masked[executor, group] += 1

    def row(self, executor: str, group: str | None) -> tuple[int, int, int, int, int]:
        """(tried, agreed, masked, excluded, differ) of a group; None: of all."""

        def sum_of(counter: Counter[Place]) -> int:
            return sum(n for (e, g), n in counter.items() if e == executor and group in (g, None))

        excluded = sum(n for (e, g, _), n in self.excluded.items() if e == executor and group in (g, None))
        differ = sum(f.executor == executor and group in (f.case.group, None) for f in self.failures)
        return sum_of(self.tried), sum_of(self.agreed), sum_of(self.masked), excluded, differ

    def table(self) -> str:
        """For a terminal."""
        lines = []
        for executor in dict.fromkeys(e for e, _ in self.tried):
            titles = ("tried", "agreed", "masked", "excluded", "differ")
            lines.append(f"{executor:<28}" + "".join(f"{title:>10}" for title in titles))
            for group in (*dict.fromkeys(sorted(g for e, g in self.tried if e == executor)), None):
                counts = "".join(f"{n:>10}" for n in self.row(executor, group))
                lines.append(f"{group or 'all':<28}{counts}")
        for (executor, group, reason), n in sorted(self.excluded.items()):
            lines.append(f"excluded: {n} {executor}, {group}: {reason}")
        return "\n".join(lines)

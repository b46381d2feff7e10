"""Runs cases natively and by the executors, and compares.

`python -m tests.insn.agree SEED START COUNT [EXECUTOR]...`

One process generates the cases and judges, one runs them natively, and each executor has one of its own.
While the executors work on a batch the next is generated and runs natively.  A case that doesn't end on the
host is excluded (there is nothing to compare with), and reaches no executor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

from tests.insn.executors import EVERY, NATIVE, available
from tests.insn.forms import count_forms
from tests.insn.generate import VARIATIONS, Generator
from tests.insn.judge import Verdict, judge, no_verdict
from tests.insn.report import Failure, Report
from tests.insn.state import CpuState
from tests.insn.worker import Batch, Worker

FAMILIES = 48  # of a batch
MAX_FAILURES = 40  # then a run stops: there is enough to look at


class _Round:
    """A batch, what it did natively, and which of its cases have no verdict."""

    def __init__(self, batch: Batch, native: Sequence[CpuState]) -> None:
        self.batch = batch
        self.native = native
        self.reasons = [no_verdict(state) for state in native]
        self.skip = frozenset(i for i, reason in enumerate(self.reasons) if reason is not None)


def _batches(seed: int, families: Iterable[int]) -> Iterator[Batch]:
    generator = Generator(seed)
    batch: list[int] = []
    for number in families:
        batch.append(number)
        if len(batch) == FAMILIES:
            yield Batch.of(map(generator.family, batch), batch[0] * VARIATIONS)
            batch = []
    if batch:
        yield Batch.of(map(generator.family, batch), batch[0] * VARIATIONS)


def _judge(report: Report, seed: int, made: _Round, name: str, outcomes: Sequence[CpuState | None]) -> None:
    for i, (case, native, reason, other) in enumerate(
        zip(made.batch.cases, made.native, made.reasons, outcomes, strict=True)
    ):
        if not EVERY[name].takes(case):
            continue
        if reason is not None:
            report.count(name, case.group, reason)
            continue
        assert other is not None
        verdict, lines = judge(case, native, other)
        report.count(name, case.group, verdict)
        if verdict is Verdict.DIFFERS:
            report.failures.append(Failure(seed, made.batch.first + i, name, case, tuple(lines)))


def run(
    seed: int,
    families: Iterable[int],
    executors: Sequence[str],
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """The cases of these families (ascending, whole batches adjoining).  `progress` gets each batch's share
    of the report."""
    total = Report()
    with ExitStack() as stack:
        native_worker = stack.enter_context(Worker(NATIVE))
        workers = {name: stack.enter_context(Worker(name)) for name in executors}

        def collect(made: _Round) -> None:
            share = Report()
            for name, worker in workers.items():
                _judge(share, seed, made, name, worker.receive())
            count_forms(share.forms, made.batch.cases, made.native)
            total.add(share)
            progress(share)

        pending: _Round | None = None
        for batch in _batches(seed, families):
            native_worker.send(batch)
            made = _Round(batch, [s for s in native_worker.receive() if s is not None])
            if pending is not None:
                collect(pending)
                pending = None
                if len(total.failures) >= MAX_FAILURES:
                    return total
            for name, worker in workers.items():
                takes = EVERY[name].takes
                refused = (i for i, case in enumerate(batch.cases) if not takes(case))
                worker.send(batch, made.skip.union(refused))
            pending = made
        if pending is not None:
            collect(pending)
    return total


def main() -> int:
    seed, start, count = (int(argument) for argument in sys.argv[1:4])
    names = sys.argv[4:] or available()
    first = start // VARIATIONS
    report = run(seed, range(first, first + -(-count // VARIATIONS)), names)
    print(report.table())
    for failure in report.failures:
        print(failure)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

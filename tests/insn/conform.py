"""`make conformance`: millions of random instances by every executor and the host CPU, and the table of them.

`python -m tests.insn.conform [--cases N] [--seed S] [--jobs J] [--minutes M] [--executor NAME] [--out FILE]`

The cases are dealt out to one process per core in turns of some hundred; a seed always gives the same cases.
The first differences are shrunk; each comes with the command that runs it again.  Status 1 if there are any;
the table is written all the same, with their number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

from tests.insn.agree import FAMILIES, MAX_FAILURES, run
from tests.insn.executors import EVERY, available
from tests.insn.generate import VARIATIONS
from tests.insn.report import Failure, Report
from tests.insn.repro import shrink_failure
from tests.insn.table import Run, page

DEFAULT_CASES, DEFAULT_SEED = 5_000_000, 1986
SHOWN = 3  # differences that are shrunk
SAY_SECONDS = 30.0
FOR_EVER = 60.0 * 24 * 365
FIRST_FAMILY = 1 << 32  # not those of the tests


class Plan(NamedTuple):
    """What to run."""

    seed: int
    cases: int
    jobs: int
    executors: tuple[str, ...]
    minutes: float = FOR_EVER


def shares(cases: int, jobs: int, minutes: float) -> list[Iterator[int]]:
    """The families of each job: batch by batch in turns, none after so many minutes."""
    families = -(-cases // VARIATIONS)
    end = time.monotonic() + 60 * minutes

    def share(job: int) -> Iterator[int]:
        for first in range(job * FAMILIES, families, jobs * FAMILIES):
            if time.monotonic() > end:
                return
            yield from range(FIRST_FAMILY + first, FIRST_FAMILY + min(first + FAMILIES, families))

    return [share(job) for job in range(jobs)]


def _job(plan: Plan, job: int, out: Queue[Report | None]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    families = shares(plan.cases, plan.jobs, plan.minutes)[job]
    try:  # no longer than whoever wants the result, however that ended
        run(plan.seed, takewhile(lambda _: parent.is_alive(), families), plan.executors, out.put)
    finally:
        out.put(None)


def run_all(plan: Plan, say: bool = False) -> Report:
    """All cases, by that many processes (each with one per executor and one for the host CPU)."""
    cases, jobs = plan.cases, plan.jobs
    context = multiprocessing.get_context("spawn")
    results: Queue[Report | None] = context.Queue()
    processes = [context.Process(target=_job, args=(plan, job, results)) for job in range(jobs)]
    for process in processes:
        process.start()
    total, left = Report(), jobs
    start = said = time.monotonic()
    while left:
        share = results.get()
        if share is None:
            left -= 1
            continue
        total.add(share)
        now = time.monotonic()
        if say and now - said > SAY_SECONDS:
            said = now
            done = total.row(plan.executors[0], None)[0]
            speed = done / (now - start)
            text = f"{done:,} of {cases:,}, {speed:,.0f}/s, {len(total.failures)} differences"
            print(f"{text}, {(cases - done) / speed / 60:.0f} min left", file=sys.stderr, flush=True)
        if len(total.failures) >= MAX_FAILURES:
            for process in processes:
                process.terminate()
            break
    for process in processes:
        process.join()
    return total


def explain(failures: Iterable[Failure]) -> str:
    """The first failures of different rows shrunk, the others in two lines each."""
    failures = list(failures)
    seen: set[tuple[str, ...]] = set()
    out = []
    for failure in failures:
        if failure.case.rows in seen or len(seen) == SHOWN:
            continue
        seen.add(failure.case.rows)
        out.append(shrink_failure(failure.seed, failure.index, failure.executor))
    return "\n\n".join([*out, *map(str, failures)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.insn.conform", description=__doc__)
    parser.add_argument("--cases", type=int, default=DEFAULT_CASES)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=FOR_EVER, help="stop then, and count what is done")
    parser.add_argument("--executor", action="append", choices=tuple(EVERY), help="default: the table's")
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    names = tuple(arguments.executor or available())
    plan = Plan(arguments.seed, arguments.cases, arguments.jobs, names, arguments.minutes)
    start = time.monotonic()
    report = run_all(plan, say=True)
    seconds = time.monotonic() - start
    print(report.table())
    if report.failures:
        print(explain(report.failures))
    if arguments.out is not None:
        cases = report.row(names[0], None)[0]
        made = Run(plan.seed, cases, plan.jobs, seconds, names)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page(made, report), encoding="utf-8")
        print(f"written: {arguments.out}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

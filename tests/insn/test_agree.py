"""The host CPU and every executor run the same random instructions: not one difference is allowed.

BACKPLANE_INSN_CASES sets how many cases run (default 240,000; `make conformance` runs millions) and
BACKPLANE_INSN_SEED the seed (default: the same for ever).  A failure prints the shrunk case and the command
that runs it again.
"""

from __future__ import annotations

import os

import pytest

from tests.insn.conform import DEFAULT_SEED, Plan, explain, run_all
from tests.insn.exclusions import EXCLUDED, TESTED_ROWS
from tests.insn.executors import DIRECT, EVERY, SOFT, SOFT_RESTARTED, available
from tests.insn.forms import summary
from tests.insn.generate import VARIATIONS, Generator
from tests.insn.groups import GROUPS, group_of
from tests.insn.report import Report

SEED = int(os.environ.get("BACKPLANE_INSN_SEED", str(DEFAULT_SEED)))
CASES = int(os.environ.get("BACKPLANE_INSN_CASES", "240000"))
JOBS = 2
LEAST_AGREED = 0.98  # of the cases tried, exclusions are the rest
ENOUGH_FOR_GROUPS, ENOUGH_FOR_FORMS = 10_000, 100_000
LEAST_FORMS = 0.15  # of each line of the table of forms; millions of cases come near all
ALWAYS_COMPLETE = ("rows of the", "forms of 32-bit", "forms of 16-bit", "segment prefixes")


@pytest.fixture(scope="module")
def report() -> Report:
    return run_all(Plan(SEED, CASES, JOBS, available(EVERY)))


@pytest.mark.parametrize("executor", EVERY)
def test_an_executor_does_what_the_host_does(report: Report, executor: str) -> None:
    if executor not in available(EVERY):
        pytest.skip("this host does not allow it")
    failures = [failure for failure in report.failures if failure.executor == executor]
    assert not failures, explain(failures)
    assert not report.failures, "another executor's differences ended the run"
    tried, agreed, masked, excluded, differ = report.row(executor, None)
    cases = -(-CASES // VARIATIONS) * VARIATIONS
    some = (*DIRECT.values(), SOFT, SOFT_RESTARTED)
    assert cases // 3 < tried < cases if executor in some else tried == cases
    assert tried == agreed + masked + excluded
    assert differ == 0
    assert agreed + masked >= LEAST_AGREED * tried
    if CASES >= ENOUGH_FOR_GROUPS:
        assert all(report.row(executor, group)[0] for group in GROUPS)


@pytest.mark.skipif(CASES < ENOUGH_FOR_FORMS, reason="too few cases to meet all forms")
def test_every_form_of_instruction_is_met(report: Report) -> None:
    for what, met, there_are in summary(report.forms):
        least = there_are if what.startswith(ALWAYS_COMPLETE) else LEAST_FORMS * there_are
        assert least <= met <= there_are, what


def test_every_row_is_tested_or_excluded_with_a_reason() -> None:
    generator = Generator(SEED)
    expected = {f"{row.key} {row.mnemonic}" for row in TESTED_ROWS}
    seen = {row for number in range(2 * len(TESTED_ROWS)) for row in generator.family(number).case.rows}
    assert expected <= seen
    assert all(EXCLUDED.values())


def test_every_row_has_a_group() -> None:
    assert {group_of(row) for row in TESTED_ROWS} <= set(GROUPS)


def test_a_family_has_one_code_and_many_states() -> None:
    generator = Generator(SEED)
    for number in range(300):
        cases = generator.family(number).cases()
        assert len(cases) == VARIATIONS
        assert len({case.code() for case in cases}) == 1
        assert len({(case.regs, case.eflags, case.fx, case.pages) for case in cases}) == VARIATIONS
        assert [generator.case(VARIATIONS * number + i) for i in range(VARIATIONS)] == cases

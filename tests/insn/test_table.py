"""docs/conformance.md names what the code tries, masks and excludes, whatever its counts."""

from __future__ import annotations

from pathlib import Path

from tests.insn.exclusions import EXCLUDED, Reason
from tests.insn.executors import EXECUTORS, SIMULATED, TRANSLATED
from tests.insn.groups import GROUPS
from tests.insn.judge import Verdict
from tests.insn.report import Report
from tests.insn.table import Run, page, skeleton

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"


def made(cases: int = 5_000_000) -> Run:
    return Run(1, cases, 2, 60.0, tuple(EXECUTORS))


def counted() -> Report:
    report = Report()
    report.count(TRANSLATED, "string", Verdict.AGREED)
    report.count(TRANSLATED, "string", Verdict.MASKED)
    report.count(TRANSLATED, "x87", Reason.WRAPS)
    report.count(SIMULATED, "mmx", Verdict.AGREED)
    return report


def test_the_document_has_the_groups_executors_and_exclusions_of_the_code() -> None:
    assert skeleton(DOCUMENT.read_text(encoding="utf-8")) == skeleton(page(made(), Report())), (
        "stale: run `make conformance`"
    )


def test_a_page_has_the_counts() -> None:
    text = page(made(), counted())
    assert "| string | 2 | 1 | 1 | 0 | 0 |" in text
    assert "| all | 3 | 1 | 1 | 1 | 0 |" in text
    assert f"| {Reason.WRAPS} | 1 | 0 | 0 | 0 |" in text
    assert "It is smaller" not in text
    assert "It is smaller" in page(made(4_000_000), counted())


def test_everything_that_is_left_out_is_on_the_page() -> None:
    text = page(made(), Report())
    for word in (*GROUPS, *EXECUTORS, *Reason, *EXCLUDED):
        assert word in text


def test_the_skeleton_is_what_stays_the_same() -> None:
    one, other = page(made(), counted()), page(made(123_456), Report())
    assert one != other
    assert skeleton(one) == skeleton(other)
    assert skeleton(one.replace("| sse |", "| sse9 |")) != skeleton(one)
    assert skeleton(one.replace(Reason.WRAPS, "no reason")) != skeleton(one)


def test_reports_add_up() -> None:
    report = counted()
    report.add(counted())
    assert report.row(TRANSLATED, None) == (6, 2, 2, 2, 0)
    assert report.row(TRANSLATED, "x87") == (2, 0, 0, 2, 0)

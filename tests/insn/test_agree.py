"""The host CPU and the CPU node execute the same random instructions: not one difference is allowed.

BACKPLANE_INSN_CASES sets how many cases run (default 240,000; millions for a release) and
BACKPLANE_INSN_SEED the seed (default: the same for ever).  A failure prints the shrunk case and `SEED:INDEX`
for tests.insn.repro.
"""

from __future__ import annotations

import os

import pytest

from tests.insn.agree import Failure, Report, run
from tests.insn.exclusions import EXCLUDED, TESTED_ROWS
from tests.insn.generate import Generator
from tests.insn.repro import shrink_failure
from tests.insn.worker import SIMULATED, TRANSLATED

SEED = int(os.environ.get("BACKPLANE_INSN_SEED", "1986"))
CASES = int(os.environ.get("BACKPLANE_INSN_CASES", "240000"))
SHARDS = 8
SIMULATED_PART = 6  # one case in so many also runs in the simulator alone
SHOWN = 3
LEAST_AGREED = 0.98  # of the cases tried, exclusions are the rest
GROUPS = {"int", "string", "x87", "mmx", "sse", "system", "sequence", "self-modifying", "illegal"}


def _explain(failures: list[Failure], kind: str) -> str:
    """The first failures of different rows shrunk, the others in a line each."""
    seen: set[tuple[str, ...]] = set()
    out = []
    for failure in failures:
        if failure.case.rows in seen or len(seen) == SHOWN:
            continue
        seen.add(failure.case.rows)
        out.append(shrink_failure(failure.seed, failure.index, kind))
    return "\n\n".join([*out, *map(str, failures)])


def _check(report: Report, count: int, kind: str) -> None:
    print(report.table())
    assert not report.failures, _explain(report.failures, kind)
    assert report.tried.total() == count
    assert report.agreed.total() + report.masked.total() >= LEAST_AGREED * count
    assert set(report.tried) == GROUPS


@pytest.mark.parametrize("shard", range(SHARDS))
def test_translated_code_does_what_the_host_does(shard: int) -> None:
    count = CASES // SHARDS
    _check(run(SEED, shard * count, count), count, TRANSLATED)


@pytest.mark.parametrize("shard", range(2))
def test_the_simulator_alone_does_what_the_host_does(shard: int) -> None:
    count = CASES // SIMULATED_PART // 2
    _check(run(SEED, CASES + shard * count, count, SIMULATED), count, SIMULATED)


def test_every_row_is_tested_or_excluded_with_a_reason() -> None:
    generator = Generator(SEED)
    expected = {f"{row.key} {row.mnemonic}" for row in TESTED_ROWS}
    seen = {row for index in range(8 * len(TESTED_ROWS)) for row in generator.case(index).rows}
    assert expected <= seen
    assert all(EXCLUDED.values())

"""The trace that exports are measured with: as long as asked for, the same each time, all of it complete."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.trace_export import WORK
from bench.trace_made import make
from tracing.chains import chains, steps
from tracing.file import Trace

RECORDS = 20_000


def test_all_its_chains_are_complete(tmp_path: Path) -> None:
    count = make(tmp_path / "a.bptrace", RECORDS, seed=3)
    assert RECORDS <= count < RECORDS + 500
    with Trace(tmp_path / "a.bptrace") as trace:
        assert sum(1 for _ in trace.records()) == count
        assert not trace.complaints
        assert not trace.lost
        found = list(chains(steps(trace)))
        kinds = Counter(step.kind for chain in found for step in chain.steps)
    unfinished = [chain for chain in found if not chain.complete]
    assert not unfinished, unfinished[0].why_not
    assert kinds["access"] > kinds["frame"] > kinds["vector"] > kinds["disk"] > 20


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, 3000, seed=5)
    with Trace(tmp_path / "a") as a, Trace(tmp_path / "b") as b:
        assert list(a.records()) == list(b.records())


def test_each_export_is_measured(tmp_path: Path) -> None:
    """Within the limits: 2000 records are."""
    command = [sys.executable, "-m", "bench.trace_export", "--records", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    head, _, *lines = done.stdout.splitlines()
    assert head.endswith(" bytes")
    assert [line.split()[0] for line in lines] == list(WORK)

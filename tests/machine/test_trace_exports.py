"""The trace of a real machine in the viewers: each step, each frame, and no error of theirs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bus.frames import TABLE
from bus.recorder import FRAME
from tests.machine.drive import ROOT, Screen, command
from tests.tracing import trace_processor, tshark
from tracing.chains import steps
from tracing.file import Trace

pytestmark = pytest.mark.machine
HELLO = ROOT / "machines" / "hello.toml"
ERRORS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
BY_NODE = """
    select process.name as node, count(*) as n from slice
    join process_track on slice.track_id = process_track.id join process using (upid) group by 1"""


@pytest.fixture
def life(runtime: Path, tmp_path: Path) -> Path:
    file = tmp_path / "life.bptrace"
    with Screen("up", HELLO, "--trace", file, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        screen.type("q")
        screen.finish(0)
        screen.wait_gone()
    return file


def test_perfetto_has_each_step_and_no_error(life: Path, runtime: Path) -> None:
    trace_processor.need()
    out = life.with_suffix(".pftrace")
    command("trace", life, "--out", out, runtime=runtime)
    with Trace(life) as trace:
        nodes = Counter(step.node for step in steps(trace))
    errors, by_node, arrows = trace_processor.query(out, ERRORS, BY_NODE, "select count(*) as n from flow")
    assert errors == []
    assert {row["node"]: row["n"] for row in by_node} == nodes
    assert arrows[0]["n"] > nodes["pic"]


@tshark.needed
def test_tshark_dissects_each_frame(life: Path, runtime: Path) -> None:
    out = life.with_suffix(".pcapng")
    command("trace", life, "--out", out, runtime=runtime)
    with Trace(life) as trace:
        frames = sum(record.kind == FRAME for _, record in trace.records())
    rows = tshark.rows(out, "backplane.name", "backplane.cut", "_ws.malformed")
    assert len(rows) == frames > 500
    kinds = {cls.__name__ for cls, _ in TABLE.values()}
    assert all(name in kinds and not cut and not malformed for name, cut, malformed in rows)

"""A small run of `make torture` (bench/torture): nothing may be wrong."""

from __future__ import annotations

import shutil

import pytest

from bench.torture import guest
from bench.torture.faults import Plan
from bench.torture.run import DEVICES, Torture

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]


def test_kills_and_swaps_under_a_guest_that_checks_all_it_does() -> None:
    said: list[str] = []
    torture = Torture(guest.Load(seed=4, blocks=256, pause_ms=10), said.append)
    torture.run([Plan.make(kind, 20, DEVICES, 0.1, seed=4) for kind in ("kill", "swap")])
    assert torture.wrong == [], said
    done = [fault.kind for fault in torture.faults.done]
    assert (done.count("kill"), done.count("swap")) == (20, 20)
    assert any(fault.pause_ns for fault in torture.faults.done if fault.kind == "kill")
    assert torture.blocks.verified
    assert torture.blocks.checked > 0
    assert all(stream.ended and stream.taken > 0 for stream in torture.streams)
    if shutil.which("e2fsck", path=guest.SBIN):
        assert any(line.startswith("e2fsck -fn: ") for line in said)
